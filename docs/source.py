"""Reads docstrings, fields and signatures from the code."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from esper_env.population import blueprints, hosts
from esper_env.population.blueprints import CNN_BLUEPRINTS


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the docstring of each field of a dataclass, on one line.

    Raises:
        ValueError: If a field has no docstring.
    """
    body = _class_body(cls)
    result = {}
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign):
            continue
        value = following.value if isinstance(following, ast.Expr) else None
        name = ast.unparse(node.target)
        if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
            raise ValueError(f"{cls.__name__}.{name}: expected a docstring after the field")
        result[name] = " ".join(value.value.split())
    return result


def field_types(cls: type) -> dict[str, str]:
    """Return the annotation of each field of a dataclass as source text."""
    nodes = [node for node in _class_body(cls) if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(node.target): ast.unparse(node.annotation) for node in nodes}


def _class_body(cls: type) -> list[ast.stmt]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    return node.body


def first_line(thing: object) -> str:
    """Return the first line of a docstring."""
    docstring = inspect.getdoc(thing)
    if not docstring:
        raise ValueError(f"expected a docstring on {thing!r}")
    return docstring.partition("\n")[0]


def signature(function: Callable[..., Any]) -> str:
    """Return names and defaults of the arguments of a function, without self and types."""
    signature = inspect.signature(function)
    arguments = [
        p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"
    ]
    return str(inspect.Signature(arguments))


def must_cover(what: str, wanted: Iterable[Any], given: Iterable[Any]) -> None:
    """Raise ValueError unless the table explains exactly the entries that exist in the code."""
    missing, extra = set(wanted) - set(given), set(given) - set(wanted)
    if missing or extra:
        raise ValueError(
            f"docs/environment.py does not match {what}: missing {sorted(map(str, missing))}, "
            f"unknown {sorted(map(str, extra))}"
        )


@contextmanager
def registries_as_shipped() -> Iterator[None]:
    """Restore the built-in registries inside the block; discard what is registered there."""
    known, designs = list(blueprints._registry), dict(hosts._registry)
    blueprints._registry[:] = CNN_BLUEPRINTS
    hosts._registry.clear()
    try:
        yield
    finally:
        blueprints._registry[:] = known
        hosts._registry.clear()
        hosts._registry.update(designs)
