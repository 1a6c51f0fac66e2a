"""Last column of docs/dev/findings.md: links to the tests that cite a finding."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

FINDING = r"\b(?:(?:SYN|LOOP|PRE|TRN|GRD|TEL)-[A-Z]*\d+|SYN-POS)\b"
TESTS_CELL = "[`test_"
"""Start of the last cell of a finding that is cited by tests."""


def cited_findings(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """Return file and name of the tests that cite each finding in their docstrings."""
    cited: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(folder.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for name in dict.fromkeys(re.findall(FINDING, ast.get_docstring(node) or "")):
                    cited.setdefault(name, []).append((path.name, node.name))
    return cited


def with_cited_tests(text: str, cited: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """Write links to the citing tests into the last cell of each cited finding.

    The rows of other findings stay as they are.

    Raises:
        ValueError: If a cited finding has no row, or if a row links to tests but none cites it.
    """
    lines, missing = text.split("\n"), set(cited)
    for i, line in enumerate(lines):
        row = re.fullmatch(rf"\| ({FINDING}) \| (.*) \| (.*) \|", line)
        if row is None:
            continue
        name, requirement, answer = row.groups()
        if name in cited:
            missing.discard(name)
            answer = "<br>".join(f"[`{test}`](../../tests/{file})" for file, test in cited[name])
            lines[i] = f"| {name} | {requirement} | {answer} |"
        elif answer.startswith(TESTS_CELL):
            raise ValueError(
                f"docs/dev/findings.md: no test cites {name} any more; explain this in its row"
            )
    if missing:
        raise ValueError(f"docs/dev/findings.md: no row for {', '.join(sorted(missing))}")
    return "\n".join(lines)
