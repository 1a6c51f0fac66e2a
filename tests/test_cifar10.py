"""CIFAR-10: its splits, its files on disk, and errors. Uses random images and no network."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from http.client import BadStatusLine
from pathlib import Path
from typing import Any
from urllib.error import URLError

import gymnasium as gym
import numpy as np
import pytest
import torch

from esper_env import EsperEnv, EsperVectorEnv
from esper_env.tasks import TASKS, cifar10
from tests.cifar10_files import (
    ARCHIVE,
    BATCH_IMAGES,
    FOLDER,
    URL,
    torchvision_expects,
    write_cifar10,
)

ROOT = Path(__file__).parent.parent
IDS = ["Esper-CIFAR10-v0", "Esper-CIFAR10-Impaired-v0", "Esper-CIFAR10-Deep-v0"]
SMALL = {"batches_per_step": 1, "batch_size": 8, "episode_steps": 5}
OFFLINE = URLError("no network")


class Response(io.BytesIO):
    url = length = None


class Data:
    """A generated data set, and the server that torchvision downloads it from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images, self.labels = write_cifar10(root)
        self.archive = (root / ARCHIVE).read_bytes()
        self.reply: bytes | Exception = OFFLINE

    def urlopen(self, request: urllib.request.Request) -> Response:
        if isinstance(self.reply, Exception):
            raise self.reply
        return Response(self.reply)

    def copy_folder(self, data_dir: Path) -> Path:
        return Path(shutil.copytree(self.root / FOLDER, data_dir / FOLDER))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Data]:
    data = Data(tmp_path / "generated")
    monkeypatch.setattr(urllib.request, "urlopen", data.urlopen)
    monkeypatch.setenv("HOME", str(tmp_path))
    with torchvision_expects(data.root):
        yield data


def test_splits_are_fixed_and_disjoint_and_keep_every_pixel_and_label(data: Data) -> None:
    """Of 25 training images one is for validation; the order is part of the task."""
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)
    before = torch.get_rng_state()
    splits = cifar10.load_splits(str(data.root))
    assert torch.equal(torch.get_rng_state(), before)
    # An intact copy may be read-only: no lock file.
    assert {path.name for path in data.root.iterdir()} == {FOLDER, ARCHIVE}
    assert 50_000 // cifar10.IMAGES_PER_VALIDATION_IMAGE == 2_000
    order = np.random.default_rng(0).permutation(100)
    rows = {"train": order[:96], "validation": order[96:], "test": np.arange(100, 120)}
    pixels = data.images[rows["train"]].reshape(-1, 3).astype(np.float64)
    for name, expected in rows.items():
        split = getattr(splits, name)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert split.images.is_contiguous()
        assert np.array_equal(split.images.numpy(), data.images[expected])
        assert np.array_equal(split.labels.numpy(), data.labels[expected])
        assert split.mean.dtype == split.std.dtype == torch.float32
        # Rounding to float32 is the only error.
        np.testing.assert_allclose(split.mean.numpy(), pixels.mean(0), rtol=1e-7)
        np.testing.assert_allclose(split.std.numpy(), pixels.std(0), rtol=1e-7)


def test_tasks_have_the_hosts_of_the_design_and_one_data_set() -> None:
    tasks = [TASKS[name] for name in ("cifar10", "cifar10_impaired", "cifar10_deep")]
    hosts = [task.host for task in tasks]
    assert [host.channels for host in hosts] == [(8, 16, 32), (1, 2, 4), (8, 16, 32, 64, 128)]
    assert [host.kernel_size for host in hosts] == [3, 1, 3]
    # Convolutions 3 + 2 + 8, norms 2 * (1 + 2 + 4), head 4 * 10 + 10.
    assert hosts[1].num_parameters == 77
    for host in hosts:
        assert (host.in_channels, host.image_size, host.num_classes) == (3, 32, 10)
    # Data is kept once per function.
    assert len({task.load for task in tasks}) == 1


@pytest.mark.parametrize("env_id", IDS)
def test_every_id_trains_on_the_data_in_data_dir(env_id: str, data: Data) -> None:
    """An episode has 150 env steps unless shortened, alone and in a batch."""
    single, batch = gym.make(env_id).unwrapped, gym.make_vec(env_id, num_envs=2).unwrapped
    assert isinstance(single, EsperEnv)
    assert isinstance(batch, EsperVectorEnv)
    assert single.config == batch.config
    assert (batch.config.episode_steps, batch.config.batch_size) == (150, 128)
    envs = gym.make_vec(env_id, num_envs=2, data_dir=str(data.root), instances="train", **SMALL)
    observation, info = envs.reset(seed=0)
    for _ in range(7):
        assert envs.observation_space.contains(observation)
        actions = envs.unwrapped.sample_valid_actions(np.random.default_rng(0))  # type: ignore[attr-defined]
        observation, reward, *_, info = envs.step(actions)
        assert np.isfinite(reward).all()
    assert info["samples"].tolist() == [8, 8]  # of the second episode's first step


def test_training_images_are_augmented(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss() -> float:
        env = gym.make(IDS[0], data_dir=str(data.root), **SMALL)
        env.reset(seed=0)
        wait = np.zeros(env.action_space.shape or 0, dtype=np.int64)
        return float(env.step(wait)[4]["loss"])

    augmented = loss()
    assert augmented == loss()
    monkeypatch.setitem(TASKS, "cifar10", dataclasses.replace(TASKS["cifar10"], augments=False))
    assert augmented != loss()


def test_data_dir_is_the_argument_else_the_variable_else_the_users_cache(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for argument, variable, folder in (
        (f"{tmp_path}/argument", f"{tmp_path}/variable", "argument"),
        (None, f"{tmp_path}/variable", "variable"),
        (None, "", ".cache/esper"),
    ):
        monkeypatch.setenv("ESPER_DATA_DIR", variable)
        with pytest.raises(FileNotFoundError, match=re.escape(f"from {tmp_path / folder} or")):
            cifar10.load_splits(argument)
        data.copy_folder(tmp_path / folder)
        cifar10.load_splits(argument)


@pytest.mark.parametrize("place", ["server", "archive", "partial archive", "damaged folder"])
def test_missing_data_comes_from_the_archive_and_then_needs_no_network(
    place: str, data: Data, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data_dir = tmp_path / "not" / "there" / "yet"
    if place == "damaged folder":
        (data.copy_folder(data_dir) / "test_batch").unlink()
    if "archive" in place:
        data_dir.mkdir(parents=True)
        (data_dir / ARCHIVE).write_bytes(data.archive[: -1 if "partial" in place else None])
    if place != "archive":
        data.reply = data.archive
    splits = cifar10.load_splits(str(data_dir))
    assert np.array_equal(splits.test.images.numpy(), data.images[-BATCH_IMAGES:])
    data.reply = OFFLINE
    (data_dir / ARCHIVE).unlink()
    cifar10.load_splits(str(data_dir))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("error", [OFFLINE, BadStatusLine("?")])
def test_without_data_and_network_the_first_reset_says_what_to_do(
    error: Exception, data: Data, tmp_path: Path
) -> None:
    data.reply = error
    env = gym.make(IDS[0], data_dir=str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as caught:
        env.reset(seed=0)
    assert str(caught.value) == (
        f"CIFAR-10 could not be read from {tmp_path}/data or downloaded to it: {error}\n"
        "Expected there: the folder cifar-10-batches-py or the archive cifar-10-python.tar.gz, "
        "with torchvision's checksums.\nAny of these helps:\n"
        "- connect to the internet\n"
        f"- copy {URL} into {tmp_path}/data\n"
        "- set data_dir or the environment variable ESPER_DATA_DIR to the folder that contains it\n"
        "- if that is there, it is damaged: delete it\n"
        "- use Esper-Digits-v0, which needs no download"
    )


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("place", ["folder", "archive", "server"])
def test_a_file_with_a_wrong_checksum_is_never_unpickled(
    name: str, place: str, data: Data, tmp_path: Path
) -> None:
    trap = pickle.dumps(Trap(tmp_path / "unpickled"))
    data_dir = tmp_path / "data"
    (data.copy_folder(data_dir) / name).write_bytes(trap)
    if place != "folder":
        with tarfile.open(data_dir / ARCHIVE, "w:gz") as archive:
            archive.add(data_dir / FOLDER, arcname=FOLDER)
        shutil.rmtree(data_dir / FOLDER)
    if place == "server":
        data.reply = (data_dir / ARCHIVE).read_bytes()
    with pytest.raises(FileNotFoundError, match="delete it"):
        cifar10.load_splits(str(data_dir))
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(trap)
    assert (tmp_path / "unpickled").exists()


@pytest.mark.slow
def test_a_process_waits_while_another_one_downloads(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process cannot download; it looks when half of the archive is written."""
    code = (
        "import pathlib, sys\n"
        "from esper_env.tasks import cifar10\n"
        "assert 'torchvision' not in sys.modules, 'imported before it is needed'\n"
        "from torchvision.datasets import CIFAR10\n"
        "from tests.cifar10_files import torchvision_expects\n"
        "check = CIFAR10._check_integrity\n"
        "CIFAR10._check_integrity = lambda self: print(ok := check(self), flush=True) or ok\n"
        "with torchvision_expects(pathlib.Path(sys.argv[1])):\n"
        "    cifar10.load_splits(sys.argv[2])\n"
    )
    second = []

    class HalfWay(Response):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() and not second:
                command = [sys.executable, "-c", code, str(data.root), str(tmp_path)]
                second.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE))
                assert second[0].stdout.readline() == b"False\n"  # type: ignore[union-attr]
            return super().read(len(data.archive) // 2 + 1)

    monkeypatch.setattr(urllib.request, "urlopen", lambda request: HalfWay(data.archive))
    cifar10.load_splits(str(tmp_path))
    assert second[0].wait() == 0


def test_the_training_script_trains_on_it(data: Data, tmp_path: Path) -> None:
    """The documented command with fewer and smaller batches: two whole episodes per rollout."""
    run = tmp_path / "run"
    command = (
        "-m esper_agent.ppo_lstm --env-id Esper-CIFAR10-v0 --num-steps 150 --num-envs 2 "
        "--group-size 2 --num-minibatches 2 --total-timesteps 600 --eval-episodes 2 "
        f"--env.data-dir {data.root} --env.batches-per-step 1 --env.batch-size 8 --run-dir {run}"
    ).split()
    code = f"""
import sys
from pathlib import Path
from esper_agent import ppo_lstm
from tests.cifar10_files import torchvision_expects
sys.argv = {["ppo_lstm", *command[2:]]}
with torchvision_expects(Path({str(data.root)!r})):
    ppo_lstm.main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step 600" in done.stdout
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [300, 600]
    assert "charts/episodic_score" in rows[-1], "an episode has ended"
    assert json.loads((run / "evaluation.json").read_text())
