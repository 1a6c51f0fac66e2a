"""The benchmarks of speed: what they count, that all sides do the same work, and that they run."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import agent, peers, soak, step_profile, throughput
from benchmarks.states import grow, make_envs, settings_of
from benchmarks.step_profile import PHASES, Phases, measured_phases, profile
from benchmarks.work import Work, evaluation_work, training_work
from esper_env import EsperVectorEnv

LIMITS = {"matrix_gflops": 100.0, "copy_gigabytes_per_second": 10.0}


def make_grown(mode: str, num_envs: int = 3) -> EsperVectorEnv:
    envs = make_envs("Esper-Digits-v0", num_envs, **settings_of(mode))
    grow(envs, mode, 0)
    return envs


def wait(envs: EsperVectorEnv) -> dict[str, Any]:
    return envs.step(np.zeros((envs.num_envs, len(envs.heads)), dtype=np.int64))[4]


# ------------------------------------------------------------------ work


@pytest.mark.parametrize("mode", ["empty", "mix"])
def test_training_work_is_what_the_environment_says_of_a_step(mode: str) -> None:
    envs = make_grown(mode)
    before = wait(envs)["flops"].sum()
    with measured_phases(envs) as phases:
        after = wait(envs)["flops"].sum()
    (training,) = phases.arguments["training"]
    seeds = training.seeds
    # A seed that has not begun to train counts for the environment, but does no work.
    assert (seeds.beta > 0).sum() == (seeds.blueprint >= 0).sum()
    population = envs.debug_state().population
    work = training_work(population, training.members, seeds, training.draw)
    assert work.flops == after - before


def test_evaluation_work_counts_what_coalitions_share_once() -> None:
    """Four coalitions of two seeds: block, seed | 2 blocks, 2 seeds | 4 heads."""
    envs = make_grown("mix", 1)
    sim = envs.debug_state()
    population, seeds, images = sim.population, sim.networks.seeds, sim.splits.validation
    first, second = seeds.blueprint[0]
    member = np.zeros(1, dtype=np.int64)

    def macs(*alpha: tuple[float, float]) -> float:
        rows = np.array(alpha)
        work = evaluation_work(population, np.repeat(member, len(rows)), rows, seeds, images)
        return work.flops / (2 * len(images))

    host = population.host_multiply_adds[0]
    seed = [population.seed_multiply_adds[0, s, b] for s, b in enumerate((first, second))]
    assert macs((0, 0)) == host
    assert macs((0.5, 1)) == macs((0.5, 1), (0.5, 1)) == host + sum(seed)
    block = sum(layer.multiply_adds(8, 8) for layer in population.layout.host.block(0))
    head = population.layout.host.channels[-1] * population.layout.host.num_classes
    everything = macs((0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5))
    assert everything == block + seed[0] + 2 * (host - block - head + seed[1]) + 4 * head


def test_intensity_is_flop_per_byte() -> None:
    assert Work(flops=6.0, traffic_bytes=4.0).intensity == 1.5


# ------------------------------------------------------------------ phases


def test_a_phase_leaves_out_the_phases_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(step_profile.time, "perf_counter", lambda: now)
    phases = Phases()

    def spend(seconds: float, *inner: Any) -> None:
        nonlocal now
        now += seconds
        for function in inner:
            function(2.0)

    training = phases.timed("training", spend)
    batches = phases.timed("batches", spend)
    phases.timed("lifecycle", spend)(1.0, training, batches, training)
    expected = {"lifecycle": 1.0, "training": 4.0, "batches": 2.0}
    assert {name: value for name, value in phases.seconds.items() if value} == expected


def test_a_measured_environment_is_as_before_afterwards() -> None:
    envs = make_grown("empty", 1)
    before = (
        dict(vars(envs)),
        dict(vars(envs.debug_state())),
        dict(vars(envs.debug_state().population)),
    )
    with measured_phases(envs):
        pass
    assert (vars(envs), vars(envs.debug_state()), vars(envs.debug_state().population)) == before


def test_the_phases_of_a_step_are_all_of_it() -> None:
    row = profile("Esper-Digits-v0", 2, "mix", rounds=2, seed=0, steps=2)
    assert list(row["phases"]) == list(PHASES)
    assert sum(part["share"] for part in row["phases"].values()) == pytest.approx(1)
    total = sum(part["milliseconds"] for part in row["phases"].values())
    assert total == pytest.approx(row["step_milliseconds"])
    assert all(part["milliseconds"] > 0 for part in row["phases"].values())
    for phase in ("training", "evaluation"):
        part = row["phases"][phase]
        rate = part["megaflop"] / part["milliseconds"]
        assert part["gflops"] == pytest.approx(rate)


def test_the_profile_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step_profile, "measure_limits", lambda device: LIMITS)
    monkeypatch.setattr(step_profile, "use_synthetic_cifar10", lambda: None)
    out = tmp_path / "profile.json"
    step_profile.main(step_profile.Args(quick=True, threads=torch.get_num_threads(), out=out))
    result = json.loads(out.read_text())
    assert result["limits"] == LIMITS
    assert [(row["num_envs"], row["mode"]) for row in result["rows"]] == [
        (1, "empty"),
        (1, "mix"),
        (2, "empty"),
        (2, "mix"),
    ]
    assert capsys.readouterr().out.count("| Esper-Digits-v0 |") == 4


# ------------------------------------------------------------------ throughput


@pytest.mark.parametrize("mode", ["empty", "mix"])
def test_peers_do_the_same_work(mode: str) -> None:
    """Bitwise the same observations after growth and timing, or `measure_peers` fails."""
    row = peers.measure_peers("Esper-Digits-v0", 3, mode, rounds=1, seed=5)
    assert list(row["sides"]) == ["vector", "async", "async of 2", "sync", "2 x vector"]
    assert row["sides"]["vector"]["ratio_median"] == 1
    assert all(side["env_steps_per_second"] > 0 for side in row["sides"].values())
    assert "async" in throughput.describe(row)


def test_a_peer_that_does_other_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    reset = peers.TwoProcesses.reset
    monkeypatch.setattr(
        peers.TwoProcesses, "reset", lambda self, *, seed: reset(self, seed=seed + 1)
    )
    with pytest.raises(AssertionError, match="2 x vector"):
        peers.measure_peers("Esper-Digits-v0", 2, "empty", rounds=1, seed=5)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["mix + leave-one-out", "training"])
def test_throughput_measures_environment_and_loop(device: str, mode: str) -> None:
    args = throughput.Args(device=device, rounds=1)
    row = throughput.measure(args, 2, mode, LIMITS)
    seconds = row["step_milliseconds"][0] / 1e3
    assert row["env_steps_per_second"] == pytest.approx(2 / seconds)
    ratio = row["loop_milliseconds"][0] / row["step_milliseconds"][0]
    assert row["ratio_median"] == pytest.approx(ratio)
    assert row["share_of_matrix_rate"] > 0
    assert 0 < row["share_outside_training_and_evaluation"] < 1
    assert "steps/s" in throughput.describe(row)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"got 'cuda'.*sees no GPU; check the driver"):
        throughput.main(throughput.Args(device="cuda"))


# ------------------------------------------------------------------ the agent


def test_the_quick_benchmark_of_the_agent_measures_every_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One timed round; shares are parts of one whole, ratios and times positive."""
    row = agent.measure(agent.Args(quick=True, rounds=1), num_envs=4)
    assert row.pop("num_envs") == 4
    assert all(value["min"] == value["median"] == value["max"] > 0 for value in row.values())
    assert row["inference_share"]["median"] + row["update_share"]["median"] < 1
    telemetry = agent.measure_telemetry(agent.Args(quick=True, rounds=1), num_envs=4)
    assert np.isfinite(
        [telemetry[f"{level}_share"]["median"] for level in ("normal", "debug")]
    ).all()
    assert telemetry["never_grow_seconds"] > 0
    # Dynamo alone, without a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = agent.measure_compiled(agent.Args(quick=True, rounds=1), num_envs=4)
    assert min(compiled["decision_ratio"]["min"], compiled["update_ratio"]["min"]) > 0


# ------------------------------------------------------------------ the soak


@pytest.mark.usefixtures("few_images")
def test_a_short_soak_finds_no_problem_in_any_mode() -> None:
    """The script takes 200,000 steps, and also bounds the resident memory."""
    run = soak.Soak(soak.Args(member_steps=600, num_envs=4, block_steps=8))
    run.run()
    assert run.problems == []
    assert run.counts["member-steps"] == 600
    assert len(run.samples) > 2 * len(soak.CASES)
    events = ("fork", "get_state", "set_state", "poison", "reset of some members")
    outcomes = ("rollback", "illegal action", "rejected step", "reset of done members")
    assert all(run.counts[name] > 0 for name in (*events, *outcomes, "episode"))
    assert not [text for text in soak.grown(run.samples) if "resident" not in text]


def test_a_soak_reports_wrong_outputs_and_exceptions(monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = EsperVectorEnv.step, iter(range(100))

    def broken(self: EsperVectorEnv, actions: Any) -> Any:
        call = next(calls)
        observations, reward, *flags, info = step(self, actions)
        if call == 0:
            observations[0, 0] = math.nan
        elif call == 1:
            info["loss"][0] = math.inf
        elif call == 2:
            reward = reward + 1e-6
        elif call == 3:
            raise RuntimeError("broken")
        return observations, reward, *flags, info

    monkeypatch.setattr(EsperVectorEnv, "step", broken)
    run = soak.Soak(soak.Args(member_steps=12, num_envs=2, seed=3))
    run.run()
    texts = ("an observation is not finite", "loss is not finite", "sum of its terms", "broken")
    assert len(run.problems) == 4
    assert all(text in problem for text, problem in zip(texts, run.problems, strict=True))


def test_resources_may_not_grow_after_the_first_tenth() -> None:
    """The third of 20 samples is the first that is judged; memory has a margin of 5 %."""

    def samples(name: str, later: float) -> list[dict[str, float]]:
        flat = {"resident_megabytes": 100.0, "threads": 2.0, "descriptors": 6.0}
        rows = [{"member_steps": 10.0 * i, **flat} for i in range(1, 21)]
        rows[2][name] = later
        return rows

    assert soak.grown(samples("resident_megabytes", 104.9)) == []
    for name, later in (("resident_megabytes", 105.1), ("threads", 3), ("descriptors", 7)):
        (problem,) = soak.grown(samples(name, later))
        assert problem.startswith(f"{name} grew from")
