"""Sampling of training batches: indices of images, label noise, crops and mirror images.

Random numbers of a member depend only on the key of its episode and on its step. The batches of a
member are therefore independent of all other members.
"""

from __future__ import annotations

import numpy as np

from esper_env.config import BoolArray, FloatArray, IntArray
from esper_env.jit import entry_point
from esper_env.population.images import PADDING, Draw
from esper_env.rng import KeyArray, Stream, child_key, mix, number_at
from esper_env.tasks.instances import Instances, images_in_use
from esper_env.tasks.regimes import ClassIndex, Course, image_of_kind, kind_at

NO_COURSE = Course.empty(0, 0, 0, 0)
NO_INDEX = ClassIndex(np.zeros((0, 0), dtype=np.int64), np.zeros((0, 0), dtype=np.int64))


def draw_batches(
    episode_key: KeyArray,
    steps: IntArray,
    instance: IntArray,
    instances: Instances,
    labels: IntArray,
    *,
    num_classes: int,
    batches: IntArray | int,
    batch_size: int,
    augments: bool,
    course: Course = NO_COURSE,
    class_index: ClassIndex = NO_INDEX,
) -> Draw:
    """Sample the training batches of one env step.

    Args:
        episode_key: Random stream of each member's episode. (m,) uint64.
        steps: Env steps that each member has completed. (m,) int64.
        instance: Index of each member's instance. (m,) int64.
        instances: Set of instances, which gives the images to train on and the label noise.
        labels: Labels of the training split. (n,) int64.
        num_classes: Classes of the task.
        batches: Batches of each member, (m,) int64, or of all members.
        batch_size: Images per batch.
        augments: Whether images are cropped and mirrored at random.
        course: Course of each member's episode, if the task has regimes.
        class_index: Images of the split by instance and class, if the task has regimes.

    Returns:
        Samples of each batch and member.
    """
    own_batches = np.full(len(instance), batches)
    shape = len(instance), own_batches.max(), batch_size
    changed = shape if augments else (len(instance), 0, 0)
    index, shown = np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64)
    shifts, flips = np.empty((*changed, 2), dtype=np.int64), np.empty(changed, dtype=np.bool_)
    _draw(
        episode_key, steps, instance, instances.train_fraction, instances.train_start,
        instances.label_noise, labels, num_classes, own_batches, course, class_index,
        index, shown, shifts, flips,
    )  # fmt: skip
    # (m, batches, size) -> (batches, size, m)
    return Draw(
        index.transpose(1, 2, 0),
        shown.transpose(1, 2, 0),
        shifts.transpose(1, 2, 0, 3) if augments else None,
        flips.transpose(1, 2, 0) if augments else None,
    )


@entry_point
def _draw(
    episode_key: KeyArray,
    steps: IntArray,
    instance: IntArray,
    train_fraction: FloatArray,
    train_start: FloatArray,
    label_noise: FloatArray,
    labels: IntArray,
    num_classes: int,
    own_batches: IntArray,
    course: Course,
    class_index: ClassIndex,
    index: IntArray,
    shown: IntArray,
    shifts: IntArray,
    flips: BoolArray,
) -> None:
    """Sample into `index`, `shown`, and, unless they are empty, `shifts` and `flips`.

    Args:
        episode_key: Random stream of each member's episode. (m,) uint64.
        steps: Env steps that each member has completed. (m,) int64.
        instance: Index of each member's instance. (m,) int64.
        train_fraction: Share of the split to train on, for each instance. (n,) float64.
        train_start: Start of that share in the split, for each instance. (n,) float64.
        label_noise: Share of wrong labels, for each instance. (n,) float64.
        labels: Labels of the training split without distortion. (images,) int64.
        num_classes: Classes of the task.
        own_batches: Batches of each member. (m,) int64.
        course: Course of each member's episode; without kinds if the task has no regimes.
        class_index: Images of the split by instance and class; empty if the task has no regimes.
        index: Indices into the training split, overwritten. (m, batches, size) int64.
        shown: Training labels, overwritten. (m, batches, size) int64.
        shifts: Crop offsets [pixels], overwritten. (m, batches, size, 2) int64, or (m, 0, 0, 2).
        flips: Whether an image is mirrored, overwritten. (m, batches, size) bool, or (m, 0, 0).
    """
    total = len(labels)
    m, most, size = index.shape
    has_regimes = len(course.noise) > 0
    for i in range(m):
        step, k, episode = np.uint64(steps[i]), instance[i], mix(episode_key[i])
        # Batches and augmentation differ in every step. Label noise is fixed in an episode.
        data_key = child_key(child_key(episode, np.uint64(Stream.DATA)), step)
        noise_key = child_key(episode, np.uint64(Stream.NOISE))
        augment_key = child_key(child_key(episode, np.uint64(Stream.AUGMENT)), step)
        count, first = images_in_use(total, train_fraction[k], train_start[k])
        noise, batches = label_noise[k], own_batches[i]
        if batches < most:
            index[i, batches:], shown[i, batches:] = 0, -1
            shifts[i, batches:], flips[i, batches:] = 0, False
        for b in range(batches):
            for j in range(size):
                position = b * size + j
                if has_regimes:
                    kind = kind_at(
                        course, i, steps[i], number_at(data_key, np.uint64(2 * position))
                    )
                    u = number_at(data_key, np.uint64(2 * position + 1))
                    at, label = image_of_kind(course, class_index, i, kind, k, u)
                    noise = max(label_noise[k], course.noise[kind])
                    shown_at = at + course.level[kind] * total
                else:
                    # Sample with replacement from `count` images, which wrap around at the end.
                    at = (int(number_at(data_key, np.uint64(position)) * count) + first) % total
                    label, shown_at = labels[at], at
                # Noise depends on the image, not on the batch: an image keeps its wrong label for
                # the whole episode. Numbers 2 * at and 2 * at + 1 of the stream belong to it.
                if noise > 0 and number_at(noise_key, np.uint64(2 * at)) < noise:
                    other = number_at(noise_key, np.uint64(2 * at + 1)) * (num_classes - 1)
                    label = (label + 1 + int(other)) % num_classes
                index[i, b, j], shown[i, b, j] = shown_at, label
                if len(shifts[i]):
                    # Numbers of the stream: all row offsets, all column offsets, then all flips.
                    for axis in range(2):
                        place = np.uint64((axis * batches + b) * size + j)
                        reach = number_at(augment_key, place) * (2 * PADDING + 1)
                        shifts[i, b, j, axis] = int(reach) - PADDING
                    place = np.uint64((2 * batches + b) * size + j)
                    flips[i, b, j] = number_at(augment_key, place) < 0.5
