"""Tasks: Fashion-MNIST from files in its exact format, and data sets of the user."""

from __future__ import annotations

import gzip
import os
import struct
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import gymnasium as gym
import numpy as np
import pytest
import torch

from esper_env import Host, InstanceRanges, make_splits, register_task
from esper_env.tasks import TASKS, fashion_mnist
from tests.builders import waits

RAW = Path("FashionMNIST/raw")
NUM_TRAIN, NUM_TEST = 620, 40
HOST = Host(in_channels=1, image_size=6, channels=(2, 3), num_classes=4)
IDS = ["Esper-FashionMNIST-v0", "Esper-FashionMNIST-Small-v0"]


def write_idx(path: Path, array: np.ndarray, *, zipped: bool = False) -> None:
    """Write an array of uint8 in the IDX format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if zipped else content)


def write_fashion_mnist(folder: Path, *, zipped: bool = False) -> dict[str, np.ndarray]:
    """Write the four files; return them by name."""
    rng, arrays = np.random.default_rng(0), {}
    for name, count in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
        arrays[f"{name}-images-idx3-ubyte"] = rng.integers(256, size=(count, 28, 28))
        arrays[f"{name}-labels-idx1-ubyte"] = np.arange(count) % 10
    for file, array in arrays.items():
        write_idx(folder / f"{file}{'.gz' if zipped else ''}", array, zipped=zipped)
    return arrays


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, no data of Debian, and an empty cache."""

    def fail(*args: Any, **options: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("source", ["files", "debian"])
def test_fashion_mnist_has_fixed_splits_and_keeps_every_pixel_and_label(
    source: str, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    if source == "files":
        arrays = write_fashion_mnist(folder / RAW)
    else:
        arrays = write_fashion_mnist(tmp_path / "debian", zipped=True)
    splits = fashion_mnist.load_splits(str(folder))
    order = np.random.default_rng(0).permutation(NUM_TRAIN)
    rows = {"train": order[:-500], "validation": order[-500:]}
    for name, own in rows.items():
        split = getattr(splits, name)
        assert np.array_equal(split.images[..., 0], arrays["train-images-idx3-ubyte"][own])
        assert np.array_equal(split.labels, arrays["train-labels-idx1-ubyte"][own])
    assert np.array_equal(splits.test.images[..., 0], arrays["t10k-images-idx3-ubyte"])
    small = fashion_mnist.load_small_splits(str(folder))
    pixels = arrays["t10k-images-idx3-ubyte"].reshape(NUM_TEST, 14, 2, 14, 2)
    assert np.array_equal(small.test.images[..., 0], np.rint(pixels.mean((2, 4))))
    assert np.array_equal(small.validation.labels, splits.validation.labels)
    assert {path.name for path in (folder / RAW).iterdir()} == set(arrays)


@pytest.mark.usefixtures("offline")
def test_without_fashion_mnist_the_error_names_the_remedies(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        fashion_mnist.load_splits(str(tmp_path / "data"))
    for part in ("no network", "dataset-fashion-mnist", "ESPER_DATA_DIR", "Esper-Digits-v0"):
        assert part in str(error.value)


@pytest.mark.usefixtures("offline")
def test_a_damaged_file_of_fashion_mnist_is_named_as_such(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / RAW)
    file = tmp_path / RAW / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileNotFoundError, match="if that is there, it is damaged: delete it"):
        fashion_mnist.load_splits(str(tmp_path))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("env_id", IDS)
def test_both_ids_train_on_the_files(env_id: str, tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path / RAW)
    sizes = {"batches_per_step": 1, "batch_size": 4, "episode_steps": 2}
    envs = gym.make_vec(env_id, num_envs=2, data_dir=str(tmp_path), instances="train", **sizes)
    envs.reset(seed=0)
    for _ in range(2):
        *_, truncated, info = envs.step(waits(2))
    assert truncated.all()
    assert info["_test_accuracy"].all()


@pytest.mark.parametrize("env_id", IDS)
def test_the_real_pictures_of_fashion_mnist(env_id: str, tmp_path: Path) -> None:
    """60,000 pictures, 6,000 of each class, and 10,000 to test; a host learns something."""
    folder = os.environ.get("ESPER_DATA_DIR", "")
    if (
        not fashion_mnist.DEBIAN_FOLDER.is_dir()
        and not (Path(folder) / RAW / "train-images-idx3-ubyte").is_file()
    ):
        pytest.skip("no Fashion-MNIST: apt-get install dataset-fashion-mnist, or ESPER_DATA_DIR")
    task = TASKS["fashion_mnist" if env_id == IDS[0] else "fashion_mnist_small"]
    folder = folder if folder and (Path(folder) / RAW).is_dir() else str(tmp_path)
    splits = task.load(folder)
    labels = torch.cat([splits.train.labels, splits.validation.labels])
    assert labels.bincount().tolist() == 10 * [6000]
    assert splits.test.labels.bincount().tolist() == 10 * [1000]
    envs = gym.make_vec(env_id, num_envs=1, data_dir=folder)
    first = envs.reset(seed=0)[1]["accuracy"][0]
    for _ in range(5):
        *_, info = envs.step(waits(1))
    assert info["accuracy"][0] > max(first, 0.3)


# ------------------------------------------------------------------ own data


def pictures(count: int = 30, **changes: Any) -> tuple[Any, Any]:
    """Return random images for `HOST` and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=changes.get("shape", (count, 6, 6)), dtype=np.uint8)
    return images, np.arange(count) % changes.get("classes", 4)


def own_splits(**changes: Any) -> Any:
    return make_splits(train=pictures(**changes), validation=pictures(), test=pictures())


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget the registrations of a test."""
    tasks, ids = dict(TASKS), set(gym.registry)
    yield
    for name in set(gym.registry) - ids:
        del gym.registry[name]
    TASKS.clear()
    TASKS.update(tasks)


@pytest.mark.usefixtures("registry")
def test_own_data_is_an_id_of_its_own() -> None:
    """Tensors and arrays; the settings of the task are defaults, which keywords override."""
    images, labels = pictures()

    def load(data_dir: str | None) -> Any:
        assert data_dir == "somewhere"
        own = torch.from_numpy(images)[..., None], torch.from_numpy(labels)
        return make_splits(train=own, validation=(images, labels.tolist()), test=pictures())

    settings = {"episode_steps": 3, "batch_size": 4, "data_dir": "somewhere"}
    ranges = InstanceRanges(widths=(1.0,), test_size=7)
    register_task("Own-v0", load, HOST, ranges=ranges, defaults=settings)
    envs: Any = gym.make_vec("Own-v0", num_envs=2, instances="test", batch_size=8)
    assert (envs.unwrapped.config.episode_steps, envs.unwrapped.config.batch_size) == (3, 8)
    assert envs.unwrapped.num_instances == 7
    _, info = envs.reset(seed=0)
    assert (info["host_parameters"] == HOST.num_parameters).all()
    for _ in range(3):
        *_, truncated, info = envs.step(waits(2))
    assert truncated.all()
    splits = own_splits()
    pixels = images.astype(np.float64)
    assert splits.train.mean.item() == pytest.approx(pixels.mean(), rel=1e-6)
    assert splits.train.std.item() == pytest.approx(pixels.std(), rel=1e-6)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"env_id": "Own"}, ValueError, "env_id: expected a name with a version"),
        ({"env_id": "Esper-Digits-v0"}, ValueError, "already registered; choose another"),
        ({"env_id": 3}, TypeError, "env_id: expected str, got 3"),
        ({"load": 3}, TypeError, "load: expected a function of data_dir"),
        ({"host": "mine"}, TypeError, "host: expected Host, got 'mine'"),
        ({"ranges": (1, 2)}, TypeError, "ranges: expected InstanceRanges"),
        ({"defaults": [3]}, TypeError, "defaults: expected Mapping"),
        ({"defaults": {"steps": 3}}, TypeError, "unknown configuration field 'steps'"),
        ({"defaults": {"batch_size": 1}}, ValueError, "batch_size: expected at least 2"),
        ({"defaults": {"task": "own"}}, ValueError, "defaults: expected no 'task'"),
        (
            {"host": Host(in_channels=1, image_size=6, channels=(2, 2, 2), num_classes=4)},
            ValueError,
            "host: expected at most 2 blocks, as each halves the image of 6 pixels, got 3",
        ),
    ],
)
def test_a_wrong_registration_is_refused_and_leaves_nothing(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    before = dict(TASKS), set(gym.registry)
    arguments: dict[str, Any] = {"env_id": "Own-v0", "load": own_splits, "host": HOST, **changes}
    with pytest.raises(error, match=text):
        register_task(**arguments)
    assert before == (dict(TASKS), set(gym.registry))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("load", "error", "text"),
    [
        (
            lambda _: None,
            TypeError,
            "load: expected Splits from the function of the task, got NoneType",
        ),
        (lambda _: own_splits(classes=5), ValueError, "train: expected labels of 0 to 3"),
        (
            lambda _: make_splits(**dict.fromkeys(("train", "validation", "test"), big())),
            ValueError,
            r"train: expected images of shape \(6, 6, 1\).* got \(8, 8, 1\)",
        ),
    ],
)
def test_data_that_do_not_fit_the_host_are_refused_at_the_first_reset(
    load: Any, error: type[Exception], text: str
) -> None:
    register_task("Own-v0", load, HOST)
    env = gym.make("Own-v0")
    with pytest.raises(error, match=text):
        env.reset(seed=0)


def big() -> tuple[Any, Any]:
    return pictures(shape=(30, 8, 8))


@pytest.mark.parametrize(
    ("train", "error", "text"),
    [
        ((np.zeros((3, 6, 6)), [0, 1, 2]), TypeError, "train: expected images of type uint8"),
        ((pictures()[0], np.zeros(30)), TypeError, "train: expected integer labels"),
        ((pictures()[0], np.zeros(30, bool)), TypeError, "train: expected integer labels"),
        ((pictures()[0], [0, 1]), ValueError, "train: expected one label per image"),
        ((pictures()[0], np.arange(30) - 1), ValueError, "labels of at least 0, got -1"),
        ((pictures(shape=(30, 6, 5))[0], np.arange(30)), ValueError, "expected square images"),
        ((np.zeros((0, 6, 6), np.uint8), np.zeros(0, int)), ValueError, "expected square images"),
        (pictures(shape=(30, 8, 8)), ValueError, "the same shape in all splits"),
        ((np.full((3, 6, 6), 7, np.uint8), [0, 1, 2]), ValueError, "same value everywhere"),
    ],
)
def test_wrong_images_and_labels_are_refused(train: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        make_splits(train=train, validation=pictures(), test=pictures())
