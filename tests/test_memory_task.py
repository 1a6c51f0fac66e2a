"""A task that needs memory: a cue in the first step of an episode, a decision in the last one.

The cue is the only feature, and it is 0 after the first step, so no policy without memory is right
in more than half of the episodes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from esper_agent.ppo_lstm import Args, make_train_state, run_iteration
from esper_env import EsperVectorEnv, Op
from tests.builders import SMALL

EPISODE_STEPS = 6
NUM_ENVS = 48
ITERATIONS = 70
MEASURED = 600
"""Episodes at the end over which the share of right decisions is measured."""


class CueTask(EsperVectorEnv):
    """Pays 1 for GERMINATE in the last step if the cue was 1, and for WAIT if it was -1.

    Spaces and infos are those of the environment, and no network is trained.
    """

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if options is None:
            observations, self.info = super().reset(seed=seed)
            self.masks = {name: mask.copy() for name, mask in super().conditional_masks().items()}
            self.zeros = np.zeros_like(observations)
            self.rng = np.random.default_rng(seed[0])
            self.cue, self.elapsed = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=int)
            self.is_right: list[bool] = []
            self.begin(np.ones(self.num_envs, dtype=bool))
        else:
            self.begin(options["reset_mask"])
        return self.observe(), self.info

    def begin(self, starts: npt.NDArray[np.bool_]) -> None:
        """Start episodes with new cues."""
        self.cue[starts] = self.rng.choice([-1.0, 1.0], starts.sum())
        self.elapsed[starts] = 0

    def observe(self) -> npt.NDArray[np.float32]:
        """Return the cue in the first step of an episode, else zeros."""
        observations = self.zeros.copy()
        observations[:, 0] = np.where(self.elapsed == 0, self.cue, 0.0)
        return observations

    def conditional_masks(self) -> dict[str, npt.NDArray[np.bool_]]:
        op = self.masks["op"].copy()
        op[self.elapsed < EPISODE_STEPS - 1, 1:] = False
        return self.masks | {"op": op}

    def step(self, actions: Any) -> tuple[Any, ...]:
        ends = self.elapsed == EPISODE_STEPS - 1
        is_right = (actions[:, 0] == Op.GERMINATE) == (self.cue > 0)
        self.is_right += is_right[ends].tolist()
        self.elapsed += 1
        info = dict(self.info)
        if ends.any():
            info["final_info"] = self.info
            info["final_obs"] = np.array([*self.zeros, None], dtype=object)[:-1]
        self.begin(ends)
        rewards = np.where(ends & is_right, 1.0, 0.0)
        return self.observe(), rewards, ends, np.zeros_like(ends), info


def share_of_right_decisions(*, recurrent: bool, is_staggered: bool, seed: int = 1) -> float:
    """Train, and return the share of right decisions in the last iterations."""
    heads = {"op": ["WAIT", "GERMINATE"], "slot": [0]}
    settings = SMALL | {"episode_steps": EPISODE_STEPS, "heads": heads}
    envs = CueTask(NUM_ENVS, autoreset_mode="SameStep", **settings)
    args = Args(
        seed=seed,
        num_envs=NUM_ENVS,
        # Where ends are staggered, rollouts also begin in the middle of episodes.
        num_steps=2 * EPISODE_STEPS + is_staggered,
        learning_rate=1e-2,
        num_minibatches=2,
        update_epochs=2,
        anneal_lr=False,
        hidden_size=32,
        recurrent=recurrent,
        group_size=1,
        telemetry="off",
    )
    state = make_train_state(args, envs)
    if is_staggered:
        # Member i has done i % 6 steps of its episode when the training starts.
        for done in range(1, EPISODE_STEPS):
            envs.step(np.zeros((NUM_ENVS, len(envs.heads)), dtype=np.int64))
            starts = np.arange(NUM_ENVS) % EPISODE_STEPS == EPISODE_STEPS - 1 - done
            state.next_obs, _ = envs.reset(options={"reset_mask": starts})
    for _ in range(ITERATIONS):
        run_iteration(state, envs, args)
    return float(np.mean(envs.is_right[-MEASURED:]))


@pytest.mark.parametrize("is_staggered", [False, True], ids=["ends together", "ends staggered"])
def test_the_agent_remembers_a_cue_and_without_its_lstm_state_it_cannot(is_staggered: bool) -> None:
    """The measured policy samples, so it is right in nearly all episodes, not in all."""
    assert share_of_right_decisions(recurrent=True, is_staggered=is_staggered) > 0.95
    assert 0.4 < share_of_right_decisions(recurrent=False, is_staggered=is_staggered) < 0.6
