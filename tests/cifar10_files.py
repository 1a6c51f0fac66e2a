"""Random images in CIFAR-10's exact file format, and torchvision told to expect them."""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import tarfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
URL = f"http://127.0.0.1:9/{ARCHIVE}"
"""Nothing listens there."""
NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
BATCH_IMAGES = 20
"""Images per file; the real files have 10,000."""


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    """Writes strings and arrays as Python 2 wrote those of CIFAR-10, which Python 3 cannot."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)

    dispatch[bytes] = dispatch[str] = save_string

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


def python2_pickle(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    # NumPy 2 has renamed the module.
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def write_cifar10(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Write the folder and the archive into `root`.

    Returns:
        Images (n, 32, 32, 3) uint8, all different, and labels (n,) int64, in the order of the
        files; the last `BATCH_IMAGES` are the test images.
    """
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(len(NAMES) * BATCH_IMAGES, 32, 32, 3), dtype=np.uint8)
    images //= np.array([1, 2, 4], dtype=np.uint8)  # so that exchanged channels change the mean
    labels = rng.integers(10, size=len(images))
    # (n, 32, 32, 3) -> (n, 3 * 1024): all red, then all green, then all blue pixels.
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)
    files: dict[str, dict[str, Any]] = {"batches.meta": {"label_names": list("abcdefghij")}}
    for i, name in enumerate(NAMES):
        part = slice(i * BATCH_IMAGES, (i + 1) * BATCH_IMAGES)
        files[name] = {"batch_label": name, "labels": labels[part].tolist(), "data": rows[part]}
    (root / FOLDER).mkdir(parents=True)
    for name, content in files.items():
        (root / FOLDER / name).write_bytes(python2_pickle(content))
    with tarfile.open(root / ARCHIVE, "w:gz") as archive:
        archive.add(root / FOLDER, arcname=FOLDER)
    return images, labels


def torchvision_expects(root: Path) -> AbstractContextManager[Any]:
    """Replace torchvision's checksums of CIFAR-10 by those of the files in `root`."""
    from torchvision.datasets import CIFAR10

    def md5(name: str) -> str:
        return hashlib.md5((root / name).read_bytes(), usedforsecurity=False).hexdigest()

    pairs = [[name, md5(f"{FOLDER}/{name}")] for name in NAMES]
    meta = {**CIFAR10.meta, "md5": md5(f"{FOLDER}/batches.meta")}
    changes = {"train_list": pairs[:-1], "test_list": pairs[-1:], "meta": meta}
    return mock.patch.multiple(CIFAR10, url=URL, tgz_md5=md5(ARCHIVE), **changes)
