"""CIFAR-10: 60,000 photographs of 32x32 pixels in 10 classes, downloaded on first use.

Address, checksums and reader are torchvision's. The download is not: torchvision's asks for the
archive twice, falls back to plain http and leaves a partial file behind when it is interrupted.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import numpy as np
import torch
from torch import Tensor

from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.tasks.instances import InstanceRanges
from esper_env.tasks.task import Splits, Task

DATA_DIR_VARIABLE = "ESPER_DATA_DIR"
DEFAULT_DATA_DIR = "~/.cache/esper"
ARCHIVE_MEGABYTES = 170
STALL_SECONDS = 30.0
"""A server that sends nothing for so long is given up."""
IMAGES_PER_VALIDATION_IMAGE = 25
"""2,000 of the 50,000 training images validate."""
SPLIT_SEED = 0
"""The split is part of the task and does not depend on any user's seed."""


def load_splits(data_dir: str | None = None) -> Splits:
    """Return CIFAR-10, split into 48,000 training, 2,000 validation and 10,000 test images.

    Uses no network if the data lies in the folder. Processes that start at once may each download,
    but none sees a partial copy.

    Args:
        data_dir: Folder that holds `cifar-10-batches-py` or shall hold it; None stands for
            `$ESPER_DATA_DIR` if that is set, else `~/.cache/esper`.

    Raises:
        FileNotFoundError: If the data is not there and cannot be downloaded; names the remedies.
        OSError: If the copy on disk is damaged; it is neither used nor overwritten.
    """
    from torchvision.datasets import CIFAR10

    if data_dir is None:
        data_dir = os.environ.get(DATA_DIR_VARIABLE) or DEFAULT_DATA_DIR
    root = Path(data_dir).expanduser().absolute()
    folder = root / CIFAR10.base_folder
    if not folder.exists():
        _fetch(root)
    if damaged := _damaged_files(folder):
        raise _damaged_copy(folder, f"missing or with a wrong checksum: {', '.join(damaged)}")

    pixels, classes = _read(root, train=True)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pixels))
    num_train = len(pixels) - max(1, len(pixels) // IMAGES_PER_VALIDATION_IMAGE)
    train, validation = order[:num_train], order[num_train:]
    train_images = _contiguous(pixels[train])
    mean, std = _mean_and_std(train_images)
    test_pixels, test_classes = _read(root, train=False)

    def image_set(images: Tensor, labels: np.ndarray) -> ImageSet:
        return ImageSet(images, torch.from_numpy(labels), mean, std)

    return Splits(
        train=image_set(train_images, classes[train]),
        validation=image_set(_contiguous(pixels[validation]), classes[validation]),
        test=image_set(_contiguous(test_pixels), test_classes),
    )


def _fetch(root: Path) -> None:
    """Put the verified folder into `root`, from the archive if that lies there, else by download.

    Raises:
        FileNotFoundError: If that fails; names the remedies.
        OSError: If the archive in `root` is damaged.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, extract_archive

    folder, archive = root / CIFAR10.base_folder, root / CIFAR10.filename
    has_archive = archive.exists()
    if has_archive and not check_integrity(archive, CIFAR10.tgz_md5):
        raise _damaged_copy(archive, f"its md5 is not {CIFAR10.tgz_md5}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".cifar-10-", dir=root) as scratch:
            extract_archive(archive if has_archive else _download(root, Path(scratch)), scratch)
            extracted = Path(scratch, CIFAR10.base_folder)
            if damaged := _damaged_files(extracted):
                raise OSError(f"extracting the archive failed for {', '.join(damaged)}")
            try:
                os.replace(extracted, folder)
            except OSError:
                # Another process was first: a folder with files in it is not replaced.
                if not folder.exists():
                    raise
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(
            f"CIFAR-10 is not in {root} and could not be fetched: {error}\n"
            f"Expected there: the folder {CIFAR10.base_folder} or the archive {CIFAR10.filename}."
            "\nRemedies, any of them:\n"
            "- connect to the internet for the first use;\n"
            f"- put {CIFAR10.url} into {root} by hand;\n"
            f"- name the folder that has it: data_dir=... or the variable {DATA_DIR_VARIABLE};\n"
            "- use Esper-Digits-v0, which needs no download."
        ) from error


def _download(root: Path, scratch: Path) -> Path:
    """Download the archive into a scratch folder, check it, and return its path."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import calculate_md5

    what = f"Downloading CIFAR-10 ({ARCHIVE_MEGABYTES} MB) from {CIFAR10.url} to {root}"
    print(what, file=sys.stderr, flush=True)
    archive: Path = scratch / CIFAR10.filename
    request = Request(CIFAR10.url, headers={"User-Agent": "esper-env"})
    with urlopen(request, timeout=STALL_SECONDS) as response, archive.open("wb") as file:
        shutil.copyfileobj(response, file)
    md5 = calculate_md5(archive)
    if md5 != CIFAR10.tgz_md5:
        raise OSError(
            f"wrong checksum of the {archive.stat().st_size:,} bytes that came from {CIFAR10.url}:"
            f" md5 {md5}, expected {CIFAR10.tgz_md5}."
        )
    return archive


def _damaged_files(folder: Path) -> list[str]:
    """Return the names of the data set's files that are missing or have a wrong checksum."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    expected = [*CIFAR10.train_list, *CIFAR10.test_list]
    expected.append([CIFAR10.meta["filename"], CIFAR10.meta["md5"]])
    return [name for name, md5 in expected if not check_integrity(folder / name, md5)]


def _damaged_copy(path: Path, how: str) -> OSError:
    """Return the error for something on disk that belongs to the user and is not CIFAR-10."""
    remedy = f"Delete it or choose another data_dir (or {DATA_DIR_VARIABLE})."
    return OSError(f"{path} is damaged ({how}). {remedy}")


def _read(root: Path, *, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (n, height, width, channels) uint8, not contiguous, and classes (n,) int64."""
    from torchvision.datasets import CIFAR10

    with warnings.catch_warnings():
        # NumPy 2.4.0 to 2.4.4 warn of the dtype that Python 2 pickled in these files.
        warnings.filterwarnings("ignore", r"dtype\(\): align should be passed as")
        data = CIFAR10(root, train=train)
    return data.data, np.array(data.targets, dtype=np.int64)


def _contiguous(pixels: np.ndarray) -> Tensor:
    """Copy torchvision's channel-last view of channel-first memory, so that gathering is fast."""
    return torch.from_numpy(np.ascontiguousarray(pixels))


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, both (channels,) float32.

    Counts the 256 values, which is exact and needs no float copy of the images (600 MB).
    """
    values = torch.arange(256, dtype=torch.float64)
    counts = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(-1)]
    shares = torch.stack(counts).double() / images[..., 0].numel()
    mean = (shares * values).sum(1)
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), std.float()


def _task(*channels: int, kernel_size: int = 3) -> Task:
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
# 77 parameters, and before growing no convolution sees a neighbouring pixel.
IMPAIRED = _task(1, 2, 4, kernel_size=1)
DEEP = _task(8, 16, 32, 64, 128)
