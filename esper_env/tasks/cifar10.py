"""CIFAR-10: 60,000 photographs of 32x32 pixels in 10 classes, downloaded by torchvision.

Torchvision compares the md5 checksum of the archive before it extracts it, and that of each file
before it unpickles it.
"""

from __future__ import annotations

import os
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.tasks.instances import InstanceRanges
from esper_env.tasks.task import Splits, Task

DATA_DIR_VARIABLE = "ESPER_DATA_DIR"
"""Environment variable with the default data directory."""
DEFAULT_DATA_DIR = "~/.cache/esper"
IMAGES_PER_VALIDATION_IMAGE = 25
"""One of 25 training images, 2,000 of 50,000, is in the validation split."""
SPLIT_SEED = 0
"""Seed of the split, which is part of the task and independent of any user's seed."""


def load_splits(data_dir: str | None = None) -> Splits:
    """Return CIFAR-10, split into 48,000 training, 2,000 validation and 10,000 test images.

    Args:
        data_dir: Folder that contains `cifar-10-batches-py`, which is downloaded if it is missing
            or damaged; None means `$ESPER_DATA_DIR` if that is set, else `~/.cache/esper`.

    Raises:
        FileNotFoundError: If the folder has no intact copy and the download fails.
    """
    from torchvision.datasets import CIFAR10

    root = Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR)
    root = root.expanduser().absolute()
    try:
        images, labels = _read(root, train=True)
        test_images, test_labels = _read(root, train=False)
    except (RuntimeError, OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"CIFAR-10 could not be read from {root} or downloaded to it: {error}\n"
            f"Expected there: the folder {CIFAR10.base_folder} or the archive {CIFAR10.filename}, "
            "with torchvision's checksums.\nAny of these helps:\n"
            "- connect to the internet\n"
            f"- copy {CIFAR10.url} into {root}\n"
            f"- set data_dir or the environment variable {DATA_DIR_VARIABLE} to the folder that "
            "contains it\n"
            "- if the folder or the archive is there, it is damaged: delete it\n"
            "- use Esper-Digits-v0, which needs no download"
        ) from error

    # A fixed permutation, so that every user has the same validation images.
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(images)))
    num_train = len(images) - len(images) // IMAGES_PER_VALIDATION_IMAGE
    train, validation = order[:num_train], order[num_train:]
    # All splits are normalized with the statistics of the training images alone.
    mean, std = _mean_and_std(images[train])
    return Splits(
        train=ImageSet(images[train], labels[train], mean, std),
        validation=ImageSet(images[validation], labels[validation], mean, std),
        test=ImageSet(test_images, test_labels, mean, std),
    )


def _read(root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Return images (n, 32, 32, 3) uint8, contiguous, and labels (n,) int64; download if needed."""
    from filelock import FileLock  # a dependency of torch
    from torchvision.datasets import CIFAR10

    try:
        data = CIFAR10(root, train=train)  # needs no lock, so an intact copy may be read-only
    except RuntimeError:
        root.mkdir(parents=True, exist_ok=True)
        # Without the lock, processes that start together would write to the same files.
        with FileLock(root / ".cifar-10.lock"):
            data = CIFAR10(root, train=train, download=True)
    # torchvision returns a view with channels last of memory with channels first. Gathering images
    # by index needs channels last in memory.
    pixels = np.ascontiguousarray(data.data)
    return torch.from_numpy(pixels), torch.tensor(data.targets, dtype=torch.int64)


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, both (channels,) float32.

    Counts of the 256 pixel values give exact results without a float copy of the images (600 MB).
    """
    values = torch.arange(256, dtype=torch.float64)
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(-1)]
    shares = torch.stack(counts).double() / images[..., 0].numel()
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), std.float()


def _task(*channels: int, kernel_size: int = 3) -> Task:
    """Return the task that trains a host with these channels on CIFAR-10."""
    host = Host(
        in_channels=3, image_size=32, channels=channels, num_classes=10, kernel_size=kernel_size
    )
    return Task(
        host=host,
        load=load_splits,
        augments=True,
        defaults={"episode_steps": 150, "batch_size": 128},
        ranges=InstanceRanges(train_fraction=(0.02, 1.0)),
    )


STANDARD = _task(8, 16, 32)
# 77 parameters, and no convolution reads neighboring pixels until a seed adds one that does.
IMPAIRED = _task(1, 2, 4, kernel_size=1)
DEEP = _task(8, 16, 32, 64, 128)
