"""The generated part of docs/extending.md: examples that are refused, and what each error says."""

from __future__ import annotations

import textwrap
from typing import Any

from docs.source import registries_as_shipped

REFUSALS = (
    ("The name is taken", 'register_blueprint("norm", lambda c: [Norm(c, zero=True)])'),
    (
        "Not layers of this package",
        'register_blueprint("torch", lambda c: [torch.nn.Conv2d(c, c, 1)])',
    ),
    ("Nothing to learn", 'register_blueprint("empty", lambda c: [Relu()])'),
    ("Another shape", 'register_blueprint("wide", lambda c: [Conv(c, 2 * c, 1, zero=True)])'),
    ("Not the identity at birth", 'register_blueprint("loud", lambda c: [Conv(c, c, 3)])'),
    (
        "A dead gradient",
        'register_blueprint("dead", lambda c: [Conv(c, c, 3), Norm(c, zero=True), Relu()])',
    ),
    (
        "No corner: a tensor that shrinks as the channels grow",
        'register_blueprint("odd", lambda c: '
        "[Conv(c, 32 // c, 1), Conv(32 // c, c, 1, zero=True)])",
    ),
    (
        "No corner: a zero channel that does not stay zero",
        "class Sigmoid(Relu):\n"
        "    def forward(self, x, parameters, buffers, training):\n"
        "        return torch.sigmoid(x)\n\n\n"
        'register_blueprint("sigmoid", lambda c: [Sigmoid(), Conv(c, c, 3, bias=True, zero=True)])',
    ),
    ("A host without blocks", 'register_host("none", channels=())'),
    (
        "A block with the wrong number of channels",
        'register_host("narrow", (4, 8), lambda a, b: [Conv(a, b - 1, 3), Norm(b - 1), Relu()])',
    ),
    (
        "A block that cannot learn",
        'register_host("dead", (4, 8), lambda a, b: [Conv(a, b, 3, zero=True), Relu()])',
    ),
    ("A host that is not registered", 'gym.make("esper_env:Esper-Digits-v0", host="four")'),
    (
        "More blocks than the images can be halved",
        'register_host("deep", channels=(2, 2, 2, 2))\n'
        'gym.make("esper_env:Esper-Digits-v0", host="deep")',
    ),
)
"""What is tried, and code whose last statement raises."""


def refusals() -> str:
    """Run every example that is refused and return code and error."""
    parts = []
    for title, code in REFUSALS:
        error = refusal_of(code)
        text = f"`{type(error).__name__}`: {error}"
        quote = textwrap.fill(text, 98, break_long_words=False, break_on_hyphens=False)
        parts.append(f"**{title}**\n\n```python\n{code}\n```\n\n{textwrap.indent(quote, '> ')}")
    return "\n\n".join(parts)


def refusal_of(code: str) -> Exception:
    """Run code that must be refused, without a trace in the registries."""
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
    raise ValueError(f"this was to be refused, and is not any more:\n{code}")
