"""A few made-up images in CIFAR-10's exact format on disk, and torchvision told to expect them.

The real files are pickles of Python 2, whose strings are neither text nor bytes to Python 3:
`pickle.load(..., encoding="bytes")` gives keys like `b"data"`, torchvision's `"latin1"` gives
`"data"`. Python 3 cannot write such strings, so the few opcodes are put together here.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
NOWHERE = f"http://127.0.0.1:9/{ARCHIVE}"
"""Nothing listens there: a test that downloads without saying so fails, and fast."""
TRAIN_NAMES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_NAME = "test_batch"
META_NAME = "batches.meta"
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


@dataclass(frozen=True, kw_only=True)
class Cifar10Files:
    """A folder with `cifar-10-batches-py` and its archive, and what the images are."""

    source: Path
    """Holds both the extracted folder and the archive."""
    train_images: np.ndarray
    """(n, 32, 32, 3) uint8, in the order of the files; all differ."""
    train_labels: np.ndarray
    """(n,) int64."""
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def folder(self) -> Path:
        """The extracted data."""
        return self.source / FOLDER

    @property
    def archive(self) -> Path:
        """The compressed data."""
        return self.source / ARCHIVE


def write_cifar10(
    source: Path, *, batch_images: int = 20, test_images: int = 30, seed: int = 0
) -> Cifar10Files:
    """Write random images.

    Args:
        source: Where to put folder and archive; made if missing.
        batch_images: Images in each of the five training files.
        test_images: Images in the test file.
        seed: Of the images and labels.
    """
    rng = np.random.default_rng(seed)
    num_train = len(TRAIN_NAMES) * batch_images
    images = rng.integers(256, size=(num_train + test_images, 32, 32, 3), dtype=np.uint8)
    # Channels differ in brightness, so that mixing them up shows in the mean.
    images //= np.array([1, 2, 4], dtype=np.uint8)
    labels = rng.integers(10, size=len(images))
    folder = source / FOLDER
    folder.mkdir(parents=True)
    parts = np.split(np.arange(len(images)), np.arange(1, 6) * batch_images)
    captions = [f"training batch {i} of 5" for i in range(1, 6)] + ["testing batch 1 of 1"]
    for name, caption, part in zip((*TRAIN_NAMES, TEST_NAME), captions, parts, strict=True):
        _write(folder / name, _batch(caption, images[part], labels[part]))
    meta = {
        b"num_cases_per_batch": batch_images,
        b"label_names": [name.encode() for name in CLASSES],
        b"num_vis": 3072,
    }
    _write(folder / META_NAME, meta)
    with tarfile.open(source / ARCHIVE, "w:gz") as archive:
        archive.add(folder, arcname=FOLDER)
    return Cifar10Files(
        source=source,
        train_images=images[:num_train],
        train_labels=labels[:num_train],
        test_images=images[num_train:],
        test_labels=labels[num_train:],
    )


@contextmanager
def torchvision_expects(source: Path, url: str = NOWHERE) -> Iterator[None]:
    """Make torchvision take the files of `write_cifar10` for CIFAR-10; its code stays in use.

    Args:
        source: Holds folder and archive; their checksums now are the right ones.
        url: Where the archive is downloaded from.
    """
    from torchvision.datasets import CIFAR10

    def expected(name: str) -> list[str]:
        return [name, _md5(source / FOLDER / name)]

    meta = {"filename": META_NAME, "key": "label_names", "md5": _md5(source / FOLDER / META_NAME)}
    with mock.patch.multiple(
        CIFAR10,
        url=url,
        tgz_md5=_md5(source / ARCHIVE),
        train_list=[expected(name) for name in TRAIN_NAMES],
        test_list=[expected(TEST_NAME)],
        meta=meta,
    ):
        yield


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def _batch(caption: str, images: np.ndarray, labels: np.ndarray) -> dict[bytes, object]:
    """Return one file's content; a row is all red, then all green, then all blue pixels."""
    rows = np.concatenate([images[..., c].reshape(len(images), 1024) for c in range(3)], axis=1)
    return {
        b"batch_label": caption.encode(),
        b"labels": labels.tolist(),
        b"data": rows,
        b"filenames": [f"made_up_s_{i:06d}.png".encode() for i in range(len(images))],
    }


def _write(path: Path, content: dict[bytes, object]) -> None:
    path.write_bytes(pickle.PROTO + b"\x02" + _python2_pickle(content) + pickle.STOP)


def _python2_pickle(value: object) -> bytes:
    """Return the opcodes that Python 2 and its NumPy wrote for a value, less the memo."""
    match value:
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            return pickle.BININT + struct.pack("<i", value)
        case bytes():
            return pickle.BINSTRING + struct.pack("<i", len(value)) + value
        case tuple():
            return pickle.MARK + _joined(value) + pickle.TUPLE
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + _joined(value) + pickle.APPENDS
        case dict():
            items = [part for item in value.items() for part in item]
            return pickle.EMPTY_DICT + pickle.MARK + _joined(items) + pickle.SETITEMS
        case np.ndarray():
            assert value.dtype == np.uint8
            make = pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n"
            make += pickle.MARK + pickle.GLOBAL + b"numpy\nndarray\n"
            make += _joined([(0,), b"b"]) + pickle.TUPLE + pickle.REDUCE
            state = pickle.MARK + _joined([1, value.shape]) + _python2_uint8()
            state += _joined([False, value.tobytes()]) + pickle.TUPLE
            return make + state + pickle.BUILD
    raise AssertionError(type(value))


def _python2_uint8() -> bytes:
    # The flags 0 and 1 are integers, of which NumPy 2.4.0 to 2.4.4 warn.
    make = pickle.GLOBAL + b"numpy\ndtype\n" + _python2_pickle((b"u1", 0, 1)) + pickle.REDUCE
    return make + _python2_pickle((3, b"|", None, None, None, -1, -1, 0)) + pickle.BUILD


def _joined(values: Sequence[object]) -> bytes:
    return b"".join(map(_python2_pickle, values))
