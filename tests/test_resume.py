"""Runs that are interrupted, resumed, or meet a full disk, and the errors of their commands.

Two hosts with one batch of 8 images per env step; five iterations of 3 env steps over episodes of
4, so that every checkpoint is taken in the middle of episodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shutil
import signal
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks import kill_runs
from benchmarks.kill_runs import in_process, operations_watched, results_of
from esper_agent import checkpoint, evaluate, ppo_lstm
from esper_agent.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_latest_checkpoint,
    save_checkpoint,
)
from esper_agent.networks import load_network
from esper_agent.ppo_lstm import Agent, Args, load_args, train
from esper_agent.run import DivergedError, Interrupted, NotSavedError
from tests.builders import ID

STEPS = 6
"""Env steps of one iteration."""
IDENTITY = {"env_id": ID, "num_envs": 2}


def small(directory: Path, **changes: Any) -> Args:
    """Arguments of a run that is saved after every iteration and not evaluated."""
    return kill_runs.small_training(directory, **({"eval_episodes": 0} | changes))


@pytest.fixture(name="whole", scope="module")
def run_without_interruption(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must end like."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    with contextlib.redirect_stdout(io.StringIO()):
        return train(small(directory))


@contextlib.contextmanager
def before_iteration(number: int, action: Callable[[], object]) -> Iterator[None]:
    """Do something once, before an iteration that is counted from 0."""
    run_iteration, count = ppo_lstm.run_iteration, 0

    def watched(*arguments: Any) -> Any:
        nonlocal count
        if count == number:
            action()
        count += 1
        return run_iteration(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_lstm, "run_iteration", watched)
        yield


def interrupt(directory: Path, number: int = 2, **changes: Any) -> None:
    """Start a run and end it by SIGTERM in an iteration that is counted from 0."""
    stop = before_iteration(number, lambda: signal.raise_signal(signal.SIGTERM))
    with stop, pytest.raises(Interrupted):
        train(small(directory, **changes))


def call(main: Callable[[], None], *arguments: object) -> int:
    """Call a command with arguments; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *map(str, arguments)])
        try:
            main()
        except SystemExit as error:
            return int(error.code or 0)
    return 0


# ------------------------------------------------------------------ kills and signals


def test_killed_runs_end_bitwise_like_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """SIGKILL at random times and in the middle of writes; benchmarks/kill_runs.py does more."""
    seed = int(np.random.default_rng().integers(2**31))
    for record in kill_runs.compare(tmp_path, 3, seed):
        assert record["differing"] == [], f"seed {seed}, kills at {record['kills']}"


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)], ids=str
)
def test_a_signal_finishes_the_iteration_and_saves(
    name: str, code: int, tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 128 plus its number; handlers are restored; the resumed run ends as the whole."""
    number = signal.Signals[name]
    before = signal.signal(number, signal.default_int_handler)
    stop = before_iteration(1, lambda: signal.raise_signal(number))
    with stop, pytest.raises(Interrupted) as caught:
        train(small(tmp_path / "run", checkpoint_minutes=60.0))
    assert signal.signal(number, before) is signal.default_int_handler
    assert caught.value.code == code
    message = f"interrupted by {name} at step {2 * STEPS}; continue with --resume {tmp_path}"
    assert message in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("*.json")] == [
        f"step-{2 * STEPS:012d}.json"
    ]
    train(load_args(str(tmp_path / "run")))
    assert results_of(tmp_path / "run") == results_of(whole)


def send_twice(directory: Path) -> None:
    """Send SIGTERM twice within one iteration."""

    def send() -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

    with contextlib.redirect_stdout(io.StringIO()), before_iteration(1, send):
        train(small(directory))


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    assert in_process(send_twice, tmp_path / "run") == -signal.SIGTERM
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["step"] == STEPS


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path, whole: Path) -> None:
    """As with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with before_iteration(1, lambda: signal.raise_signal(signal.SIGHUP)):
        train(small(tmp_path / "run"))
    signal.signal(signal.SIGHUP, before)
    assert results_of(tmp_path / "run") == results_of(whole)


def test_a_training_in_another_thread_leaves_signals_alone(tmp_path: Path, whole: Path) -> None:
    """Only the main thread can install handlers."""
    seen: list[Any] = []
    look = before_iteration(1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    with look, ThreadPoolExecutor(1) as pool:
        pool.submit(train, small(tmp_path / "run")).result()
    assert seen == [signal.getsignal(signal.SIGTERM)]
    assert results_of(tmp_path / "run") == results_of(whole)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_signal_in_the_evaluation_ends_it_and_resuming_repeats_it(
    is_resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, as all but the evaluation is saved; also where no iteration was left to do."""
    args = small(tmp_path / "run", eval_episodes=2)
    if is_resumed:
        interrupt(tmp_path / "run", 4, eval_episodes=2)
        args = load_args(tmp_path / "run")
    with monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        # Shells start background jobs with SIGINT ignored, and it would stay so.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        stack.callback(signal.signal, signal.SIGINT, before)
        stop = lambda *_: signal.raise_signal(signal.SIGINT)  # noqa: E731
        patch.setattr(ppo_lstm, "evaluate_beside_baselines", stop)
        with pytest.raises(Interrupted) as caught:
            train(args)
    assert caught.value.code == 130
    assert not (tmp_path / "run" / "finished.json").exists()
    train(load_args(tmp_path / "run"))
    assert (tmp_path / "run" / "evaluation.json").exists()
    assert (tmp_path / "run" / "finished.json").exists()


def close_stdout(directory: Path, iteration: int) -> None:
    """Train while the reader of stdout goes away, before an iteration or at once."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(writer)
    sys.stdout = os.fdopen(1, "w")
    sys.stdout.write("Something that waits to be printed.")
    if iteration < 0:
        os.close(reader)
    with before_iteration(iteration, lambda: os.close(reader)):
        train(small(directory, eval_episodes=2))


@pytest.mark.parametrize("iteration", [-1, 1])
def test_a_reader_of_stdout_that_goes_away_does_not_end_a_training(
    iteration: int, tmp_path: Path
) -> None:
    assert in_process(close_stdout, tmp_path / "run", iteration) == 0
    assert (tmp_path / "run" / "finished.json").exists()


# ------------------------------------------------------------------ resume


def test_a_moved_run_continues_with_its_logs_cut_back(tmp_path: Path, whole: Path) -> None:
    """Rows after the checkpoint are removed, half a line too; TensorBoard has each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    interrupt(tmp_path / "old", 3)
    for path in (tmp_path / "old" / "checkpoints").glob(f"step-{4 * STEPS:012d}.*"):
        path.unlink()
    with (tmp_path / "old" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "losses/valu')
    (tmp_path / "old").rename(tmp_path / "new")
    train(load_args(tmp_path / "new"))
    assert not (tmp_path / "old").exists()
    assert results_of(tmp_path / "new") == results_of(whole)
    events = EventAccumulator(str(tmp_path / "new"))
    events.Reload()
    steps = [event.step for event in events.Scalars("losses/value_loss")]
    assert steps == [STEPS * k for k in range(1, 6)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_run_on_a_gpu_continues(tmp_path: Path) -> None:
    """Its states lie on the GPU again; sums there depend on the order, so weights are only close.

    The learning rate is small, so that rounding is not amplified.
    """
    on_gpu = {"device": "cuda", "learning_rate": 1e-5}
    train(small(tmp_path / "whole", **on_gpu))
    interrupt(tmp_path / "run", **on_gpu)
    train(load_args(tmp_path / "run"))
    expected, actual = (load_network(tmp_path / n, Agent).state_dict() for n in ("whole", "run"))
    for name, weights in expected.items():
        torch.testing.assert_close(actual[name], weights, rtol=0, atol=1e-5, msg=name)


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, whole: Path
) -> None:
    interrupt(tmp_path / "run", 0)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    train(load_args(tmp_path / "run"))
    assert results_of(tmp_path / "run") == results_of(whole)


def test_other_parts_of_a_run_can_carry_their_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Run.carry` is all they call; a checkpoint without the part is an error."""
    counts: list[int] = []
    seen: list[int] = []

    def restore_and_carry(run: Any, restore: Callable[[Any], None] = ppo_lstm.Run.restore) -> None:
        run.carry("telemetry", lambda: {"count": len(counts)}, lambda s: seen.append(s["count"]))
        restore(run)

    interrupt(tmp_path / "other")
    with monkeypatch.context() as patch:
        patch.setattr(ppo_lstm.Run, "restore", restore_and_carry)
        with before_iteration(1, lambda: counts.extend([1, 2])):
            train(small(tmp_path / "run"))
        (tmp_path / "run" / "finished.json").unlink()
        train(load_args(tmp_path / "run"))
        with pytest.raises(CheckpointError, match=r"expected the state of .*'telemetry'"):
            train(load_args(tmp_path / "other"))
    assert seen == [2]


def test_evaluation_in_between_keeps_the_best_agent_and_changes_nothing(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with an interruption between; the scores rise until the second and then fall."""
    monkeypatch.setattr(ppo_lstm, "EVAL_EPISODES", 2)
    saved, scores = [], iter([0.1, 0.3, 0.2, 0.1, 0.2])
    evaluate_agents = ppo_lstm.evaluate_agents

    def scored(policies: Any, **settings: Any) -> Any:
        result = evaluate_agents(policies, **settings)
        result["agents"]["now"]["summary"]["mean"] = next(scores)
        return result

    monkeypatch.setattr(ppo_lstm, "evaluate_agents", scored)
    with before_iteration(2, lambda: saved.append((tmp_path / "run" / "best").stat())):
        interrupt(tmp_path / "run", 3, eval_every=1)
    best = load_network(tmp_path / "run" / "best", Agent).state_dict()
    train(load_args(tmp_path / "run"))
    again = load_network(str(tmp_path / "run" / "best"), Agent).state_dict()
    assert all(torch.equal(best[name], again[name]) for name in best)
    results = results_of(tmp_path / "run")
    rows = [row.pop("eval/committed_score") for row in results["metrics"]]
    assert rows == [0.1, 0.3, 0.2, 0.1, 0.2]
    evaluated = [event for event in results["events"] if event["kind"] == "evaluated"]
    assert [event["scores"]["now"] for event in evaluated] == rows
    results["events"] = [event for event in results["events"] if event not in evaluated]
    assert results == results_of(whole)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", 2], r"got seed=2 \(run: 1\); leave them out"),
        (["--run-dir", "other"], "run_dir: expected none beside --resume, got other"),
        (["--num-envs", 4, "--seed", 1], r"got num_envs=4 \(run: 2\)"),
        (["--env.rent-weight", 0.5], r"got env.rent_weight=0.5 \(run: 0.02\)"),
        (["--learning-rate", 7], "learning_rate: expected above 0 and at most 1, got 7"),
    ],
)
def test_arguments_that_contradict_those_of_the_run_are_named(
    flags: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that have the default value; nothing is changed."""
    interrupt(tmp_path / "run", 0)
    capsys.readouterr()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.json*")}
    assert call(ppo_lstm.main, "--resume", tmp_path / "run", *flags) == 2
    assert re.search(message, capsys.readouterr().err)
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.json*")}
    same = ["--seed", 1, "--keep-checkpoints", 1, "--checkpoint-minutes", 0]
    assert call(ppo_lstm.main, "--resume", tmp_path / "run", *same) == 0
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


# ------------------------------------------------------------------ run directories


def test_the_same_command_again_says_how_to_continue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(tmp_path / "run", 0)
    with pytest.raises(
        FileExistsError, match=r"not finished; continue it with --resume \S+/run, or "
    ):
        train(small(tmp_path / "run"))
    train(load_args(tmp_path / "run"))
    with pytest.raises(FileExistsError, match="contains a finished run; choose another directory"):
        train(small(tmp_path / "run"))
    with pytest.raises(FileExistsError, match="expected an unfinished run, got one that is fin"):
        train(load_args(tmp_path / "run"))
    (tmp_path / "run" / "finished.json").unlink()
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(FileExistsError, match=r"contains checkpoints of a run without config\.js"):
        train(small(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match=r"with a config\.json, which does not exist"):
        load_args(tmp_path / "run")


def test_two_processes_never_share_a_directory(tmp_path: Path) -> None:
    """A process that was killed does not block the next one (the kill test)."""
    seen = []

    def start_another() -> None:
        for args in (small(tmp_path / "run"), load_args(tmp_path / "run")):
            with pytest.raises(BlockingIOError, match=r"run is in use by another process") as error:
                train(args)
            seen.append(str(error.value).split()[0])

    with before_iteration(1, start_another):
        train(small(tmp_path / "run"))
    assert seen == ["--run-dir", "--resume"]


def test_a_failed_start_leaves_nothing_behind(tmp_path: Path) -> None:
    """Neither wrong arguments nor a full disk; the corrected command then trains."""
    directory = tmp_path / "runs" / "new"
    with pytest.raises(ValueError, match="gamma: expected"):
        train(small(directory, gamma=0.9))
    with full_disk(0, 10**9), pytest.raises(OSError, match=r"--run-dir .* is not writable"):
        train(small(directory))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("not a directory")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=r"--run-dir .* is not writable"):
            train(small(path))
    (tmp_path / "file").unlink()
    train(small(directory, total_timesteps=6))
    assert (directory / "finished.json").exists()


def test_tilde_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In --run-dir, --resume, `load_network` and `ppo:RUN_DIR`; strings are accepted as well."""
    monkeypatch.setenv("HOME", str(tmp_path))
    interrupt(Path("~/run"), 0)
    train(load_args("~/run"))
    assert (tmp_path / "run" / "finished.json").exists()
    load_network("~/run", Agent)
    evaluate.make_policy("ppo:~/run")


# ------------------------------------------------------------------ full disks


@contextlib.contextmanager
def full_disk(first: int, count: int, folder: str = "") -> Iterator[None]:
    """Let writes fail, from the `first` one on, a `count` of them; half of each is written."""
    number = 0

    def watch(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        nonlocal number
        if name != "write":
            return function(*arguments)
        number += 1
        if first < number <= first + count:
            file, content = arguments
            function(file, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*arguments)

    with operations_watched(watch):
        yield


@pytest.mark.filterwarnings("ignore:.*could not be written")
@pytest.mark.parametrize("first", [1, 2, 40, 300, 500], ids=str)
def test_a_disk_that_is_full_for_a_while_loses_nothing_but_that_write(
    first: int, tmp_path: Path, whole: Path
) -> None:
    """A row of metrics, then parts of checkpoints; a resumed run would go on from the others."""
    with full_disk(first, 5), pytest.warns(UserWarning, match=r"could not be written at step \d+"):
        train(small(tmp_path / "run"))
    assert results_of(tmp_path / "run") == results_of(whole)
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_rows_that_wait_are_written_at_the_end(tmp_path: Path, whole: Path) -> None:
    """All logs and the last checkpoint fail; then there is room for the end of the run."""
    with contextlib.ExitStack() as room:
        fill = before_iteration(4, lambda: room.enter_context(full_disk(0, 4)))
        with fill, pytest.warns(UserWarning, match="the checkpoint could not be written"):
            train(small(tmp_path / "run"))
    assert results_of(tmp_path / "run") == results_of(whole)


@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_a_disk_that_stays_full_leaves_the_weights_in_a_temporary_directory(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run can be resumed to its end when there is room again."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    room = contextlib.ExitStack()
    mkdtemp = ppo_lstm.Run.save_network.__globals__["tempfile"].mkdtemp

    def make_room(**arguments: Any) -> str:
        room.close()
        return str(mkdtemp(**arguments))

    monkeypatch.setattr("tempfile.mkdtemp", make_room)
    fill = before_iteration(2, lambda: room.enter_context(full_disk(0, 10**9)))
    caught = pytest.warns(UserWarning, match="the checkpoint could not be written")
    with fill, caught as messages, pytest.raises(NotSavedError) as end:
        train(small(tmp_path / "run"))
    assert sum("the checkpoint could not" in str(w.message) for w in messages) == 3
    match = re.search(r"the trained network is in (\S+);", str(end.value))
    assert match is not None
    weights = load_file(Path(match[1]) / "agent.safetensors")
    expected = load_file(whole / "agent.safetensors")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    train(load_args(tmp_path / "run"))
    assert results_of(tmp_path / "run") == results_of(whole)


@pytest.mark.filterwarnings("ignore:.*could not be written")
def test_a_deleted_directory_ends_with_the_weights_in_a_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    delete = before_iteration(2, lambda: shutil.rmtree(tmp_path / "run"))
    warned = pytest.warns(UserWarning, match="could not be written at step 18")
    with delete, warned, pytest.raises(NotSavedError, match=r"is in .*esper-"):
        train(small(tmp_path / "run"))
    assert len(list(tmp_path.glob("esper-*/agent.safetensors"))) == 1
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ runs that go wrong


def test_a_run_that_diverges_ends_with_exit_code_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What, where and the last good checkpoint; the bad weights are not saved."""
    update, count = ppo_lstm.update, 0

    def poisoned(state: Any, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            state.optimizer.register_step_post_hook(lambda *_: state.agent.op_head.bias.data.log_())
        return update(state, *arguments)

    monkeypatch.setattr(ppo_lstm, "update", poisoned)
    interrupt(tmp_path / "run", 0)
    capsys.readouterr()
    count = 1
    assert call(ppo_lstm.main, "--resume", tmp_path / "run") == 3
    error = capsys.readouterr().err
    pattern = (
        rf"error: training diverged in the iteration that ends at step {3 * STEPS}: "
        r"weight slot_encoder\.weight has \d+ elements not finite, first nan at \(\d, \d\); .*; "
        r"losses/policy_loss is nan; .*; \d+ more metrics; "
        r"the last good checkpoint is "
        rf"{tmp_path}/run/checkpoints/step-{2 * STEPS:012d}\.json; .*\n"
    )
    assert re.fullmatch(pattern, error)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [STEPS, 2 * STEPS]
    assert not (tmp_path / "run" / "agent.safetensors").exists()


def test_a_loss_that_overflows_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"is (inf|nan).*there is no checkpoint yet"):
        train(small(tmp_path / "run", vf_coef=1e38))


# ------------------------------------------------------------------ checkpoints


def structure() -> dict[str, Any]:
    """A structure with everything that a checkpoint can have."""
    floats = torch.linspace(-1, 1, 6)
    return {
        "tensors": [floats.reshape(2, 3).T, floats.bfloat16(), floats.half(), torch.tensor(3.5)],
        "arrays": [np.arange(5, dtype=t) for t in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8")],
        "other": (np.array([True, False]), np.zeros((0, 3)), np.float32(0.1), np.array(7.0)),
        "numbers": [2**127 + 1, -0.0, float("inf"), float("nan"), 0.1, True, None, "text"],
        "keys": {0: "zero", "$dict": 1, (1, "a"): {}},
    }


def test_a_checkpoint_has_every_type_and_is_a_safetensors_file(tmp_path: Path) -> None:
    """Types, shapes and bytes; the other side is safetensors' own reader."""
    path = save_checkpoint(tmp_path / "c", 3, structure(), IDENTITY)
    loaded = load_latest_checkpoint(tmp_path / "c", IDENTITY)
    assert loaded is not None
    assert loaded.step == 3

    def describe(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            flat = value.contiguous().reshape(-1).view(torch.uint8)
            return torch.Tensor, value.shape, value.dtype, flat.tolist()
        if isinstance(value, (np.ndarray, np.generic)):
            return type(value), value.shape, value.dtype, value.tobytes()
        if isinstance(value, dict):
            return {key: describe(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value), [describe(item) for item in value]
        return type(value), repr(value)

    assert describe(loaded.state) == describe(structure())
    tensors = load_file(path.with_suffix(".safetensors"))
    assert torch.equal(tensors["state/tensors/0"], structure()["tensors"][0])
    with pytest.raises(TypeError, match="state/a: cannot save object in a checkpoint"):
        save_checkpoint(tmp_path / "c", 4, {"a": object()}, IDENTITY)
    with pytest.raises(TypeError, match="state/a: cannot save an array of type complex64"):
        save_checkpoint(tmp_path / "c", 4, {"a": np.zeros(1, np.complex64)}, IDENTITY)


def test_the_last_checkpoints_stay(tmp_path: Path) -> None:
    """And nothing else; those after the present step belong to a past that was cut off."""
    folder = tmp_path / "c"
    for step in (1, 2, 3, 9):
        save_checkpoint(folder, step, {}, IDENTITY, keep=2)
    (folder / "step-7.safetensors").write_text("left by a kill")
    (folder / "step-7.json.tmp").write_text("left by a kill")
    save_checkpoint(folder, 4, {}, IDENTITY, keep=2)
    names = [f"step-{step:012d}{suffix}" for step in (3, 4) for suffix in (".json", ".safetensors")]
    assert sorted(path.name for path in folder.iterdir()) == names


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def with_version(path: Path) -> None:
    content = json.loads(path.read_text())["content"] | {"format_version": 2}
    path.write_text(json.dumps({"sha256": "", "content": content}))


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "arrays cut": (lambda a, _: os.truncate(a, 80), r"safetensors: expected \d+ bytes, got 80;"),
    "arrays gone": (lambda a, _: a.unlink(), "safetensors: expected a readable file, got No such"),
    "first bit": (lambda a, _: flip(a, 0), r"safetensors: expected SHA-256 \w+, got \w+;"),
    "last bit": (lambda a, _: flip(a, -1), r"safetensors: expected SHA-256 \w+, got \w+;"),
    "JSON cut": (lambda _, j: os.truncate(j, 50), r"json: expected JSON, got Unterminated"),
    "JSON empty": (lambda _, j: os.truncate(j, 0), r"json: expected JSON, got Expecting value"),
    "other JSON": (lambda _, j: j.write_text("[]"), "json: expected a checkpoint, got other JSON"),
    "version": (lambda _, j: with_version(j), "json: expected format version 1, got 2;"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_an_error_and_the_one_before_is_used(
    kind: str, tmp_path: Path
) -> None:
    """Path, expected, actual and remedy in one error; alone, it ends the command."""
    damage, message = DAMAGE[kind]
    save_checkpoint(tmp_path / "c", 1, structure(), IDENTITY)
    path = save_checkpoint(tmp_path / "c", 2, structure(), IDENTITY)
    damage(path.with_suffix(".safetensors"), path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(path, IDENTITY)
    assert "delete this checkpoint, or copy it again" in str(error.value)
    with pytest.warns(UserWarning, match="The checkpoint before it is used"):
        loaded = load_latest_checkpoint(tmp_path / "c", IDENTITY)
    assert loaded is not None
    assert loaded.step == 1
    (tmp_path / "c" / f"step-{1:012d}.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        load_latest_checkpoint(tmp_path / "c", IDENTITY)


def test_a_flipped_bit_anywhere_in_the_json_is_detected(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", 1, {"a": np.zeros(2), "b": 0.5}, IDENTITY)
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 7)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load_checkpoint(path, IDENTITY)


def test_a_checkpoint_of_another_environment_is_an_error(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", 1, {}, IDENTITY)
    message = "expected an environment with num_envs=3, got num_envs=2;"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, IDENTITY | {"num_envs": 3})


def test_a_damaged_checkpoint_of_a_run_costs_no_result(tmp_path: Path, whole: Path) -> None:
    """The run goes on from the one before, and its damaged one is replaced."""
    interrupt(tmp_path / "run", 2)
    flip(tmp_path / "run" / "checkpoints" / f"step-{3 * STEPS:012d}.safetensors", 1000)
    with pytest.warns(UserWarning, match="The checkpoint before it is used"):
        train(load_args(tmp_path / "run"))
    assert results_of(tmp_path / "run") == results_of(whole)


def test_saving_and_loading_need_the_memory_of_the_arrays_at_most_once(tmp_path: Path) -> None:
    """Finding SYN-M6: 32 MB, of which saving copies nothing and loading makes one copy."""
    state = {str(k): np.full(2**20, k, dtype=np.float64) for k in range(4)}
    size = sum(array.nbytes for array in state.values())
    peaks = []
    for work in (
        lambda: save_checkpoint(tmp_path / "c", 1, state, IDENTITY),
        lambda: load_latest_checkpoint(tmp_path / "c", IDENTITY),
    ):
        tracemalloc.start()
        work()
        peaks.append(tracemalloc.get_traced_memory()[1] / size)
        tracemalloc.stop()
    assert peaks[0] < 0.1
    assert 1.0 <= peaks[1] < 1.1


@pytest.mark.parametrize("name", ["agent.json", "agent.safetensors"])
def test_a_damaged_network_is_one_error(name: str, tmp_path: Path, whole: Path) -> None:
    """With path and remedy, whatever its reader says."""
    shutil.copytree(whole, tmp_path / "run")
    os.truncate(tmp_path / "run" / name, 60)
    message = rf"{name}: expected the file of a network, got one that cannot be used .*; copy it"
    with pytest.raises(ValueError, match=message):
        evaluate.make_policy(f"ppo:{tmp_path}/run")


def test_nothing_is_pickled() -> None:
    for module in (checkpoint, ppo_lstm, evaluate):
        text = Path(str(module.__file__)).read_text()
        assert not re.search(r"import pickle|torch\.(load|save)\(|allow_pickle", text)


# ------------------------------------------------------------------ command lines

TRAINING_MISTAKES = [
    (["--numenvs", "3"], "Unrecognized options: --numenvs, 3; did you mean --num-envs?"),
    (["--num-envs", "x"], "--num-envs: "),
    (["--num-envs", "3"], "num_minibatches: expected a divisor of num_envs=3, got 8"),
    (["--learning-rate", "nan"], "learning_rate: expected above 0 and at most 1, got nan"),
    (["--env.batch-size", "1"], "batch_size: expected at least 2"),
    (["--env-id", "Esper-Nothing-v0"], "Esper-Nothing"),
    (["--env-id", "CartPole-v1"], "env_id: expected an environment of esper_env, such as Esper-D"),
    (["--device", "gpu"], "device: expected cpu or another device of this machine, got 'gpu'"),
    (["--resume", "nowhere"], "--resume nowhere: expected the directory of a run with a config"),
    (["--resume", "nowhere", "--seed", "2"], "--resume nowhere: expected the directory of a run"),
    (["--resume"], "--resume"),
]
EVALUATION_MISTAKES = [
    (["--agents", "nobody"], "agents: expected ['best-schedule', "),
    (["--agents", "random", "random"], "agents: expected at least one, each once, got 'random' tw"),
    (["--agents", "ppo:nowhere"], "no checkpoint in nowhere"),
    (["--agents", "schedule:"], "agents: expected schedule:PLAN with a plan, got none"),
    (["--agents", "schedule:norm@0:60"], "plan: expected steps of 0 to 59, got 60"),
    (["--env-id", "CartPole-v1"], "env_id: expected an environment of esper_env, such as Esper-D"),
    (["--episodes", "0"], "episodes: expected at least 1, got 0"),
    (["--seed", "-1"], "seed: expected at least 0, got -1"),
    (["--out", "/dev/null/result.json"], "out: expected a file that can be written, got /dev/null"),
    (["--out", "."], "out: expected a JSON file; a plot of the same name follows; got ."),
]


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [(ppo_lstm.main, *case) for case in TRAINING_MISTAKES]
    + [(evaluate.main, *case) for case in EVALUATION_MISTAKES],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(
    main: Callable[[], None],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is printed to stdout, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(evaluate, "run_episodes")
    assert call(main, *arguments) == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", output.err), output.err
    assert message in output.err
    assert output.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_defect_shows_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception of the training loop is no mistake of the user."""
    interrupt(tmp_path / "run", 0)
    monkeypatch.delattr(ppo_lstm, "run_iteration")
    with pytest.raises(NameError):
        call(ppo_lstm.main, "--resume", tmp_path / "run")


def test_changeable_arguments_are_arguments() -> None:
    assert set(ppo_lstm.CHANGEABLE) < {field.name for field in dataclasses.fields(Args)}
