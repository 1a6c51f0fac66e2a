"""The generated block of docs/extending.md: examples that raise an error, with its text."""

from __future__ import annotations

import textwrap
from typing import Any

from docs.source import registries_as_shipped

EXAMPLES = (
    (
        "A name that is already registered",
        'register_blueprint("norm", lambda c: [Norm(c, zero=True)])',
    ),
    (
        "A layer that is not a `Layer`",
        'register_blueprint("torch", lambda c: [torch.nn.Conv2d(c, c, 1)])',
    ),
    ("No parameters", 'register_blueprint("empty", lambda c: [Relu()])'),
    ("A change of shape", 'register_blueprint("wide", lambda c: [Conv(c, 2 * c, 1, zero=True)])'),
    ("A new seed that does not output 0", 'register_blueprint("loud", lambda c: [Conv(c, c, 3)])'),
    (
        "A parameter without a gradient",
        'register_blueprint("dead", lambda c: [Conv(c, c, 3), Norm(c, zero=True), Relu()])',
    ),
    (
        "An output that is not finite in evaluation",
        "class Broken(Relu):\n"
        "    def forward(self, x, parameters, buffers, training):\n"
        "        return x if training else x / 0\n\n\n"
        'register_blueprint("broken", lambda c: [Broken(), Conv(c, c, 3, bias=True, zero=True)])',
    ),
    (
        "A violation of the corner rule: a tensor that shrinks with more channels",
        'register_blueprint("odd", lambda c: '
        "[Conv(c, 32 // c, 1), Conv(32 // c, c, 1, zero=True)])",
    ),
    (
        "A violation of the corner rule: a zero channel that does not stay zero",
        "class Sigmoid(Relu):\n"
        "    def forward(self, x, parameters, buffers, training):\n"
        "        return torch.sigmoid(x)\n\n\n"
        'register_blueprint("sigmoid", lambda c: [Sigmoid(), Conv(c, c, 3, bias=True, zero=True)])',
    ),
    ("A host without blocks", 'register_host("none", channels=())'),
    (
        "A block with a wrong number of channels",
        'register_host("narrow", (4, 8), lambda a, b: [Conv(a, b - 1, 3), Norm(b - 1), Relu()])',
    ),
    (
        "A block without a gradient",
        'register_host("dead", (4, 8), lambda a, b: [Conv(a, b, 3, zero=True), Relu()])',
    ),
    ("A host that is not registered", 'gym.make("esper_env:Esper-Digits-v0", host="four")'),
    (
        "More blocks than the image size allows",
        'register_host("deep", channels=(2, 2, 2, 2))\n'
        'gym.make("esper_env:Esper-Digits-v0", host="deep")',
    ),
)
"""Title and code of each example; the last statement raises."""


def error_examples() -> str:
    """Run every example and return its code and its error."""
    parts = []
    for title, code in EXAMPLES:
        error = error_of(code)
        text = f"`{type(error).__name__}`: {error}"
        quote = textwrap.fill(text, 98, break_long_words=False, break_on_hyphens=False)
        parts.append(f"**{title}**\n\n```python\n{code}\n```\n\n{textwrap.indent(quote, '> ')}")
    return "\n\n".join(parts)


def error_of(code: str) -> Exception:
    """Run code that must raise and return the error; the registries stay unchanged."""
    namespace: dict[str, Any] = {}
    imports = (
        "import gymnasium as gym, torch\n"
        "from esper_env import register_blueprint, register_host\n"
        "from esper_env.population.layers import Conv, Norm, Relu\n"
    )
    with registries_as_shipped():
        try:
            exec(imports + code, namespace)
        except (TypeError, ValueError) as error:
            return error
    raise ValueError(f"expected an error from this code:\n{code}")
