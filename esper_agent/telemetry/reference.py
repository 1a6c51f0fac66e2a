"""Scores of never-grow on each instance, the zero of the learning curve.

Instances differ more than agents do. So a score says little without the score of never-grow on the
same instance.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from esper_agent.baselines import NeverGrow
from esper_agent.envs import make_envs
from esper_env import EnvConfig, EsperVectorEnv

SEED = 2_000_000
"""Reset seed of instance 0; instance k has SEED + k. Training and evaluation use other seeds."""
PARALLEL = 16
"""Instances that are played at once; a larger batch costs less per instance."""


class NeverGrowScores:
    """Committed scores of never-grow, one episode per instance, played when they are needed.

    A score depends on nothing but the environment's settings and the instance.

    Args:
        env_id: Environment id.
        device: Device of the environment.
        config: Environment settings.
        num_instances: Number of instances in the environment.
    """

    def __init__(self, env_id: str, device: str, config: EnvConfig, num_instances: int) -> None:
        self._make, self._num_instances = (env_id, device, config), num_instances
        self._envs: EsperVectorEnv | None = None
        self.scores: dict[int, float] = {}
        """Known scores by instance."""

    def __call__(self, instances: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the score of each instance. (n,) float64."""
        while wanted := set(instances.tolist()) - self.scores.keys():
            # Free places are filled with instances that will be needed later.
            others = set(range(self._num_instances)) - self.scores.keys() - wanted
            self._play([*sorted(wanted), *sorted(others)][:PARALLEL])
        return np.array([self.scores[k] for k in instances.tolist()])

    def get_state(self) -> list[list[float]]:
        """Return pairs of instance and score."""
        return [[k, self.scores[k]] for k in sorted(self.scores)]

    def set_state(self, state: list[list[float]]) -> None:
        """Continue from the result of `get_state`."""
        self.scores = {int(k): score for k, score in state}

    def _play(self, instances: list[int]) -> None:
        """Play one episode of each instance, each with its own seed."""
        if self._envs is None:
            env_id, device, config = self._make
            self._envs = make_envs(env_id, PARALLEL, device, config)
        envs, policy = self._envs, NeverGrow()
        # Few instances repeat to fill the environment; an episode does not depend on the others.
        rows = [instances[i % len(instances)] for i in range(PARALLEL)]
        seeds: list[int | None] = [SEED + instance for instance in rows]
        observation, info = envs.reset(seed=seeds, options={"instance": np.array(rows)})
        policy.begin(envs, SEED)
        done = np.zeros(PARALLEL, dtype=bool)
        while not done.all():
            observation, _, terminated, truncated, info = envs.step(policy.act(observation, info))
            ends = (terminated | truncated) & ~done
            for i in np.nonzero(ends)[0].tolist():
                self.scores[rows[i]] = float(info["final_info"]["committed_score"][i])
            done |= ends
