"""Every argument of the training script has an effect, or a reason why it is not tested here."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kill_runs import results_of
from esper_agent.ppo_lstm import Args, train
from tests.builders import tiny_config

ELSEWHERE = {
    "env_id": "tests/test_cifar10.py and the examples use other ids",
    "env": "the environment's own settings, see tests/test_env.py",
    "device": "tests/test_resume.py and tests/test_telemetry.py with a GPU",
    "resume": "tests/test_resume.py",
    "track": "tests/test_telemetry.py with the real client",
    "wandb_project": "passed to the client as it is",
    "wandb_entity": "passed to the client as it is; it needs an account",
}
"""Where the arguments that are not changed here are tested."""
CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 2},
    "run_dir": {},
    "total_timesteps": {"total_timesteps": 64},
    "num_envs": {"num_envs": 2},
    "num_steps": {"num_steps": 8},
    "learning_rate": {"learning_rate": 2e-3},
    "anneal_lr": {"anneal_lr": False},
    "gamma": {"gamma": 0.9, "env": tiny_config(gamma=0.9)},
    "gae_lambda": {"gae_lambda": 0.5},
    "group_size": {"group_size": 1},
    "num_minibatches": {"num_minibatches": 1},
    "update_epochs": {"update_epochs": 1},
    "clip_coef": {"clip_coef": 1e-4},
    "ent_coef": {"ent_coef": 0.5},
    "wait_logit": {"wait_logit": 3.0},
    "vf_coef": {"vf_coef": 0.1},
    "max_grad_norm": {"max_grad_norm": 1e-3},
    "clip_groups": {"clip_groups": True},
    "target_kl": {"target_kl": 1e-9},
    "hidden_size": {"hidden_size": 8},
    "recurrent": {"recurrent": False},
    "eval_episodes": {"eval_episodes": 2},
    "eval_every": {"eval_every": 1},
    "checkpoint_minutes": {"checkpoint_minutes": 0.0},
    "keep_checkpoints": {"checkpoint_minutes": 0.0, "keep_checkpoints": 1},
    "telemetry": {"telemetry": "off"},
    "quiet": {"quiet": True},
    "profile": {"profile": 1},
    "profile_stacks": {"profile": 1, "profile_stacks": True},
    "profile_shapes": {"profile": 1, "profile_shapes": True},
}
"""Changes that must make a difference, by argument."""
BESIDE = {"keep_checkpoints": "checkpoint_minutes", "profile_stacks": "profile"}
BESIDE |= {"profile_shapes": "profile"}
"""Arguments that are compared with a run that has another change already."""


@pytest.fixture(name="run", scope="module")
def remember_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Train with the changes for an argument, once; return all that can be seen of it."""
    known: dict[str, dict[str, Any]] = {}

    def seen_of(name: str) -> dict[str, Any]:
        if name not in known:
            directory = tmp_path_factory.mktemp("runs") / (name if name == "run_dir" else "run")
            known[name] = look(directory, CHANGES.get(name, {}))
        return known[name]

    return seen_of


def look(directory: Path, changes: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "env": tiny_config(gamma=0.99), "gamma": 0.99, "num_envs": 4, "num_steps": 6,
        "group_size": 2, "num_minibatches": 2, "update_epochs": 2, "hidden_size": 16,
        "learning_rate": 1e-3, "total_timesteps": 96, "eval_episodes": 0, "run_dir": directory,
        "max_grad_norm": 0.1,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train(Args(**(settings | changes)))
    files = {
        str(p.relative_to(directory)) for p in directory.rglob("*") if "tfevents" not in p.name
    }
    trace = directory / "profile" / "trace.json"
    words = set(re.findall(r"ppo_lstm\.py|Input Dims", trace.read_text() if trace.exists() else ""))
    return results_of(directory) | {
        "directory": directory.name,
        "files": files,
        "trace": words,
        "prints": bool(out.getvalue()),
    }


@pytest.mark.parametrize("name", CHANGES)
def test_every_argument_has_an_effect(name: str, run: Callable[[str], dict[str, Any]]) -> None:
    before, after = run(BESIDE.get(name, "")), run(name)
    assert any(before[part] != after[part] for part in before)


def test_the_same_arguments_make_no_difference(
    run: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    """Otherwise the test above could not fail."""
    assert look(tmp_path / "run", {}) == run("")


def test_no_argument_is_forgotten() -> None:
    assert {field.name for field in dataclasses.fields(Args)} == {*CHANGES, *ELSEWHERE}
