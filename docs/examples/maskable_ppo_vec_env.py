"""MaskablePPO of sb3-contrib on a vector environment that trains all hosts together.

MaskablePPO samples each head from its marginal mask. An illegal combination counts as WAIT.
"""

import argparse

import gymnasium as gym
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.vec_env import VecMonitor

from esper_env.sb3 import Sb3VecEnv

# Fewer options are easier to learn. These heads get one option each.
HEADS = {"style": "LINEAR_ADD", "tempo": 3, "alpha_target": 1.0}
HEADS |= {"alpha_speed": 0, "alpha_curve": "LINEAR"}


def main() -> None:
    """Train, then run one episode."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=50_000, help="env steps of all hosts")
    args = parser.parse_args()
    envs = gym.make_vec(
        "esper_env:Esper-Digits-v0", num_envs=8, autoreset_mode="SameStep", heads=HEADS
    )
    venv = VecMonitor(Sb3VecEnv(envs))
    model = MaskablePPO("MlpPolicy", venv, n_steps=30, batch_size=120, gamma=0.995, verbose=1)
    model.learn(args.timesteps)
    observations, is_done = venv.reset(), False
    while not is_done:
        actions, _ = model.predict(observations, action_masks=get_action_masks(venv))
        observations, _, dones, infos = venv.step(actions)
        is_done = dones[0]
    print(f"committed score {infos[0]['committed_score']:.3f}")


if __name__ == "__main__":
    main()
