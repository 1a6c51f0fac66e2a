"""CIFAR-10: 60,000 photographs of 32x32 pixels in 10 classes, downloaded by torchvision.

Torchvision compares the md5 checksum of the archive before it extracts it, and that of each file
before it unpickles it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper_env.population.hosts import Host
from esper_env.tasks.data import read_or_download, split_off
from esper_env.tasks.instances import InstanceRanges
from esper_env.tasks.task import Splits, Task

IMAGES_PER_VALIDATION_IMAGE = 25
"""One of 25 training images, 2,000 of 50,000, is in the validation split."""


def load_splits(data_dir: str | None = None) -> Splits:
    """Return CIFAR-10, split into 48,000 training, 2,000 validation and 10,000 test images.

    Args:
        data_dir: Folder that contains `cifar-10-batches-py`, which is downloaded if it is missing
            or damaged; None means `$ESPER_DATA_DIR` if that is set, else `~/.cache/esper`.

    Raises:
        FileNotFoundError: If the folder has no intact copy and the download fails.
    """
    from torchvision.datasets import CIFAR10

    def read(root: Path) -> Splits:
        images, labels = _read(root, train=True)
        num_validation = len(images) // IMAGES_PER_VALIDATION_IMAGE
        return split_off(images, labels, num_validation, _read(root, train=False))

    return read_or_download(
        "CIFAR-10",
        data_dir,
        read,
        expected=f"the folder {CIFAR10.base_folder} or the archive {CIFAR10.filename}",
        copy=CIFAR10.url,
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
