"""Exams: each member is evaluated on images and labels of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from esper_env.config import IntArray
from esper_env.population.blueprints import CNN_BLUEPRINTS, Blueprint
from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.population.interface import Evaluation, Exam
from esper_env.population.layers import Conv, Layer, Norm, Relu
from esper_env.population.numba_engine.interpreter import run_members
from tests.builders import NAMES, TINY, TOLERANCE, SmallPopulation


def depthwise(before: int, after: int) -> Sequence[Layer]:
    return [Conv(before, before, 3, groups=before), Conv(before, after, 1), Norm(after), Relu()]


HOSTS = {
    "two widths": (TINY.scaled(0.5), TINY),
    "a first layer that cannot share images": (dataclasses.replace(TINY, build_block=depthwise),),
}
COUNTS = (1, 32, 33, 200, 7, 64)
"""Images of each member; the compiled engine runs 32 at a time."""
MEMBERS = np.array([4, 0, 0, 2, 5, 3, 1, 2, 4])
"""Member of each network, in no order."""
ALPHA = np.array([[0, 0], [0.5, 0], [0, 0.5], [0.5, 0.5], [1, 0.5], [1, 0], [0, 1], [0, 0], [1, 1]])


def make_population(
    hosts: Sequence[Host] = (TINY,),
    blueprints: Sequence[Blueprint] = CNN_BLUEPRINTS,
    precision: str = "float32",
) -> SmallPopulation:
    """Return six trained members with two seeds each, in chunks of four members."""
    small = SmallPopulation(
        len(COUNTS), hosts=hosts, blueprints=blueprints, chunk_size=4, precision=precision
    )
    for member in small.members.tolist():
        for slot in range(2):
            index = (2 * member + 3 * slot) % len(NAMES)
            small.plant(member, slot, index, "half", (member + slot) % 3)
    small.awaken()
    small.train(small.draw(1))
    return small


def make_exam(images: ImageSet) -> Exam:
    """Return an exam of random images with random labels, `COUNTS` of each member."""
    rng, shape = np.random.default_rng(2), (len(COUNTS), max(COUNTS))
    is_padding = np.arange(max(COUNTS)) >= np.array(COUNTS)[:, None]
    indices, labels = rng.integers(0, len(images), shape), rng.integers(0, TINY.num_classes, shape)
    return Exam(np.where(is_padding, 0, indices), np.where(is_padding, -1, labels))


def whole_split(images: ImageSet) -> Exam:
    """Return an exam of all images in order for each member."""
    rows = np.arange(len(images)), images.labels.numpy()
    return Exam(*(np.tile(row, (len(COUNTS), 1)) for row in rows))


def assert_close(actual: Evaluation, expected: Evaluation, num_images: int | IntArray) -> None:
    """Compare within rounding; one image between two classes may fall to the other side."""
    np.testing.assert_allclose(actual.loss, expected.loss, atol=TOLERANCE, rtol=TOLERANCE)
    assert (np.abs(actual.accuracy - expected.accuracy) < 1.5 / num_images).all()


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
def test_an_exam_of_the_whole_split_equals_an_evaluation_on_the_split(
    engine: str, hosts: Sequence[Host]
) -> None:
    """With compiled kernels bitwise."""
    small = make_population(hosts)
    result = small.evaluate(ALPHA, MEMBERS, whole_split(small.images))
    expected = small.evaluate(ALPHA, MEMBERS)
    if engine == "compiled":
        np.testing.assert_array_equal(result, expected)
    assert_close(result, expected, len(small.images))


@pytest.mark.parametrize("hosts", HOSTS.values(), ids=HOSTS)
def test_an_exam_equals_evaluations_on_splits_of_each_members_images(
    engine: str, hosts: Sequence[Host]
) -> None:
    """Other images, labels and numbers of images for each member; with compiled kernels bitwise."""
    small = make_population(hosts)
    images, exam = small.images, make_exam(small.images)
    result = small.evaluate(ALPHA, MEMBERS, exam)
    for row, member in enumerate(MEMBERS.tolist()):
        index, labels = (torch.from_numpy(array[member, : COUNTS[member]]) for array in exam)
        small.images = dataclasses.replace(images, images=images.images[index], labels=labels)
        expected = small.evaluate(ALPHA[[row]], [member])
        own = Evaluation(*(array[[row]] for array in result))
        if engine == "compiled":
            np.testing.assert_array_equal(own, expected)
        assert_close(own, expected, COUNTS[member])


@pytest.mark.usefixtures("threads")
def test_exams_are_bitwise_independent_of_batch_size_and_thread_count() -> None:
    small = make_population()
    exam = make_exam(small.images)
    parts = [small.evaluate(ALPHA[[row]], MEMBERS[[row]], exam) for row in range(len(MEMBERS))]
    expected = np.concatenate(parts, axis=1)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        np.testing.assert_array_equal(small.evaluate(ALPHA, MEMBERS, exam), expected)


class Doubled(Relu):
    """A layer without a kernel."""

    def forward(self, x, parameters, buffers, training):  # type: ignore[no-untyped-def]
        del parameters, buffers, training
        return x + x


def test_both_engines_agree_on_exams_and_serve_the_members_of_one() -> None:
    """The seeds of one blueprint in seven have no kernel."""
    without_kernel = Blueprint("doubled", lambda c: [Doubled(), Conv(c, c, 1, zero=True)])
    small = make_population(blueprints=[without_kernel, *CNN_BLUEPRINTS[1:]])
    compiled = small.population.compiled
    assert compiled is not None
    assert 0 < compiled.supports(small.members, small.seeds).sum() < len(COUNTS)
    exam = make_exam(small.images)
    result = small.evaluate(ALPHA, MEMBERS, exam)
    small.population.compiled = None
    assert_close(result, small.evaluate(ALPHA, MEMBERS, exam), np.array(COUNTS)[MEMBERS])


def test_exams_need_no_other_compilation_than_training_and_evaluation() -> None:
    small = make_population()
    small.evaluate(ALPHA, MEMBERS)
    before = len(run_members.signatures)
    small.evaluate(ALPHA, MEMBERS, make_exam(small.images))
    assert len(run_members.signatures) == before


def test_an_exam_in_bfloat16_equals_an_evaluation_within_its_rounding() -> None:
    """A bfloat16 has 8 bits, a relative rounding of 0.004 per operation."""
    small = make_population(precision="bfloat16")
    result = small.evaluate(ALPHA, MEMBERS, whole_split(small.images))
    expected = small.evaluate(ALPHA, MEMBERS)
    np.testing.assert_allclose(result.loss, expected.loss, rtol=0.02)
