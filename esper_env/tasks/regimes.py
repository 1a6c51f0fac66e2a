"""Regimes: hidden kinds of problems that an episode consists of, and when they change.

The *course* of an episode says which kind of problem is in force at each env step, and which
classes and labels the kinds of this episode have. It is a function of the episode's random stream
alone, so it is not part of the state. Env step t trains on the kind at t. The evaluation after it
belongs to the kind at t + 1, so scores and observations are of the data that come next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from esper_env.config import BoolArray, FloatArray, IntArray
from esper_env.jit import entry_point, inlined
from esper_env.population.interface import Exam
from esper_env.rng import KeyArray, Stream, make_key, uniform
from esper_env.tasks.instances import images_in_use


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of problem. Pairs are the smallest and the largest number; an episode samples one."""

    name: str
    """Name of the kind."""
    num_classes: tuple[int, int] | None = None
    """Number of classes in use; None for all. Kinds of an episode use the first classes of the same
    random order, so a kind with more classes has all classes of one with fewer."""
    distortion: int = 0
    """Level of distortion of the images; the data of a task have the levels 0, 1, ..."""
    swapped_pairs: tuple[int, int] = (0, 0)
    """Number of pairs of classes in use whose labels are exchanged."""
    label_noise: float = 0.0
    """Share of wrong training labels, unless the instance has a larger one."""


@dataclass(frozen=True, kw_only=True)
class Regimes:
    """The kinds of problems of a task, and how they follow each other in an episode."""

    kinds: tuple[Kind, ...]
    """Kinds of problems."""
    order: Literal["cycle", "sequence"] = "cycle"
    """Start with a random kind and cycle through all, or start with the first and end with the
    last."""
    dwell: tuple[int, float] | None = None
    """Smallest and mean time until the next kind [env steps], geometric above the smallest one;
    None for one kind in the whole episode."""
    ramp_steps: int = 0
    """Env steps of a change in which the images are a mixture of both kinds; 0 changes at once."""

    def __post_init__(self) -> None:
        """Check the values."""
        if not self.kinds:
            raise ValueError("kinds: expected at least one kind, got none")
        if self.dwell is not None and not 1 <= self.dwell[0] <= self.dwell[1]:
            raise ValueError(f"dwell: expected 1 <= smallest <= mean, got {self.dwell}")
        if self.ramp_steps < 0:
            raise ValueError(f"ramp_steps: expected at least 0, got {self.ramp_steps}")


class Course(NamedTuple):
    """Courses of m episodes of T env steps, with K kinds and C classes."""

    kind: IntArray
    """Index of the kind in force before each env step, and after the last. (m, T + 1) int64."""
    kind_before: IntArray
    """Kind before the latest change. (m, T + 1) int64."""
    share: FloatArray
    """Share of the images that belong to `kind`; the rest belong to `kind_before`. (m, T + 1)."""
    has_class: BoolArray
    """Whether a class is in use. (m, K, C) bool."""
    label: IntArray
    """Label of the images of each class. (m, K, C) int64."""
    noise: FloatArray
    """Share of wrong training labels. (K,) float64."""
    level: IntArray
    """Level of distortion. (K,) int64."""

    @classmethod
    def empty(cls, members: int, steps: int, kinds: int, classes: int) -> Course:
        """Return courses that are all 0, of the given sizes."""
        at_step, of_kind = (members, steps + 1), (members, kinds, classes)
        return cls(
            np.zeros(at_step, dtype=np.int64),
            np.zeros(at_step, dtype=np.int64),
            np.zeros(at_step),
            np.zeros(of_kind, dtype=bool),
            np.zeros(of_kind, dtype=np.int64),
            np.zeros(kinds),
            np.zeros(kinds, dtype=np.int64),
        )

    def of(self, rows: IntArray) -> Course:
        """Return the courses of some episodes."""
        return self._replace(
            kind=self.kind[rows],
            kind_before=self.kind_before[rows],
            share=self.share[rows],
            has_class=self.has_class[rows],
            label=self.label[rows],
        )


class ClassIndex(NamedTuple):
    """Images of a split by instance and class: ranges of `order`."""

    order: IntArray
    """Indices of the images in use, sorted by class. (instances, images) int64."""
    start: IntArray
    """Start of each class in `order`, and the end of the last one. (instances, C + 1) int64."""


def plan_course(episode_key: KeyArray, regimes: Regimes, num_steps: int, classes: int) -> Course:
    """Return the courses of some episodes.

    Args:
        episode_key: Random stream of each episode. (m,) uint64.
        regimes: Kinds and their order.
        num_steps: Env steps of an episode, T.
        classes: Number of classes of the task, C.
    """
    kinds, m = len(regimes.kinds), len(episode_key)
    least, mean = regimes.dwell or (num_steps + 1, num_steps + 1.0)
    most = num_steps // least + 1
    key = make_key(episode_key, Stream.REGIME)
    u = uniform(key, classes + 1 + 2 * kinds + most)
    # One number per class, the first kind, two per kind, one per change.
    by_class, first, of_kind, of_change = np.split(u, np.cumsum([classes, 1, 2 * kinds]), axis=1)
    # Dwell times: the smallest one, plus the failures before the success of a geometric variable.
    failure = (mean - least) / (mean - least + 1)
    extra = np.zeros((m, most), dtype=np.int64)
    if failure > 0:
        extra = np.floor(np.log1p(-of_change) / np.log(failure)).astype(np.int64)
    changes = np.cumsum(least + extra, axis=1)
    # (m, T + 1, changes) -> (m, T + 1): number of changes so far, and time since the last one.
    step = np.arange(num_steps + 1)
    count = (changes[:, None] <= step[:, None]).sum(axis=2)
    begin = np.take_along_axis(np.pad(changes, ((0, 0), (1, 0))), count, axis=1)
    if regimes.order == "cycle":
        start = (first * kinds).astype(np.int64)
        kind, before = (start + count) % kinds, (start + np.maximum(count - 1, 0)) % kinds
    else:
        kind, before = np.minimum(count, kinds - 1), np.clip(count - 1, 0, kinds - 1)
    share = np.minimum((step - begin + 1) / (regimes.ramp_steps + 1), 1.0)
    share[(count == 0) | (kind == before)] = 1.0

    # Place of each class in the random order of the episode's classes.
    in_order = by_class.argsort(axis=1)
    place = in_order.argsort(axis=1)
    has_class = np.empty((m, kinds, classes), dtype=bool)
    label = np.empty((m, kinds, classes), dtype=np.int64)
    for k, kind_of in enumerate(regimes.kinds):
        limits = kind_of.num_classes or (classes, classes)
        has_class[:, k] = place < _between(limits, of_kind[:, 2 * k])[:, None]
        pairs = _between(kind_of.swapped_pairs, of_kind[:, 2 * k + 1])
        # Places 0 and 1, 2 and 3, ... exchange labels.
        other = np.where(place < 2 * pairs[:, None], place ^ 1, place)
        label[:, k] = np.take_along_axis(in_order, other, axis=1)
    noise = np.array([k.label_noise for k in regimes.kinds])
    level = np.array([k.distortion for k in regimes.kinds])
    return Course(kind, before, share, has_class, label, noise, level)


def _between(limits: tuple[int, int], u: FloatArray) -> IntArray:
    """Return integers that are uniform from the smallest to the largest, both included."""
    low, high = limits
    return low + (u * (high - low + 1)).astype(np.int64)


def check_regimes(regimes: Regimes, classes: int, levels: int) -> None:
    """Check that a task has the classes and the levels of distortion that its kinds need.

    Raises:
        ValueError: If a kind needs others.
    """
    for kind in regimes.kinds:
        low, high = kind.num_classes or (classes, classes)
        if not 2 <= low <= high <= classes:
            raise ValueError(
                f"num_classes of {kind.name!r}: expected 2 <= smallest <= largest <= {classes}, "
                f"got {(low, high)}"
            )
        if not 0 <= kind.swapped_pairs[0] <= kind.swapped_pairs[1] <= low // 2:
            raise ValueError(
                f"swapped_pairs of {kind.name!r}: expected 0 to {low // 2}, half of the smallest "
                f"number of classes, got {kind.swapped_pairs}"
            )
        if not 0 <= kind.distortion < levels:
            raise ValueError(
                f"distortion of {kind.name!r}: expected a level of 0 to {levels - 1}, got "
                f"{kind.distortion}"
            )
        if not 0 <= kind.label_noise <= 1:
            raise ValueError(
                f"label_noise of {kind.name!r}: expected 0 to 1, got {kind.label_noise}"
            )


def class_index(
    labels: IntArray, classes: int, fraction: FloatArray, start: FloatArray
) -> ClassIndex:
    """Sort the images that each instance uses by class.

    Args:
        labels: Labels of the split without distortion. (n,) int64.
        classes: Number of classes, C.
        fraction: Share of the split in use, by instance. (instances,) float64.
        start: Start of that share in the split. (instances,) float64.

    Raises:
        ValueError: If an instance has no image of some class.
    """
    total = len(labels)
    order = np.zeros((len(fraction), total), dtype=np.int64)
    first = np.empty((len(fraction), classes + 1), dtype=np.int64)
    for i, (share, begin) in enumerate(zip(fraction, start, strict=True)):
        count, at = images_in_use(total, share, begin)
        used = (at + np.arange(count)) % total
        used = used[np.argsort(labels[used], kind="stable")]
        order[i, :count] = used
        first[i] = np.searchsorted(labels[used], np.arange(classes + 1))
        if (np.diff(first[i]) == 0).any():
            missing = int(np.diff(first[i]).argmin())
            raise ValueError(
                f"instance {i}: expected images of all {classes} classes, got none of class "
                f"{missing}; use a larger train_fraction"
            )
    return ClassIndex(order, first)


def make_exam(
    course: Course, kind: IntArray, rows: IntArray, members: int, index: ClassIndex, images: int
) -> Exam:
    """Return the images of a split that some members are evaluated on: all of the classes in use.

    Args:
        course: Courses of all members.
        kind: Kind of problem of each row. (r,) int64.
        rows: Members to evaluate. (r,) int64.
        members: Number of members.
        index: Images of the split, of one instance with the whole split.
        images: Images of the split without distortion.
    """
    indices = np.zeros((members, images), dtype=np.int64)
    labels = np.full((members, images), -1, dtype=np.int64)
    _fill_exam(indices, labels, course, kind, rows, index, images)
    return Exam(indices, labels)


@inlined
def kind_at(course: Course, row: int, step: int, u: float) -> int:
    """Return the kind of a training image in an env step, given a number in [0, 1)."""
    is_new = u < course.share[row, step]
    kind: int = course.kind[row, step] if is_new else course.kind_before[row, step]
    return kind


@inlined
def image_of_kind(
    course: Course, index: ClassIndex, row: int, kind: int, instance: int, u: float
) -> tuple[int, int]:
    """Return a random image of the classes of a kind, given a number in [0, 1), and its label."""
    start, classes = index.start[instance], course.has_class.shape[2]
    count = 0
    for c in range(classes):
        if course.has_class[row, kind, c]:
            count += start[c + 1] - start[c]
    place = int(u * count)
    for c in range(classes):
        if course.has_class[row, kind, c]:
            size = start[c + 1] - start[c]
            if place < size:
                return index.order[instance, start[c] + place], course.label[row, kind, c]
            place -= size
    return -1, -1  # Not reached: u is below 1.


@entry_point
def _fill_exam(
    indices: IntArray,
    labels: IntArray,
    course: Course,
    kind: IntArray,
    rows: IntArray,
    index: ClassIndex,
    images: int,
) -> None:
    """Write indices and labels; see `make_exam`."""
    for n, i in enumerate(rows):
        k, at = kind[n], 0
        offset = course.level[k] * images
        for c in range(course.has_class.shape[2]):
            if course.has_class[i, k, c]:
                for place in range(index.start[0, c], index.start[0, c + 1]):
                    indices[i, at] = index.order[0, place] + offset
                    labels[i, at] = course.label[i, k, c]
                    at += 1
