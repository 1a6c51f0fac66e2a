"""Every argument of the environment with values of wrong kinds: clear errors, nothing changed."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from esper_agent import evaluate, ppo_lstm, report
from esper_agent.checkpoint import load_checkpoint
from esper_agent.networks import load_network
from esper_env import EnvConfig, EsperEnv, EsperVectorEnv
from tests.builders import SMALL, assert_same, make, make_single

PACKAGE = str(Path(__file__).parent.parent / "esper_env")
ODD: tuple[Any, ...] = (
    *(None, True, -1, 1.5, float("nan"), float("inf"), 10**30, 10**400, 1j, "x", "", b"x"),
    *([], [1], [[1], [1, 2]], (), {}, {"x": 1}, {1}, object(), EnvConfig, len),
    *(np.array([1, 2]), np.array("x"), np.array(None), torch.zeros(2), np.datetime64("2026")),
    *(np.nan, np.float32(2.5), np.int64(-3), np.bool_(True)),
)
"""Values of which most fit nowhere."""


def seeds_of(envs: EsperVectorEnv) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Yield the arguments of a vector environment's methods, each with a call that takes it."""
    state = envs.get_state()
    array, tensor = next(iter(state["arrays"])), next(iter(state["tensors"]))
    number = state["np_random"]
    yield "seed", lambda v: envs.reset(seed=v)
    yield "seed", lambda v: envs.reset(seed=[v, v])
    yield "options", lambda v: envs.reset(options=v)
    yield "reset_mask", lambda v: envs.reset(options={"reset_mask": v})
    yield "instance", lambda v: envs.reset(options={"instance": v})
    yield "actions", envs.step
    yield "source_indices", lambda v: envs.fork(v, [0])
    yield "target_indices", lambda v: envs.fork([0], v)
    yield "rng", envs.sample_valid_actions
    yield "state", envs.set_state
    for part in state:
        yield part, lambda v, part=part: envs.set_state({**state, part: v})
    for part, name in (("arrays", array), ("tensors", tensor)):
        changed = state[part]
        yield (
            name,
            lambda v, part=part, name=name, changed=changed: envs.set_state(
                {**state, part: {**changed, name: v}}
            ),
        )
    for key in ("bit_generator", "state"):
        yield (
            "np_random",
            lambda v, key=key: envs.set_state({**state, "np_random": {**number, key: v}}),
        )


def arguments(envs: EsperVectorEnv, env: EsperEnv) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Yield all arguments of the environment, each with a call that takes it."""
    for f in dataclasses.fields(EnvConfig):
        yield f.name, lambda v, name=f.name: EnvConfig(**{name: v})
    for name in ("task", "host", "reward", "device", "autoreset_mode", "render_mode"):
        yield name, lambda v, name=name: EsperVectorEnv(1, **{name: v})
    yield "num_envs", EsperVectorEnv
    for head in envs.heads:
        yield f"heads['{head.name}']", lambda v, n=head.name: EsperVectorEnv(1, heads={n: v})
    yield "seed", lambda v: env.reset(seed=v)
    yield "options", lambda v: env.reset(options=v)
    yield "instance", lambda v: env.reset(options={"instance": v})
    yield "action", env.step
    yield from seeds_of(envs)


def signatures() -> int:
    """Return the number of compiled kernels."""
    modules = [module for name, module in sys.modules.items() if name.startswith("esper_env")]
    kernels = {id(v): v for m in modules for v in vars(m).values() if hasattr(v, "signatures")}
    return sum(len(kernel.signatures) for kernel in kernels.values())


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_wrong_values_of_all_arguments_raise_named_errors_and_change_nothing() -> None:
    envs, env = make(2), make_single()
    envs.reset(seed=0)
    env.reset(seed=0)
    before, compiled = (envs.get_state(), env.get_state()), signatures()
    problems, num_rejected = [], 0
    for name, call in arguments(envs, env):
        for value in ODD:
            try:
                call(value)
            except (TypeError, ValueError) as error:
                num_rejected += 1
                is_own = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)
                text = str(error).replace("made with", "made_with")
                if not is_own or name not in text:
                    problems.append(f"{name}, {value!r}: {error!r}")
            except Exception as error:  # Of another type: the finding.
                problems.append(f"{name}, {value!r}: {error!r}")
            else:  # Some values fit, for example None and 1.5 for some arguments.
                envs.set_state(before[0])
                env.set_state(before[1])
    assert not problems, "\n".join(problems)
    assert num_rejected > 1500
    assert_same((envs.get_state(), env.get_state()), before)
    assert signatures() == compiled > 0
    assert SMALL["batch_size"] == envs.config.batch_size


def agent_arguments() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Yield the arguments of trainings, evaluations and reports, as above.

    A name may have alternatives, as errors of Gymnasium do not name arguments.
    """
    env_id = "Esper-Digits-v0"
    names = {"policies": "agents|policies", "config": "env", "env_id": "env_id|nvironment"}
    for kind in (ppo_lstm.Args, evaluate.Args, report.Args):
        for f in dataclasses.fields(kind):
            yield (
                names.get(f.name, f.name),
                lambda v, kind=kind, name=f.name: kind(**{name: v}),
            )
    policies = {"never-grow": evaluate.make_policy("never-grow")}
    settings = {"policies": policies, "env_id": env_id, "config": EnvConfig(**SMALL), "episodes": 1}
    for name in ("policies", "env_id", "config", "episodes", "seed", "device"):
        yield (
            names.get(name, name),
            lambda v, name=name: evaluate.evaluate_agents(**{**settings, name: v}),
        )
    yield "agents", evaluate.make_policy
    yield "out", evaluate.prepare_output
    yield "directory|checkpoint", lambda v: load_network(v, ppo_lstm.Agent)


def test_wrong_values_of_all_arguments_of_the_agent_raise_named_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # "x" is the name of a folder for some of them.
    problems, num_rejected = [], 0
    for name, call in agent_arguments():
        for value in ODD:
            try:
                call(value)
            except (TypeError, ValueError, OSError, gym.error.Error) as error:
                num_rejected += 1
                if not any(part in str(error) for part in name.split("|")):
                    problems.append(f"{name}, {value!r}: {error!r}")
            except Exception as error:
                problems.append(f"{name}, {value!r}: {error!r}")
    assert not problems, "\n".join(problems)
    assert num_rejected > 900


def files(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the JSON files that are read in a run directory, each with a call that reads it."""
    yield "config.json", lambda: ppo_lstm.load_args(folder)
    yield "config.json", lambda: report.load(folder)
    yield "agent.json", lambda: load_network(folder, ppo_lstm.Agent)
    yield "metrics.jsonl", lambda: report.load(folder)
    yield "events.jsonl", lambda: report.load(folder)
    yield "evaluation.json", lambda: report.load(folder)
    yield "checkpoint.json", lambda: load_checkpoint(folder / "checkpoint.json", {})


CONTENTS = ("", "{", "null", "true", "1", "1.5", "NaN", '"x"', "[]", "[1]", "[[1]]", "{}",
            '{"x": 1}', '{"step": "x"}', "\x00", "\ud800", "1" * 5000)  # fmt: skip
"""Texts that are no such file."""


def test_a_file_with_any_other_content_is_one_error_that_names_it(tmp_path: Path) -> None:
    problems = []
    good = {
        "config.json": '{"env_id": "x", "env": {}}',
        "metrics.jsonl": '{"step": 1}\n',
        "events.jsonl": "",
    }
    for name, read in files(tmp_path):
        for content in CONTENTS:
            for file, text in good.items():
                (tmp_path / file).write_text(text)
            (tmp_path / "evaluation.json").unlink(missing_ok=True)
            end = "\n" if name.endswith("l") else ""
            (tmp_path / name).write_bytes((content + end).encode(errors="surrogatepass"))
            try:
                read()
            except (ValueError, OSError) as error:
                if name not in str(error):
                    problems.append(f"{name}, {content!r}: {error!r}")
            except Exception as error:
                problems.append(f"{name}, {content!r}: {error!r}")
            else:
                problems.append(f"{name}, {content!r}: accepted")
    assert not problems, "\n".join(problems)
