"""Who may import whom, and that what the README and the entry points promise works."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from tests.builders import grow, make, waits

ROOT = Path(__file__).parent.parent
ROWS = {
    "base": set(),
    "population": {"base"},
    "tasks": {"base", "population"},
    "growth": {"base", "population", "tasks"},
    "envs": {"base", "population", "tasks", "growth"},
    "testing": set(),
}
"""The folders that each folder may import; "base" is `config`, `rng` and `jit`."""
AGENT_ROWS = {
    "envs": set(),
    "arguments": set(),
    "checkpoint": set(),
    "command_line": set(),
    "layers": set(),
    "networks": {"checkpoint"},
    "baselines": set(),
    "in_service": {"baselines"},
    "evaluate": {
        *("arguments", "envs", "checkpoint", "command_line", "baselines", "telemetry.display")
    },
    "telemetry.metrics": set(),
    "telemetry.events": set(),
    "telemetry.gradients": set(),
    "telemetry.activations": set(),
    "telemetry.writers": set(),
    "telemetry.profiler": set(),
    "telemetry.display": {"command_line", "telemetry.events"},
    "telemetry.detectors": {"telemetry.events", "telemetry.metrics"},
    "telemetry.environment": {"telemetry.events", "telemetry.metrics"},
    "telemetry.reference": {"baselines", "envs"},
    "telemetry.training": {f"telemetry.{n}" for n in ("activations", "gradients", "metrics")},
    "telemetry.recorder": {
        *("telemetry.detectors", "telemetry.environment", "telemetry.events", "telemetry.metrics"),
        *("telemetry.reference", "telemetry.training"),
    },
    "run": {
        *("arguments", "checkpoint", "command_line", "networks"),
        *("telemetry.events", "telemetry.writers"),
    },
    "ppo_lstm": {
        *("arguments", "envs", "checkpoint", "command_line", "layers", "networks"),
        *("baselines", "evaluate", "run", "telemetry.display", "telemetry.gradients"),
        *("telemetry.metrics", "telemetry.profiler", "telemetry.recorder", "telemetry.training"),
    },
    "report": {"arguments", "checkpoint", "command_line", "evaluate", "telemetry.metrics"},
    "__init__": set(),
    "telemetry.__init__": set(),
}
"""The modules that each module of the agent may import."""
BASE = {"config", "rng", "jit"}
ENTRY = {"__init__", "sb3"}
"""Modules that only re-export names."""
ORDER = ("base", "population", "tasks", "growth", "envs")
"""The rows from the lowest to the highest: a step calls down."""
MAX_CALLS, MAX_CHANGES = 100, 30
"""Python calls of one env step, and how often the file changes from one call to the next."""
MAX_PRIVATE = 20
"""Uses of private names of this project in all tests; `debug_state` shows the rest."""
OWN = {"esper_env", "esper_agent", "benchmarks", "docs"}
RECORD = {"_fields", "_asdict", "_replace"}
"""Public names of named tuples."""
ALLOWED_LIBRARIES = {"gymnasium": {"envs", "testing"}, "torch": {"population", "tasks", "envs"}}
"""The only folders that may import these libraries."""


def imports_of(path: Path) -> set[str]:
    """Return dotted names of everything a file imports, deferred imports included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def row_of(name: str) -> str:
    """Return the row of the table that a dotted name below `esper_env` belongs to."""
    part = name.split(".")[1]
    return "base" if part in BASE else part


@pytest.mark.parametrize(
    "path", sorted((ROOT / "esper_env").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_environment_files_import_only_what_their_row_may(path: Path) -> None:
    own = row_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    imports = imports_of(path)
    assert not any(name.split(".")[0] in ("esper_agent", "benchmarks") for name in imports)
    if own in ENTRY:
        return
    rows = {row_of(name) for name in imports if name.startswith("esper_env.")}
    assert rows - {own} <= ROWS[own]
    roots = {name.split(".")[0].replace("torchvision", "torch") for name in imports}
    for library, allowed in ALLOWED_LIBRARIES.items():
        assert library not in roots or own in allowed, library


def module_of(parts: list[str]) -> str:
    """Return the name of a module of the agent in the table, given the parts of a dotted name."""
    return ".".join(parts[: 2 if parts[0] == "telemetry" else 1])


@pytest.mark.parametrize("path", sorted((ROOT / "esper_agent").rglob("*.py")), ids=lambda p: p.name)
def test_agent_files_import_only_what_their_row_may_and_public_names(path: Path) -> None:
    import esper_env

    own = module_of(list(path.relative_to(ROOT / "esper_agent").with_suffix("").parts))
    for name in imports_of(path):
        root, *rest = name.split(".")
        assert root != "esper_env" or ".".join(rest) in ("", *esper_env.__all__), name
        assert root != "esper_agent" or module_of(rest) in AGENT_ROWS[own], name
    tree = ast.parse(path.read_text())
    private = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    ]
    assert private == []


@dataclass(frozen=True)
class Call:
    """A call of one function of `esper_env` by another."""

    caller: str
    """File of the caller, relative to the package."""
    file: str
    """File of the function."""
    function: str


@pytest.fixture(scope="module")
def calls() -> list[Call]:
    """Profile a step in which four sub-environments with seeds wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    envs = make(4, episode_steps=60)
    envs.reset(seed=0)
    for slot in range(2):
        grow(envs, slot)
    envs.step(waits(4))
    package = str(ROOT / "esper_env") + "/"
    stack: list[str] = [""]
    found: list[Call] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if not path.startswith(package):
            return
        if event == "call":
            found.append(Call(stack[-1], path.removeprefix(package), frame.f_code.co_name))
            stack.append(found[-1].file)
        elif event == "return":
            stack.pop()

    actions = waits(4)
    sys.setprofile(profile)
    envs.step(actions)
    sys.setprofile(None)
    torch.set_num_threads(before)
    return found


def test_one_step_runs_down_the_rows_in_few_calls(calls: list[Call]) -> None:
    files = [call.file for call in calls]
    assert len(calls) <= MAX_CALLS, "\n".join(files)
    assert len(visits_of(calls)) - 1 <= MAX_CHANGES, "\n".join(files)
    height = {path: ORDER.index(row_of("esper_env." + path.replace("/", "."))) for path in files}
    assert set(height.values()) >= {1, 2, 3, 4}, "every row above the base takes part"
    assert [call for call in calls[1:] if height[call.caller] < height[call.file]] == []


def test_the_architecture_page_lists_the_calls_of_a_step(calls: list[Call]) -> None:
    visits = visits_of(calls)
    width = max(len(file) for file, _ in visits)
    block = "\n".join(f"{file:{width}}  {function}" for file, function in visits)
    page = (ROOT / "docs/dev/architecture.md").read_text()
    assert f"```text\n{block}\n```" in page, f"expected on the page:\n{block}"


def visits_of(calls: list[Call]) -> list[tuple[str, str]]:
    """Return each change of file, with the first function called there."""
    groups = itertools.groupby(calls, key=lambda call: call.file)
    return [(file, next(own).function) for file, own in groups]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("test_*.py")), ids=lambda p: p.name)
def test_test_modules_share_builders_and_not_each_other(path: Path) -> None:
    assert not any(name.startswith("tests.test_") for name in imports_of(path))


def private_names(path: Path) -> list[str]:
    """Return the private names of this project that a file uses, one entry per use."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "pickle"):
            found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in OWN:
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "setattr":
            strings = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            found += [str(value).split(".")[-1] for value in strings]
    return [n for n in found if n.startswith("_") and not n.startswith("__") and n not in RECORD]


def test_tests_use_few_private_names() -> None:
    used = {path.name: private_names(path) for path in sorted((ROOT / "tests").glob("*.py"))}
    assert sum(map(len, used.values())) <= MAX_PRIVATE, used


def test_exported_names_are_those_of_the_design() -> None:
    import esper_env

    expected = {"Host", "InstanceRanges", "make_splits", "register_task"}
    expected |= {"EsperEnv", "EsperVectorEnv", "EnvConfig", "Op", "Stage", "ActionHead"}
    expected |= {"GradientCause"}
    expected |= {"JointAction", "JointActionVector", "register_blueprint", "register_host"}
    expected |= {"MaskInObservation", "MaskInObservationVector", "check_vector_env"}
    assert set(esper_env.__all__) == expected


def test_the_readmes_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    example = next(block for block in blocks if "gym.make(" in block)
    assert len(example.strip().splitlines()) <= 12
    result = subprocess.run(
        [sys.executable, "-c", example], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.startswith("committed score ")


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "esper_agent.ppo_lstm"],
        ["esper_agent/ppo_lstm.py"],
        ["-m", "esper_agent.evaluate"],
    ],
    ids=lambda c: c[-1],
)
def test_entry_points_explain_themselves(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, *command, "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "--env-id" in result.stdout


SCRIPTS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()
)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", SCRIPTS)
def test_benchmarks_explain_themselves(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    assert caught.value.code == 0
    assert "--out" in capsys.readouterr().out
