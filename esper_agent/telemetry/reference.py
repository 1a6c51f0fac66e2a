"""Scores of never-grow on each instance, the zero of the learning curve.

Instances differ more than agents do. So a score says little without the score of never-grow on the
same instance, and on the same kind of problem where the task has several.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from esper_agent.baselines import NeverGrow
from esper_agent.envs import make_envs
from esper_env import EnvConfig, EsperVectorEnv

SEED = 2_000_000
"""Reset seed of instance 0; instance k has SEED + k, and the next episode of it that plus the
number of instances. Training and evaluation use other seeds."""
MAX_EPISODES = 32
"""Episodes of an instance among which a kind of problem is searched."""
PARALLEL = 16
"""Instances that are played at once; a larger batch costs less per instance."""


class NeverGrowScores:
    """Committed scores of never-grow, played when they are needed.

    The score of an instance and a kind of problem is that of the first episode of the instance that
    ends in this kind. It depends on nothing but the settings of the environment.

    Args:
        env_id: Environment id.
        device: Device of the environment.
        config: Environment settings.
        num_instances: Number of instances in the environment.
    """

    def __init__(self, env_id: str, device: str, config: EnvConfig, num_instances: int) -> None:
        self._make, self._num_instances = (env_id, device, config), num_instances
        self._envs: EsperVectorEnv | None = None
        self._played = np.zeros(num_instances, dtype=np.int64)
        self.scores: dict[tuple[int, int], float] = {}
        """Known scores by instance and kind."""

    def __call__(
        self, instances: npt.NDArray[np.int64], regimes: npt.NDArray[np.int64]
    ) -> list[float | None]:
        """Return a score per instance, or None where `MAX_EPISODES` episodes lack the kind.

        Args:
            instances: Instances. (n,) int64.
            regimes: Kinds of problems, `info["regime"]` at the end of an episode; 0 in an
                environment without regimes. (n,) int64.
        """
        keys = list(zip(instances.tolist(), regimes.tolist(), strict=True))
        while missing := {
            k for k, kind in keys if (k, kind) not in self.scores and self._played[k] < MAX_EPISODES
        }:
            # Free places are filled with instances that will be needed later.
            others = set(np.nonzero(self._played == 0)[0].tolist()) - missing
            self._play([*sorted(missing), *sorted(others)][:PARALLEL])
        return [self.scores.get(key) for key in keys]

    def get_state(self) -> dict[str, Any]:
        """Return rows of instance, kind and score, and the number of episodes per instance."""
        rows = [[*key, self.scores[key]] for key in sorted(self.scores)]
        return {"scores": rows, "played": self._played.tolist()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `get_state`."""
        self.scores = {(int(k), int(kind)): score for k, kind, score in state["scores"]}
        self._played = np.array(state["played"], dtype=np.int64)

    def _play(self, instances: list[int]) -> None:
        """Play the next episode of each instance, each with its own seed."""
        if self._envs is None:
            env_id, device, config = self._make
            self._envs = make_envs(env_id, PARALLEL, device, config)
        envs, policy = self._envs, NeverGrow()
        # Few instances repeat to fill the environment; an episode does not depend on the others.
        rows = [instances[i % len(instances)] for i in range(PARALLEL)]
        seeds: list[int | None] = [
            SEED + k + int(self._played[k]) * self._num_instances for k in rows
        ]
        self._played[instances] += 1
        observation, info = envs.reset(seed=seeds, options={"instance": np.array(rows)})
        policy.begin(envs, SEED)
        done = np.zeros(PARALLEL, dtype=bool)
        while not done.all():
            observation, _, terminated, truncated, info = envs.step(policy.act(observation, info))
            ends = (terminated | truncated) & ~done
            for i in np.nonzero(ends)[0].tolist():
                final = info["final_info"]
                kind = int(final["regime"][i]) if "regime" in final else 0
                self.scores.setdefault((rows[i], kind), float(final["committed_score"][i]))
            done |= ends
