"""Markdown tables, and generated blocks between two marks of a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python docs/generate.py"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in GitHub's Markdown, with the bars inside cells escaped."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def with_generated(text: str, name: str, content: str) -> str:
    """Replace the text between the marks of a generated block.

    Raises:
        ValueError: If a mark is missing.
    """
    start, stop = f"<!-- generated: {name}. {COMMAND} -->", f"<!-- end: {name} -->"
    before, found_start, rest = text.partition(start)
    _, found_stop, after = rest.partition(stop)
    if not found_start or not found_stop:
        raise ValueError(f"expected the lines {start!r} and {stop!r}")
    return f"{before}{start}\n\n{content}\n\n{stop}{after}"
