"""Scores of never-grow on each instance, the zero of the learning curve.

Instances differ more than agents do. So a score says little without the score of never-grow on the
same instance.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_agent.baselines import NeverGrow
from esper_agent.checkpoint import write_json
from esper_agent.envs import make_envs
from esper_env import EnvConfig

SEED = 2_000_000
"""Reset seed of instance 0; instance k has SEED + k. Training and evaluation use other seeds."""
PARALLEL = 8
"""Most instances that are played at once."""


class NeverGrowScores:
    """Committed scores of never-grow, one episode per instance, played when they are needed.

    They depend on nothing but the environment and the instance. They are kept in a file, so a run
    that continues does not play them again.

    Args:
        path: JSON file.
        env_id: Environment id.
        device: Device of the environment.
        config: Environment settings.
    """

    def __init__(self, path: Path, env_id: str, device: str, config: EnvConfig) -> None:
        self._path, self._make = path, (env_id, device, config)
        self._envs: Any = None
        self.scores: dict[int, float] = {}
        """Known scores by instance."""
        with contextlib.suppress(OSError, ValueError):
            self.scores = {int(k): float(v) for k, v in json.loads(path.read_text()).items()}

    def __call__(self, instances: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Return the score of each instance. (n,) float64."""
        unknown = sorted(set(instances.tolist()) - self.scores.keys())
        if unknown:
            for first in range(0, len(unknown), PARALLEL):
                self._play(unknown[first : first + PARALLEL])
            # Without the file, another process would only play them again.
            with contextlib.suppress(OSError):
                write_json(self._path, {str(k): self.scores[k] for k in sorted(self.scores)})
        return np.array([self.scores[k] for k in instances.tolist()])

    def _play(self, instances: list[int]) -> None:
        """Play one episode of each instance, all with seeds of their own."""
        if self._envs is None:
            env_id, device, config = self._make
            self._envs = make_envs(env_id, PARALLEL, device, config)
        envs, policy = self._envs, NeverGrow()
        # Instances repeat to fill the environment; an episode does not depend on the others.
        rows = [instances[i % len(instances)] for i in range(PARALLEL)]
        seeds = [SEED + instance for instance in rows]
        observation, info = envs.reset(seed=seeds, options={"instance": np.array(rows)})
        policy.begin(envs, SEED)
        done = np.zeros(PARALLEL, dtype=bool)
        while not done.all():
            observation, _, terminated, truncated, info = envs.step(policy.act(observation, info))
            ends = (terminated | truncated) & ~done
            for i in np.nonzero(ends)[0].tolist():
                self.scores[rows[i]] = float(info["final_info"]["committed_score"][i])
            done |= ends
