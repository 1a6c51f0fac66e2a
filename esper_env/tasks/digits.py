"""Handwritten digits: 1,797 images of 8x8 pixels from scikit-learn, without a download."""

from __future__ import annotations

import numpy as np
import torch

from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.tasks.task import Splits, Task

NUM_TRAIN, NUM_VALIDATION = 1097, 350
"""Images in the training and in the validation split; the other 350 are the test split."""
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


DIGITS = Task(
    # 438 parameters: small enough that growing helps.
    host=Host(in_channels=1, image_size=8, channels=(4, 8), num_classes=10),
    load=load_splits,
)
