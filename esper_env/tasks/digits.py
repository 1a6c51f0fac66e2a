"""Handwritten digits: 1,797 images of 8x8 pixels from scikit-learn, without a download."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.tasks.instances import InstanceRanges
from esper_env.tasks.regimes import Kind, Regimes
from esper_env.tasks.task import Splits, Task

NUM_TRAIN, NUM_VALIDATION = 1097, 350
"""Images in the training and in the validation split; the other 350 are the test split."""
NOISE_SEED = 1
"""Seed of the noise in images, part of the task too."""
BRIGHTEST = 16
"""Largest value of a pixel."""
SPLIT_SEED = 0
"""Seed of the split, which is part of the task and independent of any user's seed."""


def load_splits(data_dir: str | None) -> Splits:
    """Return scikit-learn's digits, split into 1,097 training, 350 validation, 350 test images."""
    del data_dir  # The images are part of scikit-learn.
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(digits.images))
    images = torch.from_numpy(digits.images[order].astype(np.uint8))[..., None]
    labels = torch.from_numpy(digits.target[order].astype(np.int64))
    train = images[:NUM_TRAIN].float()
    mean, std = train.mean().reshape(1), train.std().reshape(1)

    def split(start: int, stop: int | None) -> ImageSet:
        return ImageSet(images[start:stop], labels[start:stop], mean, std)

    return Splits(
        train=split(0, NUM_TRAIN),
        validation=split(NUM_TRAIN, NUM_TRAIN + NUM_VALIDATION),
        test=split(NUM_TRAIN + NUM_VALIDATION, None),
    )


def load_noisy_splits(data_dir: str | None) -> Splits:
    """Return scikit-learn's digits in the same splits, each followed by a noisy copy of its images.

    The noise is normal, with a standard deviation of an eighth of the brightest value.
    """
    splits, rng = load_splits(data_dir), np.random.default_rng(NOISE_SEED)

    def doubled(split: ImageSet) -> ImageSet:
        images = split.images.numpy()
        noisy = images + rng.normal(0.0, BRIGHTEST / 8, images.shape)
        copy = np.rint(noisy).clip(0, BRIGHTEST).astype(np.uint8)
        both = torch.from_numpy(np.concatenate([images, copy]))
        return ImageSet(both, split.labels.repeat(2), split.mean, split.std)

    parts = splits.train, splits.validation, splits.test
    train, validation, test = map(doubled, parts)
    return Splits(train=train, validation=validation, test=test)


_HOST = Host(in_channels=1, image_size=8, channels=(4, 8), num_classes=10)
_ALL_IMAGES: dict[str, Any] = {
    "train_fraction": (1.0, 1.0),
    "label_noise": (0.0, 0.0),
    "widths": (1.0,),
    "test_size": 60,
}
"""Ranges of instances that differ only in the learning rate; the regimes are what differs. So the
differences are small, and more instances are needed to judge an agent."""

STANDARD = Task(
    # 438 parameters: small enough that growing helps.
    host=_HOST,
    load=load_splits,
)
SIZING = Task(
    host=dataclasses.replace(_HOST, channels=(2, 4)),
    load=load_noisy_splits,
    levels=2,
    regimes=Regimes(kinds=(Kind(name="easy", num_classes=(2, 3)), Kind(name="hard", distortion=1))),
    ranges=InstanceRanges(learning_rate=(0.03, 0.1), **_ALL_IMAGES),
    defaults={
        "objective": "anytime",
        "rent_weight": 0.03,
        "episode_steps": 40,
        "batches_per_step": 8,
        "graft": True,
        "divergence_loss": 20.0,
    },
)
CONTEXTS = Task(
    host=dataclasses.replace(_HOST, channels=(8, 16)),
    load=load_splits,
    regimes=Regimes(
        kinds=(Kind(name="plain"), Kind(name="swapped", swapped_pairs=(4, 5))), dwell=(5, 10.0)
    ),
    ranges=InstanceRanges(learning_rate=(0.05, 0.15), **_ALL_IMAGES),
    defaults={
        "objective": "anytime",
        "rent_weight": 0.01,
        "max_seeds": 1,
        "learning_rate_decay": "none",
        "graft": True,
        "parking": True,
        "divergence_loss": 20.0,
    },
)
