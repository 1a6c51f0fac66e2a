"""MaskablePPO of sb3-contrib on one environment with integer actions and an exact mask."""

import argparse

import gymnasium as gym
from sb3_contrib import MaskablePPO

from esper_env import JointAction

# All heads together have 1029 joint actions. With one option in each of these heads there are 23.
HEADS = {"style": "LINEAR_ADD", "tempo": 3, "alpha_target": 1.0}
HEADS |= {"alpha_speed": 0, "alpha_curve": "LINEAR"}


def main() -> None:
    """Train, then run one episode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=20_000, help="env steps")
    args = parser.parse_args()
    env = JointAction(gym.make("esper_env:Esper-Digits-v0", heads=HEADS))
    model = MaskablePPO("MlpPolicy", env, n_steps=120, batch_size=60, gamma=0.995, verbose=1)
    model.learn(args.timesteps)
    observation, info = env.reset(seed=0)
    is_done = False
    while not is_done:
        action, _ = model.predict(observation, action_masks=env.action_masks())
        observation, _, terminated, truncated, info = env.step(action)
        is_done = terminated or truncated
    print(f"committed score {info['committed_score']:.3f}")


if __name__ == "__main__":
    main()
