"""Pages in docs/ match the code, their examples run and their links have targets."""

from __future__ import annotations

import contextlib
import dataclasses
import doctest
import inspect
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from benchmarks.states import MODES
from docs import environment, error_examples, findings, generate, source, speed, telemetry
from docs.page import COMMAND, ROOT
from esper_agent.telemetry.detectors import DETECTORS
from esper_env import EnvConfig, EsperEnv, Stage
from esper_env.envs.registration import ENVIRONMENTS
from esper_env.growth.lifecycle import TRANSITIONS
from esper_env.growth.reward import TERMS
from esper_env.population.blueprints import CNN_BLUEPRINTS, registered_blueprints
from esper_env.tasks import TASKS
from tests.builders import INFO_KEYS

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
HEADINGS = [
    "Description",
    "Action Space",
    "Observation Space",
    "Rewards",
    "Starting State",
    "Episode End",
    "Information",
    "Rendering",
    "Arguments",
    "Version History",
]
"""Headings of Gymnasium's own environments, in their order."""
COUNTS = {"SYN-C": 7, "SYN-H": 14, "SYN-M": 23, "SYN-G": 7, "TEL-": 21, "GRD-C": 3, "GRD-H": 4}
COUNTS |= {"GRD-L": 5, "GRD-I": 3, "TRN-": 7, "LOOP-": 8, "PRE-": 18}
FINDINGS = {f"{group}{i}" for group, count in COUNTS.items() for i in range(1, count + 1)}
FINDINGS |= {"SYN-POS", "GRD-M1", "GRD-M4", "GRD-M5"}
"""Ids of all findings of the reviews of the predecessor."""


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    with source.registries_as_shipped():
        yield


def environment_page() -> str:
    return (ROOT / "docs/environment.md").read_text()


# ------------------------------------------------------------------ generated pages


def test_every_page_matches_the_code() -> None:
    for path, text in generate.pages().items():
        assert path.read_text() == text, f"{path.name} is out of date; run: {COMMAND}"


def test_check_fails_with_the_command_to_run_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("old")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "pages", lambda: {page: "new"})
    assert generate.main(["--check"]) == 1
    assert "page.md; run: python docs/generate.py" in capsys.readouterr().err
    assert page.read_text() == "old"
    assert generate.main([]) == 0
    assert page.read_text() == "new"
    assert generate.main(["--check"]) == 0


def test_the_page_has_every_name_that_a_user_meets() -> None:
    env = gym.make(environment.DEFAULT_ID).unwrapped
    assert isinstance(env, EsperEnv)
    features = {name.removeprefix("slot_0.") for name in env.observation_names}
    names = {name for name in features if not name.startswith("slot_1.")}
    names |= {field.name for field in dataclasses.fields(EnvConfig)} | INFO_KEYS
    names |= {*TERMS, *ENVIRONMENTS, *(blueprint.name for blueprint in CNN_BLUEPRINTS)}
    names |= {"device", "render_mode", "autoreset_mode"}
    cells = {cell.strip() for line in environment_page().split("\n") for cell in line.split(" | ")}
    cells = {cell.removeprefix("| ") for cell in cells}
    assert {name for name in names if f"`{name}`" not in cells} == set()
    transitions = {f"{source.name} → {target.name}" for source, target in TRANSITIONS}
    assert transitions <= cells
    assert len(transitions) == sum(" → " in cell and cell.isupper() for cell in cells)


def test_sizes_of_blueprints_are_those_counted_by_hand() -> None:
    """4 to 16 channels and back, 3x3, on 8x8 pixels; then 8 to 32 channels on 4x4."""
    first, second = 4 * 16 * 9, 8 * 32 * 9
    sizes = (
        first + 2 * 16 + first + 4,
        (first + 16 + first) * 64,
        second + 2 * 32 + second + 8,
        (second + 32 + second) * 16,
    )
    cells = " | ".join(f"{size:,}" for size in sizes)
    layers = "3×3 conv C→4C, batch norm, relu, 3×3 conv 4C→C + bias (*zero*)"  # noqa: RUF001
    assert f"| `conv_heavy` | {layers} | {cells} |" in environment_page()


# ------------------------------------------------------------------ incomplete tables


@pytest.mark.parametrize(
    ("name", "value", "missing"),
    [
        ("TRANSITIONS", TRANSITIONS | {(Stage.FOSSILIZED, Stage.DORMANT)}, "FOSSILIZED"),
        ("HEAD_NAMES", (*environment.HEAD_NAMES, "colour"), "colour"),
        ("Op", (*environment.Op, "PAUSE"), "PAUSE"),
        ("INFO_MEANINGS", environment.INFO_MEANINGS | {"weather": "today"}, "weather"),
    ],
)
def test_a_table_that_does_not_match_the_code_raises(
    name: str, value: Any, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, name, value)
    with pytest.raises(ValueError, match=f"does not match .*{missing}"):
        environment.environment_page()


def test_a_field_without_docstring_raises() -> None:
    @dataclasses.dataclass
    class Settings:
        speed: int = 1
        """How fast."""
        colour: str = "red"

    with pytest.raises(ValueError, match=r"Settings\.colour: expected a docstring"):
        source.field_docstrings(Settings)


# ------------------------------------------------------------------ docs/environment.md


def test_the_docstring_has_gymnasiums_headings_and_rendering() -> None:
    docstring = inspect.getdoc(EsperEnv) or ""
    assert re.findall(r"^## (.*)$", docstring, re.M) == HEADINGS


def test_the_example_of_the_docstring_has_the_stated_output() -> None:
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(EsperEnv) or "", {}, "EsperEnv", None, None
    )
    assert len(example.examples) == 4
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0


# ------------------------------------------------------------------ docs/extending.md


def test_the_examples_of_extending_run_and_print_the_stated_output() -> None:
    page = (ROOT / "docs/extending.md").read_text().partition("<!-- generated: errors")[0]
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 7
    namespace: dict[str, Any] = {"__name__": __name__}
    for block in blocks:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block, "docs/extending.md", "exec"), namespace)
        expected = re.findall(r"^print\(.*\)  # (.*)$", block, re.M)
        assert output.getvalue().splitlines() == expected
    names = [blueprint.name for blueprint in registered_blueprints()]
    assert names[len(CNN_BLUEPRINTS) :] == ["pre_norm", "scaled"]
    del gym.registry["Lines-v0"], TASKS["Lines-v0"]


def test_an_example_that_raises_no_error_is_rejected() -> None:
    with pytest.raises(ValueError, match="expected an error"):
        error_examples.error_of('register_blueprint("fine", lambda c: [Norm(c, zero=True)])')
    assert registered_blueprints() == CNN_BLUEPRINTS


# ------------------------------------------------------------------ docs/dev/findings.md


def test_every_finding_has_one_row_with_tests_or_an_answer() -> None:
    page = (ROOT / "docs/dev/findings.md").read_text()
    rows = re.findall(rf"^\| ({findings.FINDING}) \| .+ \| .+ \| (.+) \|$", page, re.M)
    assert sorted(name for name, _ in rows) == sorted(FINDINGS)
    cited = findings.cited_findings(ROOT / "tests")
    assert {name for name, text in rows if text.startswith(findings.TESTS_CELL)} == set(cited)


def test_findings_are_read_from_the_docstrings_of_tests(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text(
        'def test_one():\n    """Findings SYN-C1, LOOP-2 and SYN-C1."""\n\n'
        'def test_two():\n    """Finding SYN-POS."""\n    # PRE-1\n\n'
        'def helper():\n    """PRE-2."""\n'
    )
    one, two = ("test_a.py", "test_one"), ("test_a.py", "test_two")
    expected = {"SYN-C1": [one], "LOOP-2": [one], "SYN-POS": [two]}
    assert findings.cited_findings(tmp_path) == expected


def test_only_rows_of_cited_findings_are_written() -> None:
    rows = "| PRE-1 | a | b | Not yet. |\n| PRE-2 | a | b | Absent. |"
    text = findings.with_cited_tests(rows, {"PRE-1": [("test_a.py", "test_one")]})
    expected = (
        "| PRE-1 | a | b | [`test_one`](../../tests/test_a.py) |\n| PRE-2 | a | b | Absent. |"
    )
    assert text == expected
    with pytest.raises(ValueError, match="no test cites PRE-1 any more"):
        findings.with_cited_tests(text, {})
    with pytest.raises(ValueError, match="no row for PRE-3"):
        findings.with_cited_tests(rows, {"PRE-3": [("test_a.py", "test_one")]})


# ------------------------------------------------------------------ links


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_relative_links_have_targets(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(file.read_text()), link


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_linked_tests_exist(path: Path) -> None:
    for name, target in re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", path.read_text()):
        assert f"def {name}(" in (path.parent / target).read_text(), name


def anchors(markdown: str) -> set[str]:
    """Return the anchors that GitHub creates for headings."""
    titles = re.findall(r"^#+ (.*)$", markdown, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ------------------------------------------------------------------ measurements


def test_a_target_is_met_only_if_the_measured_value_is_on_its_side() -> None:
    """Synthetic results: 64 members with seeds are slower than 16, and one agent is too slow."""
    rows = [
        {
            "num_envs": count,
            "mode": mode,
            "ratio_median": 12.0,
            "env_steps_per_second": 10.0 * count,
            "share_of_matrix_rate": 0.1 if (count, mode) == (64, "mix") else 0.2,
            "share_outside_training_and_evaluation": 0.05,
        }
        for count in (16, 64)
        for mode in MODES
    ]
    sides = [
        {"num_envs": 16, "mode": mode, "sides": {"async": {"ratio_median": ratio}}}
        for mode, ratio in (("empty", 4.0), ("mix", 3.9))
    ]
    shares = [
        {"num_envs": count, "inference_share": {"median": 0.04}, "update_share": {"median": share}}
        for count, share in ((16, 0.07), (64, 0.05))
    ]
    training = {"num_envs": 8, "mode": "training", "ratio_median": 1.4}
    text = speed.targets({"rows": rows}, {"rows": sides}, {"rows": [training]}, {"rows": shares})
    missed = [line.split("|")[1].strip() for line in text.splitlines() if line.endswith("| no |")]
    assert missed == [
        "speedup over `AsyncVectorEnv`: digits, 16, mix",
        "speedup over the loop: CIFAR-10 shape, 8, training only",
        "growth of the time per FLOP with the next larger `num_envs`: digits, mix",
        "share of the agent in the time of a training run: 16",
    ]
    assert text.count("| yes |") == 10


def test_reading_shows_a_run_for_each_detector() -> None:
    shown = json.loads((ROOT / "docs/reading/failures.json").read_text())
    assert set(shown) == set(telemetry.FAILURES)
    assert {case["alert"].split("[")[0] for case in shown.values()} == set(DETECTORS)
    pictures = {case["picture"] for case in shown.values()} | {"healthy.png"}
    assert pictures == {path.name for path in (ROOT / "docs/reading").glob("*.png")}
