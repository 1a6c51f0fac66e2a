"""What batches show, against the same formulas written with whole arrays of the streams."""

from __future__ import annotations

import numpy as np
import pytest

from esper_env.population.images import PADDING
from esper_env.rng import Stream, make_key, uniform, uniform_at
from esper_env.tasks.instances import InstanceRanges, make_instances
from esper_env.tasks.sampling import draw_batches

BATCHES, SIZE, CLASSES = 3, 5, 10


@pytest.mark.parametrize("name", ["default", "train"])
@pytest.mark.parametrize("augments", [False, True])
def test_a_draw_is_that_of_the_streams(name: str, augments: bool) -> None:
    rng = np.random.default_rng(0)
    instances = make_instances(name, InstanceRanges(), 0.05)
    labels, m = rng.integers(CLASSES, size=97), 6
    instance, steps = rng.integers(len(instances), size=m), rng.integers(60, size=m)
    key = make_key(np.arange(m))
    draw = draw_batches(
        key,
        steps,
        instance,
        instances,
        labels,
        num_classes=CLASSES,
        batches=BATCHES,
        batch_size=SIZE,
        augments=augments,
    )
    count = np.rint(instances.train_fraction[instance] * 97)[:, None]
    first = np.floor(instances.train_start[instance] * 97)[:, None]
    u = uniform(make_key(key, Stream.DATA, steps), BATCHES * SIZE)
    index = ((np.floor(u * count) + first) % 97).astype(np.int64)
    noise_key, noise = make_key(key, Stream.NOISE), instances.label_noise[instance]
    is_wrong = uniform_at(noise_key, 2 * index) < noise[:, None]
    other = np.floor(uniform_at(noise_key, 2 * index + 1) * (CLASSES - 1)).astype(int)
    shown = np.where(is_wrong, (labels[index] + 1 + other) % CLASSES, labels[index])
    assert is_wrong.any() == (name == "train")

    def by_batch(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return values.T.reshape(BATCHES, SIZE, m)

    np.testing.assert_array_equal(draw.indices, by_batch(index))
    np.testing.assert_array_equal(draw.labels, by_batch(shown))
    if not augments:
        assert draw.shifts is None
        assert draw.flips is None
        return
    v = uniform(make_key(key, Stream.AUGMENT, steps), 3 * BATCHES * SIZE)
    rows, columns, mirror = np.split(v, 3, axis=1)
    reach = 2 * PADDING + 1
    shifts = [by_batch(np.floor(part * reach).astype(int) - PADDING) for part in (rows, columns)]
    np.testing.assert_array_equal(draw.shifts, np.stack(shifts, axis=3))
    np.testing.assert_array_equal(draw.flips, by_batch(mirror < 0.5))
