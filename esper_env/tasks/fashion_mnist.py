"""Fashion-MNIST: 70,000 grayscale pictures of clothes, 28x28 pixels in 10 classes.

Torchvision reads the files, and compares the md5 checksums of downloaded archives. The files of
Debian's package `dataset-fashion-mnist` take the place of a download.

Source: Xiao, Rasul and Vollgraf (2017), "Fashion-MNIST: a novel image dataset for benchmarking
machine learning algorithms".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from esper_env.population.hosts import Host
from esper_env.tasks.data import read_or_download, split_off
from esper_env.tasks.instances import InstanceRanges
from esper_env.tasks.task import Splits, Task

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package has the archives."""
NUM_VALIDATION = 500
"""Validation images of 60,000; few, because every env step evaluates several networks on them."""


def load_splits(data_dir: str | None = None) -> Splits:
    """Return Fashion-MNIST: 59,500 training, 500 validation and 10,000 test images.

    Args:
        data_dir: Folder that contains `FashionMNIST/raw`. What is missing there is extracted from
            `DEBIAN_FOLDER` or downloaded. None means `$ESPER_DATA_DIR` if that is set, else
            `~/.cache/esper`.

    Raises:
        FileNotFoundError: If the folder has no intact copy, and there is no other.
    """

    def read(root: Path) -> Splits:
        return split_off(*_read(root, train=True), NUM_VALIDATION, _read(root, train=False))

    return _load(data_dir, read)


def load_small_splits(data_dir: str | None = None) -> Splits:
    """Return Fashion-MNIST with 14x14 pixels, each the mean of 2x2; the splits of `load_splits`."""

    def halved(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        blocks = images.view(len(images), 14, 2, 14, 2).float()
        return blocks.mean((2, 4)).round().to(torch.uint8), labels

    def read(root: Path) -> Splits:
        train, test = (halved(*_read(root, train=is_train)) for is_train in (True, False))
        return split_off(*train, NUM_VALIDATION, test)

    return _load(data_dir, read)


def _load(data_dir: str | None, read: Callable[[Path], Splits]) -> Splits:
    from torchvision.datasets import FashionMNIST

    names = ", ".join(name for name, _ in FashionMNIST.resources)
    return read_or_download(
        "Fashion-MNIST",
        data_dir,
        read,
        expected=f"the archives {names} in FashionMNIST/raw, or what they contain",
        copy=f"FashionMNIST/raw with the archives of {FashionMNIST.mirrors[0]} (or install "
        "Debian's package dataset-fashion-mnist)",
    )


def _read(root: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Return images (n, 28, 28) uint8 and labels (n,) int64; copy or download what is missing."""
    from filelock import FileLock  # a dependency of torch
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import extract_archive

    try:
        data = FashionMNIST(root, train=train)  # needs no lock, so an intact copy may be read-only
    except RuntimeError:
        raw = root / "FashionMNIST" / "raw"
        raw.mkdir(parents=True, exist_ok=True)
        # Without the lock, processes that start together would write to the same files.
        with FileLock(root / ".fashion-mnist.lock"):
            for name, _ in FashionMNIST.resources:
                file = raw / Path(name).stem
                if (DEBIAN_FOLDER / name).exists() and not file.exists():
                    # Moved when complete: an interrupted copy must not look like the file.
                    with TemporaryDirectory(dir=raw) as folder:
                        extract_archive(DEBIAN_FOLDER / name, folder)
                        (Path(folder) / file.name).replace(file)
            data = FashionMNIST(root, train=train, download=True)
    return data.data, data.targets


_RANGES = InstanceRanges(train_fraction=(0.02, 1.0))
_SIZES = {"batches_per_step": 8}

STANDARD = Task(
    host=Host(in_channels=1, image_size=28, channels=(4, 8, 16), num_classes=10),
    load=load_splits,
    ranges=_RANGES,
    defaults=_SIZES,
)
SMALL = Task(
    host=Host(in_channels=1, image_size=14, channels=(4, 8), num_classes=10),
    load=load_small_splits,
    ranges=_RANGES,
    defaults=_SIZES,
)
