"""CIFAR-10: what is loaded, and what happens to downloads, damaged files and missing networks.

Nothing here reaches further than this machine: torchvision expects made-up files from a server on
the loopback interface, or from a port where nothing listens.
"""

from __future__ import annotations

import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from esper_env import EsperEnv, EsperVectorEnv
from esper_env.population.images import ImageSet
from esper_env.tasks import Splits, cifar10
from tests.cifar10_files import (
    ARCHIVE,
    FOLDER,
    TRAIN_NAMES,
    Cifar10Files,
    torchvision_expects,
    write_cifar10,
)

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 60.0
"""For what would otherwise hang."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cifar10Files]:
    made = write_cifar10(tmp_path_factory.mktemp("cifar10") / "source")
    with torchvision_expects(made.source):
        yield made


@pytest.fixture(autouse=True)
def this_machine_only(files: Cifar10Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy between the tests and their server, and no data of the machine's user."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(cifar10.DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(cifar10, "DEFAULT_DATA_DIR", str(tmp_path / "default"))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Return an empty folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def serve(
    body: bytes,
    *,
    announced_bytes: int | None = None,
    together: int = 1,
    then: Callable[[], None] = lambda: None,
) -> AbstractContextManager[tuple[str, list[str]]]:
    """Serve one archive on the loopback interface.

    Args:
        body: What a request gets.
        announced_bytes: Content-Length, if not that of `body`.
        together: Answer only when so many requests wait.
        then: Called when the body is sent, before the connection closes.

    Returns:
        Context of the address and of the paths asked for, which grow with each request.
    """
    requests: list[str] = []
    barrier = threading.Barrier(together)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            barrier.wait(TIMEOUT_SECONDS)
            self.send_response(200)
            self.send_header("Content-Length", str(announced_bytes or len(body)))
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()
            then()

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    @contextmanager
    def running() -> Iterator[tuple[str, list[str]]]:
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_address[1]}/{ARCHIVE}", requests
            finally:
                server.shutdown()
                thread.join()

    return running()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def with_folder(files: Cifar10Files, data_dir: Path) -> Path:
    return Path(shutil.copytree(files.folder, data_dir / FOLDER))


def content(images: ImageSet) -> list[tuple[bytes, int]]:
    pairs = zip(images.images.numpy(), images.labels.tolist(), strict=True)
    return [(image.tobytes(), label) for image, label in pairs]


def assert_same(left: Splits, right: Splits) -> None:
    for name in ("train", "validation", "test"):
        for part in ("images", "labels", "mean", "std"):
            assert torch.equal(
                getattr(getattr(left, name), part), getattr(getattr(right, name), part)
            )


# What is loaded.


def test_helper_writes_what_the_documentation_of_the_set_describes(files: Cifar10Files) -> None:
    """Its page: keys of bytes, rows of 1,024 red, green, blue pixels, row by row."""
    raw = (files.folder / TRAIN_NAMES[1]).read_bytes()
    assert raw.startswith(b"\x80\x02}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of some versions of NumPy
        batch = pickle.loads(raw, encoding="bytes")
    assert list(batch) == [b"batch_label", b"labels", b"data", b"filenames"]
    assert batch[b"batch_label"] == b"training batch 2 of 5"
    assert batch[b"data"].shape == (20, 3072)
    assert batch[b"data"].dtype == np.uint8
    assert batch[b"data"][3, 2 * 1024 + 5 * 32 + 7] == files.train_images[23, 5, 7, 2]
    assert batch[b"labels"] == files.train_labels[20:40].tolist()


def test_images_are_channel_last_to_the_pixel_with_their_labels(
    files: Cifar10Files, data_dir: Path
) -> None:
    with_folder(files, data_dir)
    splits = cifar10.load_splits(str(data_dir))
    assert np.array_equal(splits.test.images.numpy(), files.test_images)
    assert np.array_equal(splits.test.labels.numpy(), files.test_labels)
    expected = [
        (image.tobytes(), label)
        for image, label in zip(files.train_images, files.train_labels.tolist(), strict=True)
    ]
    assert sorted(content(splits.train) + content(splits.validation)) == sorted(expected)
    for split in (splits.train, splits.validation, splits.test):
        assert split.images.dtype == torch.uint8
        assert split.images.is_contiguous()
        assert split.labels.dtype == torch.int64


@pytest.mark.parametrize(("batch_images", "num_validation"), [(20, 4), (2, 1)])
def test_one_training_image_of_25_validates_and_at_least_one(
    tmp_path: Path, batch_images: int, num_validation: int
) -> None:
    files = write_cifar10(tmp_path, batch_images=batch_images, test_images=6)
    with torchvision_expects(tmp_path):
        splits = cifar10.load_splits(str(tmp_path))
    num_train = 5 * batch_images - num_validation
    sizes = len(splits.train), len(splits.validation), len(splits.test)
    assert sizes == (num_train, num_validation, 6)
    train, validation = set(content(splits.train)), set(content(splits.validation))
    assert len(train | validation) == len(files.train_images)
    assert not train & validation


def test_split_is_fixed_whatever_the_global_seeds(files: Cifar10Files, data_dir: Path) -> None:
    with_folder(files, data_dir)
    first = cifar10.load_splits(str(data_dir))
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert_same(first, cifar10.load_splits(str(data_dir)))
    assert torch.equal(torch.get_rng_state(), before)
    # The order of the first images, by their place in the files: changing it changes the task.
    places = {image.tobytes(): i for i, image in enumerate(files.train_images)}
    order = [places[image] for image, _ in content(first.train) + content(first.validation)]
    assert order == np.random.default_rng(0).permutation(100).tolist()


def test_mean_and_std_are_those_of_the_training_split_per_channel(
    files: Cifar10Files, data_dir: Path
) -> None:
    with_folder(files, data_dir)
    splits = cifar10.load_splits(str(data_dir))
    pixels = splits.train.images.numpy().astype(np.float64).reshape(-1, 3)
    for split in (splits.train, splits.validation, splits.test):
        assert split.mean.dtype == split.std.dtype == torch.float32
        # Rounding to float32 is the only error.
        np.testing.assert_allclose(split.mean.numpy(), pixels.mean(0), rtol=1e-7)
        np.testing.assert_allclose(split.std.numpy(), pixels.std(0), rtol=1e-7)


def test_warnings_of_numpy_that_no_user_can_act_on_are_not_shown(
    files: Cifar10Files, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NumPy 2.4.0 to 2.4.4 give this one for the real files; other versions give none."""
    plain_load = pickle.load

    def load(*args: Any, **kwargs: Any) -> Any:
        text = "dtype(): align should be passed as Python or NumPy boolean but got `align=0`."
        warnings.warn(text, np.exceptions.VisibleDeprecationWarning, stacklevel=2)
        return plain_load(*args, **kwargs)

    with_folder(files, data_dir)
    monkeypatch.setattr(pickle, "load", load)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cifar10.load_splits(str(data_dir))


def test_hosts_are_those_of_the_design() -> None:
    tasks = cifar10.STANDARD, cifar10.IMPAIRED, cifar10.DEEP
    hosts = [task.host for task in tasks]
    assert [host.channels for host in hosts] == [(8, 16, 32), (1, 2, 4), (8, 16, 32, 64, 128)]
    assert [host.kernel_size for host in hosts] == [3, 1, 3]
    # Convolutions 3 + 2 + 8, norms 2 * (1 + 2 + 4), head 4 * 10 + 10.
    assert hosts[1].num_parameters == 77
    for host in hosts:
        assert (host.in_channels, host.image_size, host.num_classes) == (3, 32, 10)
        assert host.slot_size(host.num_slots - 1) >= 2


SMALL = {"batches_per_step": 1, "batch_size": 8, "episode_steps": 5, "max_episode_steps": 5}


@pytest.mark.parametrize("name", ["", "-Impaired", "-Deep"])
def test_every_id_trains_on_the_data_in_data_dir(
    name: str, files: Cifar10Files, data_dir: Path
) -> None:
    with_folder(files, data_dir)
    envs = gym.make_vec(
        f"Esper-CIFAR10{name}-v0", num_envs=2, data_dir=str(data_dir), instances="train", **SMALL
    )
    unwrapped = envs.unwrapped
    assert isinstance(unwrapped, EsperVectorEnv)
    observation, info = envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(7):
        assert envs.observation_space.contains(observation)
        observation, reward, *_, info = envs.step(unwrapped.sample_valid_actions(rng))
        assert np.isfinite(reward).all()
    assert info["samples"].tolist() == [8, 8]
    assert envs.spec is not None
    assert gym.spec(f"Esper-CIFAR10{name}-v0").max_episode_steps == 150


def test_the_single_environment_passes_gymnasiums_checker(
    files: Cifar10Files, data_dir: Path
) -> None:
    with_folder(files, data_dir)
    env = gym.make("Esper-CIFAR10-Impaired-v0", data_dir=str(data_dir), **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped, skip_render_check=True)


def test_environments_of_a_process_share_one_copy_of_the_data(
    files: Cifar10Files, data_dir: Path
) -> None:
    """Another task with the same data too."""
    with_folder(files, data_dir)
    images = []
    for name in ("Esper-CIFAR10-v0", "Esper-CIFAR10-Impaired-v0"):
        envs = EsperVectorEnv(**{**gym.spec(name).kwargs, **SMALL, "data_dir": str(data_dir)})
        envs.reset(seed=0)
        assert envs._simulation is not None
        images.append(envs._simulation.splits.train.images)
    assert images[0] is images[1]


def test_without_data_and_network_the_first_reset_says_what_to_do(data_dir: Path) -> None:
    """Making the environment needs neither."""
    env = gym.make("Esper-CIFAR10-v0", data_dir=str(data_dir))
    with pytest.raises(FileNotFoundError, match=f"CIFAR-10 is not in {re.escape(str(data_dir))}"):
        env.reset(seed=0)


# Downloads.


def test_first_use_downloads_once_and_says_so_in_one_line(
    files: Cifar10Files, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data_dir = tmp_path / "not" / "there" / "yet"
    body = files.archive.read_bytes()
    with serve(body) as (url, requests), torchvision_expects(files.source, url):
        first = cifar10.load_splits(str(data_dir))
        out, err = capfd.readouterr()
        second = cifar10.load_splits(str(data_dir))
        assert requests == [f"/{ARCHIVE}"]
    assert (out, err) == ("", f"Downloading CIFAR-10 (170 MB) from {url} to {data_dir}\n")
    assert capfd.readouterr() == ("", "")
    assert names_in(data_dir) == [FOLDER]
    assert_same(first, second)


def test_data_that_is_there_needs_no_network(files: Cifar10Files, data_dir: Path) -> None:
    with_folder(files, data_dir)
    cifar10.load_splits(str(data_dir))
    assert names_in(data_dir) == [FOLDER]


def test_archive_placed_by_hand_is_extracted_without_network(
    files: Cifar10Files, data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(files.archive, data_dir)
    splits = cifar10.load_splits(str(data_dir))
    assert np.array_equal(splits.test.images.numpy(), files.test_images)
    assert names_in(data_dir) == [FOLDER, ARCHIVE]
    assert capfd.readouterr() == ("", "")


def test_data_dir_comes_from_the_argument_then_the_variable_then_the_default(
    files: Cifar10Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("argument", "variable", "default"):
        with_folder(files, tmp_path / name)

    def moved_away(name: str) -> None:
        (tmp_path / name).rename(tmp_path / f"no {name}")

    monkeypatch.setenv("ESPER_DATA_DIR", str(tmp_path / "variable"))
    moved_away("default")
    cifar10.load_splits()
    moved_away("variable")
    cifar10.load_splits(str(tmp_path / "argument"))
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "variable"))):
        cifar10.load_splits()
    monkeypatch.delenv("ESPER_DATA_DIR")
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "default"))):
        cifar10.load_splits()


def test_default_data_dir_is_in_the_users_cache(
    files: Cifar10Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("ESPER_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with_folder(files, tmp_path / ".cache" / "esper")
    cifar10.load_splits(None)


# What goes wrong.


def test_without_a_network_the_error_names_the_folder_and_the_remedies(
    data_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from torchvision.datasets import CIFAR10

    with pytest.raises(FileNotFoundError) as caught:
        cifar10.load_splits(str(data_dir))
    assert str(caught.value) == (
        f"CIFAR-10 is not in {data_dir} and could not be fetched: {caught.value.__cause__}\n"
        "Expected there: the folder cifar-10-batches-py or the archive cifar-10-python.tar.gz.\n"
        "Remedies, any of them:\n"
        "- connect to the internet for the first use;\n"
        f"- put {CIFAR10.url} into {data_dir} by hand;\n"
        "- name the folder that has it: data_dir=... or the variable ESPER_DATA_DIR;\n"
        "- use Esper-Digits-v0, which needs no download."
    )
    assert "refused" in str(caught.value.__cause__)
    assert names_in(data_dir) == []
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_download_with_a_wrong_checksum_is_refused_and_removed(
    files: Cifar10Files, data_dir: Path
) -> None:
    body = b"<html>log in to this hotel's network</html>"
    with serve(body) as (url, requests), torchvision_expects(files.source, url):
        expected = f"wrong checksum of the 43 bytes that came from {re.escape(url)}"
        with pytest.raises(FileNotFoundError, match=expected):
            cifar10.load_splits(str(data_dir))
        assert len(requests) == 1
    assert names_in(data_dir) == []


def test_connection_that_breaks_off_leaves_nothing_and_the_next_use_starts_again(
    files: Cifar10Files, data_dir: Path
) -> None:
    body = files.archive.read_bytes()
    half = body[: len(body) // 2]
    with (
        serve(half, announced_bytes=len(body)) as (url, _),
        torchvision_expects(files.source, url),
        pytest.raises(FileNotFoundError, match=f"{len(half):,} bytes|IncompleteRead"),
    ):
        cifar10.load_splits(str(data_dir))
    assert names_in(data_dir) == []
    with serve(body) as (url, _), torchvision_expects(files.source, url):
        cifar10.load_splits(str(data_dir))


def test_server_that_says_nothing_is_given_up(
    files: Cifar10Files, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "STALL_SECONDS", 0.1)
    given_up = threading.Event()

    def stall() -> None:
        assert given_up.wait(TIMEOUT_SECONDS)

    with (
        serve(b"", announced_bytes=10, then=stall) as (url, _),
        torchvision_expects(files.source, url),
    ):
        with pytest.raises(FileNotFoundError, match="timed out"):
            cifar10.load_splits(str(data_dir))
        given_up.set()
    assert names_in(data_dir) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals a thread")
def test_keyboard_interrupt_during_a_download_leaves_nothing(
    files: Cifar10Files, data_dir: Path
) -> None:
    body = files.archive.read_bytes()
    main = threading.get_ident()
    interrupted = threading.Event()

    def interrupt() -> None:
        signal.pthread_kill(main, signal.SIGINT)
        assert interrupted.wait(TIMEOUT_SECONDS)

    with (
        serve(body[:-1], announced_bytes=len(body), then=interrupt) as (url, _),
        torchvision_expects(files.source, url),
    ):
        with pytest.raises(KeyboardInterrupt):
            cifar10.load_splits(str(data_dir))
        interrupted.set()
    assert names_in(data_dir) == []


def test_what_a_killed_process_left_is_not_taken_for_the_data(
    files: Cifar10Files, data_dir: Path
) -> None:
    left = data_dir / ".cifar-10-abcdefgh"
    with_folder(files, left)
    (left / FOLDER / TRAIN_NAMES[4]).unlink()
    (left / ARCHIVE).write_bytes(b"half")
    with serve(files.archive.read_bytes()) as (url, requests):
        with torchvision_expects(files.source, url):
            cifar10.load_splits(str(data_dir))
        assert len(requests) == 1


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_damaged_folder_is_neither_used_nor_overwritten(
    files: Cifar10Files, data_dir: Path, name: str, damage: str
) -> None:
    folder = with_folder(files, data_dir)
    shutil.copy(files.archive, data_dir)
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(b"mine")
    with pytest.raises(OSError, match="is damaged") as caught:
        cifar10.load_splits(str(data_dir))
    assert type(caught.value) is OSError
    assert str(caught.value) == (
        f"{folder} is damaged (missing or with a wrong checksum: {name}). "
        "Delete it or choose another data_dir (or ESPER_DATA_DIR)."
    )
    assert (folder / name).exists() == (damage == "changed")
    assert damage == "missing" or (folder / name).read_bytes() == b"mine"


def test_damaged_archive_is_neither_used_nor_overwritten(
    files: Cifar10Files, data_dir: Path
) -> None:
    archive = data_dir / ARCHIVE
    archive.write_bytes(files.archive.read_bytes()[:-1])
    before = archive.read_bytes()
    with serve(files.archive.read_bytes()) as (url, requests):
        with (
            torchvision_expects(files.source, url),
            pytest.raises(OSError, match=f"^{re.escape(str(archive))} is damaged .*Delete it or"),
        ):
            cifar10.load_splits(str(data_dir))
        assert requests == []
    assert names_in(data_dir) == [ARCHIVE]
    assert archive.read_bytes() == before


def test_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"could not be fetched: .*file"):
        cifar10.load_splits(str(tmp_path / "file" / "data"))


# Processes.


@pytest.mark.slow
def test_two_processes_that_start_at_once_both_get_the_data(
    files: Cifar10Files, data_dir: Path
) -> None:
    """The server answers when both have asked, so both download and one comes second."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from esper_env.tasks import cifar10\n"
        "from tests.cifar10_files import torchvision_expects\n"
        "with torchvision_expects(Path(sys.argv[2]), sys.argv[3]):\n"
        "    splits = cifar10.load_splits(sys.argv[4])\n"
        "print(len(splits.train), int(splits.test.images.long().sum()))\n"
    )
    with serve(files.archive.read_bytes(), together=2) as (url, requests):
        command = [sys.executable, "-c", code, str(ROOT), str(files.source), url, str(data_dir)]
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, text=True) for _ in "ab"
        ]
        try:
            outputs = [process.communicate(timeout=TIMEOUT_SECONDS)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert len(requests) == 2
    assert outputs == [f"96 {files.test_images.astype(np.int64).sum()}\n"] * 2
    assert names_in(data_dir) == [FOLDER]


def test_importing_the_environment_does_not_import_torchvision() -> None:
    code = (
        "import sys, esper_env, esper_env.tasks.cifar10\n"
        "assert not [name for name in sys.modules if name.startswith('torchvision')]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_ids_have_the_lengths_of_the_design_and_can_be_shortened() -> None:
    """150 steps alone and in a batch; Gymnasium passes its limit to the latter only."""
    for name in ("", "-Impaired", "-Deep"):
        name = f"Esper-CIFAR10{name}-v0"
        single = gym.make(name).unwrapped
        assert isinstance(single, EsperEnv)
        batch = gym.make_vec(name, num_envs=2).unwrapped
        short = gym.make_vec(name, num_envs=2, max_episode_steps=7, batch_size=16).unwrapped
        assert isinstance(batch, EsperVectorEnv)
        assert isinstance(short, EsperVectorEnv)
        assert single.config == batch.config
        assert (batch.config.episode_steps, batch.config.batch_size) == (150, 128)
        assert (short.config.episode_steps, short.config.batch_size) == (7, 16)
