"""The info dictionary: copies in NumPy arrays only, with Gymnasium's `_key` masks."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper_env.config import BoolArray, FloatArray
from esper_env.growth.simulation import Simulation


def build_info(
    sim: Simulation, action_mask: BoolArray, terms: dict[str, FloatArray]
) -> dict[str, Any]:
    """Describe the present state of all members.

    Args:
        sim: The members.
        action_mask: Marginal masks of the next actions. (num_envs, sum(nvec)).
        terms: Weighted terms of the last reward. (num_envs,) each.

    Returns:
        Arrays of (num_envs, ...), and for each key a mask of the members that have it: all,
        except that test accuracies exist at the end of an episode only.
    """
    state, measured, progress, standing = sim.state, sim.measured, sim.progress, sim.standing
    values: dict[str, Any] = {
        "action_mask": action_mask,
        "action_valid": progress.last_valid,
        "op": progress.last_op,
        "accuracy": progress.accuracy,
        "loss": progress.loss,
        "committed_accuracy": progress.committed_accuracy,
        "score": standing.score,
        "committed_score": standing.committed_score,
        "contribution": measured.contribution,
        "contribution_valid": measured.has_contribution,
        "stage": state.stage,
        "alpha": state.alpha,
        "blueprint": state.blueprint,
        "parameters": sim.sizes.grown,
        "host_parameters": sim.sizes.host,
        "flops": progress.flops,
        "samples": progress.samples,
        "rolled_back": sim.is_rolled_back,
        "instance": sim.instance,
    }
    # One array for all masks; each key gets a row of its own.
    everyone = iter(np.ones((len(values) + len(terms) + 1, len(sim.instance)), dtype=bool))
    info: dict[str, Any] = {}
    for name, value in values.items():
        info[name], info[f"_{name}"] = value.copy(), next(everyone)
    info["samples"] = progress.samples.astype(np.int64)
    parts: dict[str, Any] = {}
    for name, value in terms.items():
        parts[name], parts[f"_{name}"] = value.copy(), next(everyone)
    info["reward_terms"], info["_reward_terms"] = parts, next(everyone)
    for name, value in (
        ("test_accuracy", sim.test_accuracy),
        ("committed_test_accuracy", sim.committed_test_accuracy),
    ):
        info[name] = np.where(sim.has_test, value, 0.0)
        info[f"_{name}"] = sim.has_test.copy()
    return info


def masked_info(info: dict[str, Any], mask: BoolArray) -> dict[str, Any]:
    """Restrict the `_key` masks of an info dictionary to some members."""
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
    """Return what a vector info has for one member, without masks."""
    result: dict[str, Any] = {}
    for name, value in info.items():
        has_it = info.get(f"_{name}")  # Gymnasium's own wrappers leave it out in nested parts.
        if name.startswith("_") or (has_it is not None and not has_it[index]):
            continue
        result[name] = member_info(value, index) if isinstance(value, dict) else value[index]
    return result
