"""What data sets have in common: their folder, fixed splits, normalization, and errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.tasks.task import Splits

DATA_DIR_VARIABLE = "ESPER_DATA_DIR"
"""Environment variable with the default data directory."""
DEFAULT_DATA_DIR = "~/.cache/esper"
SPLIT_SEED = 0
"""Seed of the splits, which is part of a task and independent of any user's seed."""
Labeled = tuple[Any, Any]
"""Images (n, height, width) or (n, height, width, channels) uint8, and labels (n,) integers."""


def make_splits(*, train: Labeled, validation: Labeled, test: Labeled) -> Splits:
    """Return the data of a task, normalized by mean and standard deviation of the training images.

    Args:
        train: Images and labels to train on; arrays or tensors. Images are uint8 of shape
            (n, height, width), or (n, height, width, channels). Labels are classes, from 0 on.
        validation: The same of the images that observations and rewards are computed from.
        test: The same of the images that are evaluated only at the end of an episode.

    Raises:
        TypeError: If images are not uint8 or labels are not integers.
        ValueError: If a split is empty, labels are negative or not one per image, shapes differ
            between splits, or a channel has the same value everywhere.
    """
    given = {"train": train, "validation": validation, "test": test}
    checked = {name: _checked(name, *split) for name, split in given.items()}
    shapes = {name: tuple(images.shape[1:]) for name, (images, _) in checked.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"images: expected the same shape in all splits, got {shapes}")
    mean, std = mean_and_std(checked["train"][0])
    if not (std > 0).all():
        channels = torch.nonzero(std == 0).flatten().tolist()
        raise ValueError(
            f"train: expected images that differ, but the channels {channels} have the same value "
            "everywhere; leave them out"
        )
    return Splits(**{name: ImageSet(*split, mean, std) for name, split in checked.items()})


def check_splits(task: str, splits: Splits, host: Host) -> None:
    """Check that the data of a task fits its host.

    Raises:
        ValueError: If the images have another shape than the host expects, or there are more
            classes.
    """
    expected = host.image_size, host.image_size, host.in_channels
    for name in ("train", "validation", "test"):
        split: ImageSet = getattr(splits, name)
        if (shape := tuple(split.images.shape[1:])) != expected:
            raise ValueError(
                f"{name}: expected images of shape {expected}, as the host of task {task!r} "
                f"reads them, got {shape}; change image_size and in_channels of the host"
            )
        if (largest := int(split.labels.max())) >= host.num_classes:
            raise ValueError(
                f"{name}: expected labels of 0 to {host.num_classes - 1}, as the host of task "
                f"{task!r} has {host.num_classes} classes, got {largest}"
            )


def _checked(name: str, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Return images (n, height, width, channels) uint8, contiguous, and labels (n,) int64."""
    pixels, classes = (v if isinstance(v, Tensor) else np.asarray(v) for v in (images, labels))
    pixels, classes = torch.as_tensor(pixels), torch.as_tensor(classes)
    if pixels.dtype != torch.uint8:
        raise TypeError(f"{name}: expected images of type uint8, 0 to 255, got {pixels.dtype}")
    if classes.dtype.is_floating_point or classes.dtype in (torch.bool, torch.complex64):
        raise TypeError(f"{name}: expected integer labels, got {classes.dtype}")
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    if pixels.ndim != 4 or pixels.shape[1] != pixels.shape[2] or not pixels.numel():
        raise ValueError(
            f"{name}: expected square images, (n, height, width) or (n, height, width, channels), "
            f"got the shape {tuple(pixels.shape)}"
        )
    if classes.shape != pixels.shape[:1]:
        raise ValueError(
            f"{name}: expected one label per image, {(len(pixels),)}, got {tuple(classes.shape)}"
        )
    if classes.min() < 0:
        raise ValueError(f"{name}: expected labels of at least 0, got {int(classes.min())}")
    return pixels.contiguous(), classes.to(torch.int64)


def split_off(images: Tensor, labels: Tensor, num_validation: int, test: Labeled) -> Splits:
    """Return splits whose validation images are the last ones of a fixed permutation."""
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(images)))
    train, validation = order[:-num_validation], order[-num_validation:]
    return make_splits(
        train=(images[train], labels[train]),
        validation=(images[validation], labels[validation]),
        test=test,
    )


def mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, both (channels,) float32.

    Counts of the 256 pixel values give exact results without a float copy of the images (600 MB
    for CIFAR-10).
    """
    values = torch.arange(256, dtype=torch.float64)
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(-1)]
    shares = torch.stack(counts).double() / images[..., 0].numel()
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), std.float()


def read_or_download(
    name: str, data_dir: str | None, read: Callable[[Path], Splits], *, expected: str, copy: str
) -> Splits:
    """Read a data set from its folder.

    Args:
        name: Name of the data set, for the error.
        data_dir: The folder; None means `$ESPER_DATA_DIR` if that is set, else `~/.cache/esper`.
        read: Reads the data from the folder, and downloads what is missing.
        expected: What the folder should contain, for the error.
        copy: What to copy into the folder, for the error.

    Raises:
        FileNotFoundError: If the data cannot be read or downloaded.
    """
    root = Path(data_dir or os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR)
    root = root.expanduser().absolute()
    try:
        return read(root)
    # Torchvision asserts the sizes of the files that it reads.
    except (RuntimeError, OSError, HTTPException, AssertionError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} could not be read from {root} or downloaded to it: {error}\n"
            f"Expected there: {expected}, with torchvision's checksums.\nAny of these helps:\n"
            "- connect to the internet\n"
            f"- copy {copy} into {root}\n"
            f"- set data_dir or the environment variable {DATA_DIR_VARIABLE} to the folder that "
            "contains it\n"
            "- if that is there, it is damaged: delete it\n"
            "- use Esper-Digits-v0, which needs no download"
        ) from error
