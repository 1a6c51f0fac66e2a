"""Mutation testing: each mutant changes the code in one place, and a test should fail.

The script takes a fixed sample of mutants from each area of `AREAS`. The sample is the smallest
hashes of function, operator and source text, so two versions of the code share the mutants of
unchanged code. Each mutant runs in a copy of the checkout, with the test files that cover its area,
up to the first failure.

    python benchmarks/mutants.py --out benchmarks/results/mutants.json
    python benchmarks/mutants.py --checkout ../old --out benchmarks/results/mutants-before.json

The script saves after every mutant. A second call with the same `--out` continues.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True)
class Area:
    """Part of the code and the tests that cover it."""

    files: tuple[str, ...]
    """Source files in any version of the code; missing files are skipped."""
    tests: tuple[str, ...]
    """Test files in any version of the code; missing files are skipped."""
    count: int
    """Number of mutants."""
    compiles: bool
    """Whether the tests run compiled code; otherwise numba is off and loops are plain Python."""


AREAS: dict[str, Area] = {
    "lifecycle": Area(
        ("esper_env/lifecycle.py", "esper_env/growth/lifecycle.py"),
        ("tests/test_lifecycle.py", "tests/test_actions.py"),
        18,
        False,
    ),
    "action space": Area(
        ("esper_env/actions.py", "esper_env/growth/action_space.py"), ("tests/test_actions.py",),
        16, False,
    ),
    "reward": Area(
        (
            "esper_env/rewards/terms.py", "esper_env/rewards/potential.py",
            "esper_env/rewards/presets.py", "esper_env/growth/reward.py",
        ),
        ("tests/test_rewards.py",), 12, True,
    ),
    "rollback": Area(
        ("esper_env/governor.py", "esper_env/growth/rollback.py"), ("tests/test_governor.py",),
        12, True,
    ),
    "contributions": Area(
        ("esper_env/attribution.py", "esper_env/growth/contributions.py"),
        ("tests/test_attribution.py", "tests/test_contributions.py"), 14, False,
    ),
    "kernels": Area(
        (
            "esper_env/population/kernels.py", "esper_env/population/numba_engine/kernels.py",
            "esper_env/population/numba_engine/lanes.py",
        ),
        (
            "tests/test_kernels.py", "tests/test_lanes.py", "tests/test_compiled.py",
            "tests/test_population.py",
        ),
        18, True,
    ),
    "torch engine": Area(
        (
            "esper_env/population/slots.py", "esper_env/population/optimizer.py",
            "esper_env/population/tree.py", "esper_env/population/torch_engine/mixing.py",
            "esper_env/population/torch_engine/sgd.py",
            "esper_env/population/torch_engine/evaluation.py",
        ),
        ("tests/test_slots.py", "tests/test_torch_engine.py", "tests/test_population.py"),
        14, True,
    ),
    "agent": Area(
        ("esper_agent/ppo_lstm.py", "esper_agent/layers.py", "esper_agent/envs.py"),
        ("tests/test_agent_maths.py", "tests/test_agent_training.py"),
        16, True,
    ),
}  # fmt: skip
AGENT_MATHS = {
    "run_lstm", "compute_gae", "subtract_group_baseline", "update", "policy_loss",
    "mean_entropies", "evaluate_actions", "pad_masks", "std", "log_prob", "entropy", "sample",
    "mode", "has_choice", "_legal", "_log_probs", "_encode", "_joint", "_rest_logits",
    "evaluate_rollout", "get_action", "choose", "get_states", "get_next_state",
    "replay", "act", "_choose", "_gumbel", "step_core", "sequence_core", "_value",
}  # fmt: skip
"""Functions of the agent's file to mutate."""

SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.USub: ast.UAdd, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum"}
"""Functions and methods, with their replacement."""

REASONS: dict[str, str] = {
    "0463d69b02d8": "equivalent: `ease` rescales the function, so its numerator cancels",
    "0f30de6a9031": "equivalent: a guard against division by 0 where the result is not used; no "
    "ramp has length 1",
    "0980b35d494a": "equivalent: row 0 of the coalitions is always a live network",
    "0ace2703b352": "a check of an invariant, which no test violates",
    "003121b30ef8": "equivalent: the mask of the slot head is the same for every slot",
    # Of the code before the layout of folders, detected today or no longer there:
    "0161a0a80daf": "relu was tested only behind a norm",
    "04017c85a718": "relu was tested only behind a norm",
    "2299c5fb7764": "no test refilled the window of losses by less than its length",
    "26ff2dbe69c7": "equivalent: nobody reads the losses that were cleared",
    "04bcd114fa9e": "no test had a gradient norm near 1e-6",
    "083b3aed1c92": "a check of an invariant, which no test violates",
    "091f426f2ceb": "tested by rollbacks of whole environments only",
    "0caffb2e47b4": "tested by rollbacks of whole environments only",
    "116a3be06f91": "illegal actions that raise were tested on whole environments only",
    "1648f977d07b": "illegal actions that raise were tested on whole environments only",
    "1f96ce7ae94f": "no test had an index equal to the number of options",
    "595bd087da8c": "scores were tested on whole environments only",
    "06a5f1bd7d82": "equivalent: the mean cancels when advantages are normalized",
}
"""Why no test fails, by name of the mutant. Those of old code may be missing."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure the share of mutants that the tests detect."""

    checkout: Path = Path(__file__).resolve().parent.parent
    """Root of the code to mutate."""
    areas: tuple[str, ...] = tuple(AREAS)
    """Areas to measure."""
    timeout: float = 600.0
    """Time limit of a mutant's tests; beyond it a mutant counts as detected [seconds]."""
    out: Path
    """Result file; mutants in it are not run again."""


@dataclass(frozen=True)
class Mutant:
    """One change in one file."""

    file: str
    function: str
    line: int
    change: str
    source: str
    """Content of the file after the change."""
    name: str
    """Hash that identifies the change in all versions of the code."""


def mutants_of(path: Path, root: Path) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    text = path.read_text()
    seen: dict[str, int] = {}
    for index in range(len(list(_places(ast.parse(text))))):
        tree = ast.parse(text)
        function, node, field = list(_places(tree))[index]
        before = ast.unparse(node)
        line = getattr(node, "lineno", 0)
        _change(tree, node, field)
        after = ast.unparse(node) if field != "delete" else "pass"
        key = f"{function}|{field}|{before}|{after}"
        seen[key] = seen.get(key, 0) + 1
        name = hashlib.sha256(f"{key}|{seen[key]}".encode()).hexdigest()[:12]
        source = ast.unparse(ast.fix_missing_locations(tree))
        yield Mutant(
            str(path.relative_to(root)), function, line, f"{before}  ->  {after}", source, name
        )


def _places(tree: ast.Module) -> Iterator[tuple[str, ast.AST, str]]:
    """Yield function, node and kind of every possible change, in order."""

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST, str]]:
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            function = getattr(node, "name", "lambda")
        if function:
            yield from _changes(node, function)
        for name, value in ast.iter_fields(node):
            # Not in annotations, decorators, defaults and error messages.
            if name in ("annotation", "returns", "decorator_list", "args") and not isinstance(
                node, ast.Call
            ):
                continue
            if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, function)

    yield from visit(tree, "")


def _changes(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST, str]]:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield function, node, "compare"
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.AugAssign)):
        if type(node.op) in SWAPS:
            yield function, node, "operator"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.Invert)):
            yield function, node, "negation"
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield function, node, "constant"
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in CALLS:
            yield function, node, "call"
    is_effect = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_effect or isinstance(node, ast.AugAssign) or _writes_into_array(node):
        yield function, node, "delete"


def _writes_into_array(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)


def _change(tree: ast.AST, node: Any, field: str) -> None:
    """Change a node of the tree in place."""
    if field == "compare":
        node.ops[0] = SWAPS[type(node.ops[0])]()
    elif field == "operator":
        node.op = SWAPS[type(node.op)]()
    elif field == "negation":
        node.op, node.operand = ast.Not(), ast.UnaryOp(ast.Not(), node.operand)
        if isinstance(node.operand.operand, ast.AST):
            _replace(tree, node, node.operand.operand)
    elif field == "constant":
        value = node.value
        node.value = (not value) if isinstance(value, bool) else value + 1
    elif field == "call":
        attribute = "id" if isinstance(node.func, ast.Name) else "attr"
        setattr(node.func, attribute, CALLS[getattr(node.func, attribute)])
    else:
        _replace(tree, node, ast.Pass())


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
            elif isinstance(value, list) and any(item is old for item in value):
                setattr(parent, name, [new if item is old else item for item in value])


def sample(area: Area, root: Path, *, is_agent: bool) -> list[Mutant]:
    """Return the area's fixed sample."""
    found: dict[str, Mutant] = {}
    for file in area.files:
        if (root / file).exists():
            for mutant in mutants_of(root / file, root):
                if not is_agent or mutant.function in AGENT_MATHS:
                    found.setdefault(mutant.name, mutant)
    return sorted(found.values(), key=lambda mutant: mutant.name)[: area.count]


def is_noticed(mutant: Mutant, area: Area, copy: Path, timeout: float) -> tuple[bool, str]:
    """Run the area's tests on a mutant; return whether one fails, and a line of their output."""
    target = copy / mutant.file
    original = target.read_text()
    target.write_text(mutant.source)
    try:
        return run_tests(area, copy, timeout)
    finally:
        target.write_text(original)


def run_tests(area: Area, copy: Path, timeout: float) -> tuple[bool, str]:
    """Run the area's tests; return whether one fails, and a line of their output."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    if not area.compiles:
        environment["NUMBA_DISABLE_JIT"] = "1"
    tests = [test for test in area.tests if (copy / test).exists()]
    processes = str(Path(__file__).with_name("processes.py"))
    code = (
        f"import runpy, sys; runpy.run_path({processes!r})['end_with_parent']({os.getpid()}); "
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, cwd=copy, env=environment, timeout=timeout
        )
        lines = result.stdout.strip().splitlines() or result.stderr.strip().splitlines() or [""]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        return result.returncode != 0, (failed or lines)[0][:200]
    except subprocess.TimeoutExpired:
        return True, f"no end within {timeout:.0f} s"


def main(args: Args) -> None:
    """Run mutants without a result, and save after each."""
    from benchmarks import describe_machine
    from esper_agent.checkpoint import write_file

    known: dict[str, Any] = {}
    if args.out.exists():
        known = {row["name"]: row for row in json.loads(args.out.read_text())["mutants"]}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".git", "runs", ".*_cache")
        shutil.copytree(args.checkout, copy, ignore=ignored)
        for name in args.areas:
            mutants = sample(AREAS[name], copy, is_agent=name == "agent")
            if any(mutant.name not in known for mutant in mutants):
                fails, by = run_tests(AREAS[name], copy, args.timeout)
                if fails:
                    raise RuntimeError(f"{name}: the tests fail without a change: {by}")
            for mutant in mutants:
                row = known.get(mutant.name)
                if row is None:
                    began = time.perf_counter()
                    noticed, by = is_noticed(mutant, AREAS[name], copy, args.timeout)
                    row = {
                        "name": mutant.name, "area": name, "file": mutant.file,
                        "function": mutant.function, "line": mutant.line, "change": mutant.change,
                        "noticed": noticed, "by": by, "seconds": time.perf_counter() - began,
                    }  # fmt: skip
                    print("detected" if noticed else "SURVIVES", name, mutant.function,
                          mutant.change[:100], f"{row['seconds']:.0f} s", flush=True)  # fmt: skip
                if not row["noticed"]:
                    row["reason"] = REASONS.get(mutant.name, "not analyzed")
                rows.append(row)
                noticed_count = sum(r["noticed"] for r in rows)
                summary = {"mutants": len(rows), "noticed": noticed_count}
                content = {"machine": describe_machine(), "summary": summary, "mutants": rows}
                write_file(args.out, [json.dumps(content, indent=1).encode()])
    print(f"{noticed_count} of {len(rows)} mutants detected ({noticed_count / len(rows):.1%})")


if __name__ == "__main__":
    main(tyro.cli(Args))
