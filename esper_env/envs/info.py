"""Info dictionary: NumPy arrays copied from the state, with Gymnasium's `_key` masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper_env.config import BoolArray, EnvConfig, FloatArray, IntArray, Stage
from esper_env.growth.state import Scores, Sizes, State


def build_info(
    state: State,
    scores: Scores,
    sizes: Sizes,
    action_mask: BoolArray,
    terms: dict[str, FloatArray],
    config: EnvConfig,
    regime: IntArray | None,
) -> dict[str, Any]:
    """Return the info dictionary of the current state.

    Args:
        state: State of the decision process.
        scores: Scores of the networks.
        sizes: Numbers of parameters of the networks.
        action_mask: Marginal masks of the next actions. (num_envs, sum(nvec)) bool.
        terms: Weighted reward terms of the last env step by name. (num_envs,) float64 each.
        config: Source of the thresholds of flags.
        regime: Kind of problem that comes next, if the task has regimes. (num_envs,) int64.

    Returns:
        Arrays (num_envs, ...), and for each key k a mask `_k`, (num_envs,) bool, that is True for
        the sub-environments that have the value. All have it, except for the test accuracies, which
        exist only at the end of an episode.
    """
    slots, measured, progress, _, episode = state
    # Contributions of blended trial seeds that were measured in this env step, as the accuracies.
    credited = np.where(
        (measured.contribution_age == 0) & (slots.stage < Stage.FOSSILIZED.value),
        measured.contribution,
        0.0,
    )
    gain = progress.accuracy - progress.committed_accuracy
    total = np.maximum(credited, 0.0).sum(axis=1)
    values: dict[str, Any] = {
        "action_mask": action_mask,
        "action_valid": progress.last_valid,
        "op": progress.last_op,
        "accuracy": progress.accuracy,
        "loss": progress.loss,
        "committed_accuracy": progress.committed_accuracy,
        "score": scores.score,
        "committed_score": scores.committed_score,
        "contribution": measured.contribution,
        "contribution_valid": measured.has_contribution,
        "stage": slots.stage,
        "alpha": slots.alpha,
        "blueprint": slots.blueprint,
        "parameters": sizes.grown,
        "host_parameters": sizes.host,
        "flops": progress.flops,
        "samples": progress.samples.astype(np.int64),
        "rolled_back": episode.is_rolled_back,
        "flag_parasite": (credited > config.flag_contribution) & (gain < 0)[:, None],
        "flag_attribution": (total > config.flag_contribution) & (total > config.flag_ratio * gain),
        "flag_churn": progress.young_prunes >= config.flag_prunes,
        "gradient_cause": measured.cause.astype(np.int8),
        "instance": episode.instance,
    }
    if regime is not None:
        values["regime"] = regime
    # One allocation for all masks. Each key has its own row, so a write to one changes no other.
    everyone = iter(np.ones((len(values) + len(terms) + 1, len(action_mask)), dtype=bool))
    info: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    for target, arrays in ((info, values), (parts, terms)):
        for name, value in arrays.items():
            target[name], target[f"_{name}"] = value.copy(), next(everyone)
    info["reward_terms"], info["_reward_terms"] = parts, next(everyone)
    for name in ("test_accuracy", "committed_test_accuracy"):
        info[name] = np.where(episode.has_test, getattr(episode, name), 0.0)
        info[f"_{name}"] = episode.has_test.copy()
    return info


def masked_info(info: dict[str, Any], mask: BoolArray) -> dict[str, Any]:
    """Restrict the `_key` masks of an info dictionary to some sub-environments.

    Args:
        info: Info dictionary of a vector environment.
        mask: True for the sub-environments to keep. (num_envs,) bool.

    Returns:
        New dictionary with the same values and new masks.
    """
    result: dict[str, Any] = {}
    for name, value in info.items():
        if isinstance(value, dict):
            result[name] = masked_info(value, mask)
        elif name.startswith("_"):
            result[name] = value & mask
        else:
            result[name] = value
    return result


def member_info(info: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the info dictionary of one sub-environment, without masks.

    Single values are Python's own bool, int and float: Gymnasium's `SyncVectorEnv` and
    `NumpyToTorch` do not accept NumPy's bool.

    Args:
        info: Info dictionary of a vector environment.
        index: Index of the sub-environment.
    """
    result: dict[str, Any] = {}
    for name, value in info.items():
        has_it = info.get(f"_{name}")  # Gymnasium's wrappers add nested keys without one.
        if name.startswith("_") or (has_it is not None and not has_it[index]):
            continue
        if isinstance(value, dict):
            result[name] = member_info(value, index)
        else:
            # `final_obs` holds objects, which are not NumPy scalars.
            own = value[index]
            result[name] = own.item() if isinstance(own, np.generic) else own
    return result
