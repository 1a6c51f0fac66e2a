"""Rendering of an episode as an image (`draw`) and as text (`describe`).

Both render the `History` of one sub-environment. They use neither pyplot nor rcParams nor random
numbers, so they change no global state.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from esper_env.config import Op, Stage
from esper_env.envs.history import Course, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT, WIDTH = 600, 960
"""Size of every image [pixels]."""
DPI = 150
"""Resolution. An image is 6.4 x 4 inches, as wide as a text column; fonts are 6 to 7.5 points."""
RENDER_MODES = ("rgb_array", "ansi")
"""Values of `render_mode` besides None."""
RENDER_FPS = 10
"""Frames per second of a video; a frame is an env step."""

STAGE_COLORS = {
    Stage.DORMANT: "#f0f0f0",
    Stage.GERMINATED: "#f0e442",
    Stage.TRAINING: "#56b4e9",
    Stage.BLENDING: "#e69f00",
    Stage.HOLDING: "#cc79a7",
    Stage.FOSSILIZED: "#009e73",
    Stage.EMBARGOED: "#a6a6a6",
}
"""Colors that color-blind readers can distinguish, with grays for slots without a seed.

Source: Okabe and Ito (2008).
"""
STAGE_LETTERS = ".gtbhFx"
"""One character per stage, in the order of `Stage`."""
PARKED_LETTER, ROLLBACK_LETTER = "p", "!"
"""Characters of a parked seed, whatever its stage, and of an env step with a rollback."""
OP_MARKERS = {Op.GERMINATE: ("^", 5.0), Op.PRUNE: ("X", 5.2), Op.FOSSILIZE: ("D", 4.0)}
"""Shape and size [points] of the marker of an op. Other ops are visible in colors and alpha."""

_LIVE_COLOR, _COMMITTED_COLOR, _ROLLBACK_COLOR = "#000000", "#0072b2", "#d55e00"
_SIZE_COLOR, _FONT = "#707070", "DejaVu Sans"
_LEFT, _RIGHT = 0.075, 0.935
_PANELS = {"lanes": (0.5, 0.35), "accuracy": (0.295, 0.15), "score": (0.085, 0.15)}
"""Bottom and height of each panel. Like `_LEFT` and `_RIGHT` they are shares of the image size."""
_KEYS = {"live": 0.687, "committed": 0.809}
"""Left end of the curve names above each panel, as a share of the image width."""
_NAME_ROWS = 17
"""Height of the strip for blueprint names above the bar of a lane [pixels]."""
_LANE_CHARACTERS = 108
"""Number of characters that fit into the width of a lane."""
_TINT = 0.38
"""Strength of a stage's color above the level of alpha, 0 to 1."""


class Frame(NamedTuple):
    """Quantities that determine the axes of an image."""

    num_slots: int
    """Number of slots of the host."""
    last_step: int
    """Length of the episode [env steps]."""
    score_floor: float
    """Lower limit of the score axis [accuracy]."""
    size_top: int
    """Upper limit of the size axis [doublings of the host]."""

    @property
    def bar_rows(self) -> int:
        """Height of the bar of a lane, without the strip for names [pixels]."""
        return max(1, int(HEIGHT * _PANELS["lanes"][1]) // self.num_slots - _NAME_ROWS)

    @property
    def bar_top(self) -> float:
        """Distance of the bar from the top of its lane [lanes]."""
        return _NAME_ROWS / (_NAME_ROWS + self.bar_rows)


def draw(
    history: History,
    member: int,
    *,
    blueprints: Sequence[str],
    host_parameters: int,
    instance: str | None = None,
) -> npt.NDArray[np.uint8]:
    """Draw the current episode of one sub-environment: slots, accuracy and score over env steps.

    Images of the same history are bitwise the same. The axes span the whole episode. During an
    episode only the lower limit of the score and the upper limit of the size can change.

    Args:
        history: Recorded rows, at least one of the sub-environment.
        member: Index of the sub-environment.
        blueprints: Names of the registered blueprints, in order.
        host_parameters: Number of parameters of the host.
        instance: Name of the instance; None if the set has only one.

    Returns:
        Image. (HEIGHT, WIDTH, 3) uint8.
    """
    course, last_step = history.course(member), history.rows.stage.shape[1] - 1
    lowest = float(min(course.score.min(), course.committed_score.min(), 0))
    doublings = np.log2(1 + course.parameters / host_parameters)
    frame = Frame(
        num_slots=history.rows.stage.shape[2],
        last_step=last_step,
        score_floor=float(np.floor(lowest * 4)) / 4,
        size_top=max(1, int(np.ceil(doublings.max()))),
    )
    # The background is cached as an image, so only curves and names are drawn for each image.
    figure, panels = _blank_figure(frame)
    figure.figimage(_background(frame), zorder=-1)
    for axes in panels.values():
        axes.set_axis_off()
        for step in np.nonzero(course.rolled_back)[0].tolist():
            axes.axvline(step, color=_ROLLBACK_COLOR, linewidth=1, linestyle=":")
    _draw_lanes(panels["lanes"], course, blueprints, frame)
    # The size axis overlays the score axis: 1 x host is at `score_floor`, 2**size_top x host at 1.
    share = frame.score_floor + doublings / frame.size_top * (1 - frame.score_floor)
    steps = np.arange(len(share))
    panels["score"].fill_between(
        steps, share, frame.score_floor, step="mid", color="black", alpha=0.13, linewidth=0
    )
    for name, live, committed in (
        ("accuracy", course.accuracy, course.committed_accuracy),
        ("score", course.score, course.committed_score),
    ):
        # Not clipped, because clipping would halve the width of a line at the limit 1.
        style: dict[str, Any] = {"linewidth": 1.1, "clip_on": False}
        panels[name].plot(steps, live, color=_LIVE_COLOR, **style)
        panels[name].plot(steps, committed, "--", color=_COMMITTED_COLOR, **style)
        panels[name].plot(steps[-1], live[-1], "o", markersize=2.5, color=_LIVE_COLOR, **style)
        _write(figure, _KEYS["live"], _above(name), f"live {live[-1]:.3f}")
        _write(figure, _KEYS["committed"], _above(name), f"committed {committed[-1]:.3f}")
    title = f"env step {len(steps) - 1} of {last_step}:  {_op_text(course)}"
    _write(figure, _LEFT, 0.965, title, size=7.5, weight="bold")
    sizes = f"{host_parameters:,} host + {course.parameters[-1]:,} grown parameters"
    sizes += "" if instance is None else f"  |  instance {instance}"
    _write(figure, _RIGHT, 0.965, sizes, size=7, ha="right")
    return _rasterize(figure)


def describe(
    history: History,
    member: int,
    *,
    blueprints: Sequence[str],
    host_parameters: int,
    instance: str | None = None,
) -> str:
    """Describe the current episode of one sub-environment: a summary line and a line per slot.

    The line of a slot has one character per env step, a letter of `STAGE_LETTERS`,
    `PARKED_LETTER` or `ROLLBACK_LETTER`. Future env steps are blank, so all descriptions of an
    episode have the same layout.

    Args:
        history: Recorded rows, at least one of the sub-environment.
        member: Index of the sub-environment.
        blueprints: Names of the registered blueprints, in order.
        host_parameters: Number of parameters of the host.
        instance: Name of the instance; None if the set has only one.

    Returns:
        Lines separated by newlines, without a final newline.
    """
    course, last_step = history.course(member), history.rows.stage.shape[1] - 1
    step, width = len(course.op) - 1, len(str(last_step))
    lines = [
        f"env step {step:{width}}/{last_step}"
        f"  accuracy {course.accuracy[-1]:.3f} (committed {course.committed_accuracy[-1]:.3f})"
        f"  score {course.score[-1]:.3f} (committed {course.committed_score[-1]:.3f})"
        f"  parameters {host_parameters} + {course.parameters[-1]}"
        f"  {_op_text(course)}" + ("" if instance is None else f"  instance {instance}")
    ]
    # (steps, num_slots) stages -> (steps, num_slots) letters; a rollback marks all slots
    letters = np.array(list(STAGE_LETTERS))[course.stage]
    is_placed = np.isin(course.stage, (Stage.HOLDING, Stage.FOSSILIZED))
    letters[is_placed & (course.alpha == 0)] = PARKED_LETTER
    letters[course.rolled_back] = ROLLBACK_LETTER
    for slot in range(course.stage.shape[1]):
        lane = "".join(letters[:, slot]).ljust(last_step + 1)
        index = course.blueprint[-1, slot]
        name = blueprints[index] if index >= 0 else "-"
        stage = Stage(course.stage[-1, slot]).name
        lines.append(f"slot {slot} |{lane}| {stage:10} {course.alpha[-1, slot]:.2f} {name}")
    return "\n".join(lines)


def _draw_lanes(axes: Axes, course: Course, blueprints: Sequence[str], frame: Frame) -> None:
    """Draw a lane for each slot: a strip for blueprint names and a bar.

    The bar shows the stages as colors. It is pale above the level of alpha, so that of a parked
    seed is all pale.
    """
    end, bar_rows = len(course.stage), frame.bar_rows
    colors = np.array([_rgb(color) for color in STAGE_COLORS.values()])
    # A slot without a seed has alpha 0. Its bar is not pale, but has its color in full height.
    is_tinted = ~np.isin(list(STAGE_COLORS), (Stage.DORMANT, Stage.EMBARGOED))
    tints = np.where(is_tinted[:, None], _tint(colors), colors)
    level = (np.arange(bar_rows, 0, -1) - 0.5) / bar_rows
    # (steps, num_slots) -> (num_slots, 1, steps), to broadcast over the rows of a bar
    stage, alpha = course.stage.T[:, None], course.alpha.T[:, None]
    is_below = (alpha > level[:, None])[..., None]
    lanes = np.ones((frame.num_slots, _NAME_ROWS + bar_rows, end, 3))
    lanes[:, _NAME_ROWS:] = np.where(is_below, colors[stage], tints[stage])
    # (num_slots, rows of a lane, steps, 3) -> (num_slots * rows of a lane, steps, 3)
    axes.imshow(
        lanes.reshape(-1, end, 3),
        extent=(-0.5, end - 0.5, frame.num_slots, 0),
        aspect="auto",
        interpolation="nearest",
    )
    middle = (1 + frame.bar_top) / 2
    for op, (marker, size) in OP_MARKERS.items():
        steps = np.nonzero(course.op == op)[0]
        axes.plot(
            steps, course.op_slot[steps] + middle, marker, color="black", markersize=size,
            markeredgecolor="white", markeredgewidth=0.5,
        )  # fmt: skip
    width = frame.last_step + 1
    for slot in range(frame.num_slots):
        births = np.nonzero((course.op == Op.GERMINATE) & (course.op_slot == slot))[0].tolist()
        # A name is cut where the next one begins. The last one may extend into the margin.
        for birth, following in zip(births, [*births, 1.06 * width][1:], strict=True):
            room = int((following - birth) / width * _LANE_CHARACTERS)
            index = course.blueprint[birth, slot]
            if index >= 0 and room >= 4:
                name = blueprints[index]
                name = name if len(name) <= room else name[: room - 1] + "."
                axes.text(birth - 0.5, slot + 0.75 * frame.bar_top, name, size=6, family=_FONT)


@functools.lru_cache(maxsize=64)
def _background(frame: Frame) -> npt.NDArray[np.uint8]:
    """Draw all that images with the same axes share: axes, labels, grid and legend.

    It is cached, because it takes most of the time of an image.
    """
    from matplotlib.lines import Line2D

    figure, panels = _blank_figure(frame)
    for name, axes in panels.items():
        axes.spines[["top", "right"]].set_visible(False)
        _style_ticks(axes, "black")
        axes.tick_params(axis="x", labelbottom=name == "score")
        if name == "lanes":
            continue
        axes.set_yticks((0, 0.5, 1))
        axes.grid(axis="y", color="#cccccc", linewidth=0.5)
        axes.set_ylabel(name, size=7, family=_FONT)
        for key, line, color in (("live", "-", _LIVE_COLOR), ("committed", "--", _COMMITTED_COLOR)):
            # The line of a key is drawn left of its name, which `draw` writes with the value.
            ends = np.array([-0.038, -0.008]) + _KEYS[key]
            figure.add_artist(Line2D(ends, [_above(name)] * 2, ls=line, lw=1.1, color=color))
    lanes, score = panels["lanes"], panels["score"]
    slots = np.arange(frame.num_slots)
    lanes.set_yticks(slots + (1 + frame.bar_top) / 2, [f"slot {slot}" for slot in slots])
    lanes.tick_params(axis="y", length=0)
    lanes.spines["left"].set_visible(False)
    score.set_xlabel("env step", size=7, family=_FONT, labelpad=1)
    # The size has its own axis on the right of the score panel, with at most five ticks.
    size = score.twinx()
    size.set_ylim(0, frame.size_top)
    stride = -(-frame.size_top // 4)
    ticks = range(0, frame.size_top + 1, stride)
    size.set_yticks(ticks, [f"{2**tick}\u00d7" for tick in ticks])
    size.set_ylabel("size / host", size=7, family=_FONT, color=_SIZE_COLOR, labelpad=2)
    size.spines[["top", "left", "bottom"]].set_visible(False)
    _style_ticks(size, _SIZE_COLOR)
    _draw_legend(figure)
    return _rasterize(figure)


def _draw_legend(figure: Figure) -> None:
    """Draw the legend between title and lanes: a row of stages, a row of ops and other marks."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def patch(color: Any) -> Patch:
        """Return a legend entry for a color."""
        return Patch(facecolor=color, edgecolor="#777777", linewidth=0.4)

    marks: list[Any] = [
        Line2D([], [], lw=0, marker=marker, ms=size, color="black", markeredgecolor="white")
        for marker, size in OP_MARKERS.values()
    ]
    marks.append(Line2D([], [], color=_ROLLBACK_COLOR, lw=1, ls=":"))
    blending = _rgb(STAGE_COLORS[Stage.BLENDING])
    marks.append((patch(blending), patch(_tint(blending))))
    events = [*(op.name.lower() for op in OP_MARKERS), "rollback", "below and above alpha"]
    stages = [stage.name.lower() for stage in STAGE_COLORS]
    for handles, labels, top in (
        ([patch(color) for color in STAGE_COLORS.values()], stages, 0.935),
        (marks, events, 0.895),
    ):
        figure.legend(
            handles, labels, loc="upper left", bbox_to_anchor=(_LEFT, top), ncols=len(handles),
            frameon=False, borderaxespad=0, borderpad=0, handlelength=1.4, handletextpad=0.5,
            columnspacing=1.3, prop={"family": _FONT, "size": 6.5},
            handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        )  # fmt: skip


def _blank_figure(frame: Frame) -> tuple[Figure, dict[str, Axes]]:
    """Return a figure, created without pyplot, and its panels with their limits set."""
    from matplotlib.figure import Figure

    figure = Figure((WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    panels = {
        name: figure.add_axes((_LEFT, bottom, _RIGHT - _LEFT, height), facecolor="none")
        for name, (bottom, height) in _PANELS.items()
    }
    limits = ((frame.num_slots, 0), (0, 1), (frame.score_floor, 1))
    for axes, (low, high) in zip(panels.values(), limits, strict=True):
        axes.set(xlim=(-0.5, frame.last_step + 0.5), ylim=(low, high))
    return figure, panels


def _rasterize(figure: Figure) -> npt.NDArray[np.uint8]:
    """Return a figure as an image. (HEIGHT, WIDTH, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    # RGBA -> RGB
    picture = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return picture[..., :3].copy()


def _style_ticks(axes: Axes, color: str) -> None:
    """Set fonts, sizes and colors of the ticks and the frame of axes."""
    axes.tick_params(labelsize=6.5, labelfontfamily=_FONT, length=2, pad=2, width=0.6, colors=color)
    for spine in axes.spines.values():
        spine.set(linewidth=0.6, color=color)


def _write(figure: Figure, x: float, y: float, text: str, size: float = 6.5, **style: Any) -> None:
    """Write text at a position given in shares of the image size."""
    figure.text(x, y, text, size=size, family=_FONT, va="center", **style)


def _above(panel: str) -> float:
    """Return the vertical position of the text above a panel, as a share of the image height."""
    return sum(_PANELS[panel]) + 0.022


def _op_text(course: Course) -> str:
    """Return the op of the last env step, its slot, and a rollback, as text."""
    op, slot = Op(course.op[-1]), course.op_slot[-1]
    text = op.name if op == Op.WAIT else f"{op.name} slot {slot}"
    return text + (", rolled back" if course.rolled_back[-1] else "")


def _rgb(color: str) -> npt.NDArray[np.float64]:
    """Return the components of a color "#rrggbb", 0 to 1. (3,) float64."""
    return np.frombuffer(bytes.fromhex(color[1:]), dtype=np.uint8) / 255


def _tint(color: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return pale versions of colors. (..., 3) float64, 0 to 1."""
    return 1 - _TINT * (1 - color)
