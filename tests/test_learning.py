"""The learning protocol: its statistics by hand, searches, references and quick form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import ablations, adaptivity, learning
from benchmarks.protocol import compare, play, summarize, table_of
from benchmarks.references import train_equal_compute, train_grown_size
from docs.results import ablation_table
from esper_agent.baselines import (
    BEST_SCHEDULE,
    TUNED_HEURISTIC,
    FixedSchedule,
    NeverGrow,
    parse_plan,
)
from esper_agent.envs import make_envs
from esper_agent.evaluate import FIGURES
from tests.builders import ID, tiny_config

SHORT = tiny_config(episode_steps=10, instances="test")
"""Long enough for a seed to be fossilized."""

# ------------------------------------------------------------------ statistics


def test_a_table_has_agents_instances_and_repeats() -> None:
    """Episode e is repeat e // 2 of instance e % 2."""
    run = {"instance": [0, 1, 0, 1, 0, 1], "committed_score": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    other = {**run, "committed_score": [0.0] * 6}
    table = table_of([run, other])
    assert table.tolist() == [[[1, 3, 5], [2, 4, 6]], [[0, 0, 0], [0, 0, 0]]]


def test_a_summary_is_the_interquartile_mean_over_agents_and_instances() -> None:
    """Means over repeats are 1, 2, 3 and 100; the middle half is 2 and 3."""
    table = np.array([[[0.0, 2.0], [2.0, 2.0]], [[4.0, 2.0], [100.0, 100.0]]])
    summary = summarize(table, np.random.default_rng(0))
    assert (summary["iqm"], summary["mean"], summary["agent_seeds"]) == (2.5, 26.5, 2)
    assert summary["low"] <= 2.5 <= summary["high"]


def test_the_interval_knows_both_the_luck_of_agents_and_that_of_episodes() -> None:
    """Luck of either kind alone widens it; without any it has no width."""
    rng = np.random.default_rng(0)
    agents, episodes = rng.normal(size=(8, 1, 1)), rng.normal(size=(1, 5, 8))

    def width(table: Any) -> float:
        summary = summarize(np.broadcast_to(table, (8, 5, 8)), np.random.default_rng(1))
        return summary["high"] - summary["low"]

    assert width(np.ones((1, 1, 1))) == 0.0
    # The mean of 8 agents has a standard error of 1 / sqrt(8): about 1.4 from 2.5 to 97.5 %.
    assert 0.7 < width(agents) < 2.8
    # That of 40 episodes 1 / sqrt(40): about 0.6.
    assert 0.3 < width(episodes) < 1.2


def test_paired_differences_cancel_what_arms_share() -> None:
    """Episodes differ by much, arms by exactly 0.5 on all of them."""
    second = np.random.default_rng(0).normal(scale=10.0, size=(1, 4, 6))
    pair = compare(second + np.full((3, 1, 1), 0.5), second, np.random.default_rng(1))
    assert pair["low"] == pytest.approx(0.5)
    assert pair["high"] == pytest.approx(0.5)
    assert pair["difference"] == pytest.approx(0.5)
    assert (pair["probability_of_improvement"], pair["agent_seeds"]) == (1.0, 3)


def test_equal_arms_improve_in_half_of_the_cases() -> None:
    """Ties count one half."""
    table = np.ones((2, 3, 2))
    pair = compare(table, table[:1], np.random.default_rng(0))
    assert (pair["difference"], pair["probability_of_improvement"]) == (0.0, 0.5)


def test_policies_are_judged_on_episodes_that_did_not_choose_them() -> None:
    """Policy 1 is better by 1 on instance 0 only, and policy 2 on instance 1 only.

    In one repeat of each instance, policy 0 has a lucky 9: it is chosen in that half, and is
    evaluated in the other, where it gets 0. So luck costs, and never pays.
    """
    scores = np.zeros((3, 2, 4))
    scores[1, 0], scores[2, 1] = 1.0, 1.0
    assert (adaptivity.best_of_each(scores) == 1).all()
    scores[0, :, 0] = 9.0
    assert (adaptivity.best_of_each(scores) == [[1, 1, 0, 0]] * 2).all()


# ------------------------------------------------------------------ searches


def test_halving_ends_with_the_best_and_never_shows_an_episode_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """27 candidates whose score is their number: 9, then 3, then 1 go on.

    Rounds cost the same, except that the first one has at least 4 episodes of each candidate.
    """
    shown: list[tuple[int, int]] = []

    def run(policy: int, envs: Any, count: int, seed: int) -> dict[str, list[float]]:
        assert envs.config.instances == "train"
        shown.append((seed, count))
        return {"committed_score": [float(policy)] * count}

    monkeypatch.setattr(learning, "run_episodes", run)
    args = learning.Args(total_timesteps=60 * 4 * 54)
    candidates: Any = {str(n): lambda n=n: n for n in range(27)}
    found = learning.halve(candidates, args)
    assert found["best"] == "26"
    assert [len(r["scores"]) for r in found["rounds"]] == [27, 9, 3, 1]
    assert [r["episodes"] for r in found["rounds"]] == [4, 6, 18, 54]
    assert len({seed for seed, _ in shown}) == 4
    assert sorted({*shown})[1][0] == sorted({*shown})[0][0] + 4


def test_the_tuned_baselines_are_what_the_committed_search_found() -> None:
    """So that `evaluate --agents tuned-heuristic best-schedule` means those of the results page."""
    path = Path(learning.__file__).parent / "results" / "learning-digits.json"
    found = json.loads(path.read_text())["search"]
    assert json.loads(found["heuristic"]["best"]) == TUNED_HEURISTIC
    assert found["schedule"]["best"] == BEST_SCHEDULE


def test_every_random_heuristic_can_play() -> None:
    """Their settings are names of the heuristic's arguments."""
    candidates = learning.heuristics(("norm", "conv_heavy"), 50)
    assert len(candidates) == 50
    policies = [make() for make in candidates.values()]
    assert {policy.blueprint for policy in policies} == {"norm", "conv_heavy"}  # type: ignore[attr-defined]


# ------------------------------------------------------------------ references


def test_a_static_network_of_the_grown_size_has_its_parameters() -> None:
    """And costs more to train, because the seeds are there from the first batch."""
    policy = FixedSchedule(parse_plan("norm@0+conv_small@1"))
    grown = play(policy, ID, SHORT, 1, 0)
    static = train_grown_size(grown, ID, SHORT)
    assert set(static) == {"seed", "instance", "growth", *FIGURES}
    assert static["parameters"] == grown["parameters"]
    assert (static["seed"], static["instance"]) == (grown["seed"], grown["instance"])
    assert (np.array(static["flops"]) > np.array(grown["flops"])).all()


def test_a_static_network_without_seeds_is_the_host_itself() -> None:
    """Bitwise, in more episodes than run side by side at once."""
    host = play(NeverGrow(), ID, SHORT, 4, 0)
    assert train_grown_size(host, ID, SHORT) == host


def test_a_longer_host_costs_at_least_what_growing_did() -> None:
    """A whole multiple of its episode, less than one multiple above; 1 where nothing grew."""
    policy = FixedSchedule(parse_plan("conv_heavy@0"))
    grown = play(policy, ID, SHORT, 1, 0)
    host = play(NeverGrow(), ID, SHORT, 1, 0)
    (longer,) = train_equal_compute([grown], ID, SHORT)
    multiple = np.array(longer["flops"]) / np.array(host["flops"])
    needed = np.array(grown["flops"]) / np.array(host["flops"])
    assert np.allclose(multiple, np.ceil(needed))
    assert (multiple > 1).any()
    assert train_equal_compute([host, host], ID, SHORT) == [host, host]


# ------------------------------------------------------------------ one command


def test_the_quick_protocol_writes_all_arms_goes_on_and_refuses_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second call makes nothing again: it gives the same result without training anything."""
    out = tmp_path / "result.json"
    command = ["learning", "--quick", "--work-dir", str(tmp_path / "work"), "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    learning.main()
    result = json.loads(out.read_text())
    arms = set(learning.BASELINE_ARMS) | {"tuned_heuristic", "best_schedule", "ppo_lstm"}
    assert set(result["arms"]) == arms | {"static_grown", "static_longer"}
    assert set(result["paired"]) == {f"ppo_lstm - {arm}" for arm in result["arms"]} - {
        "ppo_lstm - ppo_lstm"
    }
    for pair in result["paired"].values():
        assert pair["agent_seeds"] == 2
        assert pair["low"] <= pair["difference"] <= pair["high"]
    runs = result["arms"]["ppo_lstm"]["episodes"]
    assert [len(run["committed_score"]) for run in runs] == [40, 40]
    assert runs[0]["seed"] == result["arms"]["random"]["episodes"][0]["seed"]

    def fail(*values: Any, **keywords: Any) -> None:
        raise AssertionError("nothing is left to be done")

    for name in ("play", "run_episodes", "_train", "train_grown_size", "train_equal_compute"):
        monkeypatch.setattr(learning, name, fail)
    learning.main()
    again = json.loads(out.read_text())
    assert (again["arms"], again["paired"]) == (result["arms"], result["paired"])
    monkeypatch.setattr("sys.argv", [*command, "--repeats", "5", "--total-timesteps", "2000"])
    learning.main()  # The quick form sets both itself.
    monkeypatch.setattr("sys.argv", [*command, "--seed", "7"])
    with pytest.raises(ValueError, match="other values of seed; choose another"):
        learning.main()


def quick_adaptivity(
    path: Path, monkeypatch: pytest.MonkeyPatch, env_id: str, *more: str
) -> dict[str, Any]:
    """Return the result of the quick form of the script."""
    command = ["adaptivity", "--quick", "--env-id", env_id, "--work-dir", str(path / "work")]
    monkeypatch.setattr("sys.argv", [*command, "--out", str(path / "result.json"), *more])
    adaptivity.main()
    result: dict[str, Any] = json.loads((path / "result.json").read_text())
    assert result["scores"]["open_loop"] == max(result["open_loops"].values())
    for name, pair in result["paired"].items():
        first, _, second = name.partition(" - ")
        difference = result["scores"][first] - result["scores"][second]
        assert pair["difference"] == pytest.approx(difference, abs=1e-6)
        assert pair["low"] <= pair["difference"] <= pair["high"]
    return result


PLANNED = {"never", "constant", "open_loop", "open_loop of each instance"}
RULES = {"rule", "memoryless_rule"}


def test_the_quick_adaptivity_compares_all_arms_with_the_best_open_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env_id = "Esper-Digits-Sizing-v0"
    result = quick_adaptivity(tmp_path, monkeypatch, env_id, "--agent-seeds", "1")
    arms = PLANNED | RULES | {"oracle", "ppo_lstm"}
    assert set(result["scores"]) == arms
    assert set(result["paired"]) == {
        *(f"{arm} - open_loop" for arm in arms - {"open_loop"}),
        "ppo_lstm - rule",
    }


def test_the_quick_adaptivity_takes_agents_from_the_learning_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without regimes there is no oracle, and open loops are schedules."""
    result = quick_adaptivity(tmp_path, monkeypatch, ID)
    assert set(result["scores"]) == PLANNED | RULES
    never = json.loads((tmp_path / "work" / "arm-loop-0.json").read_text())
    run = {**never, "committed_score": [1.0] * len(never["committed_score"])}
    file = tmp_path / "learning.json"
    file.write_text(json.dumps({"arms": {"ppo_lstm": {"episodes": [run, run]}}}))
    more = ["--agents-from", str(file)]
    result = quick_adaptivity(tmp_path, monkeypatch, ID, *more)
    assert result["scores"]["ppo_lstm"] == 1
    other = {**run, "seed": [n + 1 for n in run["seed"]]}
    file.write_text(json.dumps({"arms": {"ppo_lstm": {"episodes": [run, other]}}}))
    with pytest.raises(ValueError, match="agents_from: expected the same seed of every episode"):
        quick_adaptivity(tmp_path, monkeypatch, ID, *more)
    with pytest.raises(ValueError, match=r"agents_from: expected no agent_seeds beside it, got"):
        adaptivity.Args(env_id=ID, agents_from=file, agent_seeds=(1,))


def test_an_interval_over_agents_instances_and_episodes_by_hand() -> None:
    """One agent, 400 instances with differences of 0.1 +- 0.2, and no noise within them."""
    rng = np.random.default_rng(0)
    difference = np.repeat(rng.normal(0.1, 0.2, (1, 400, 1)), 2, axis=2)
    pair = adaptivity.interval(difference, rng)
    assert pair["difference"] == pytest.approx(difference.mean())
    assert pair["high"] - pair["low"] == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.15)


def test_every_ablation_changes_what_its_name_says_and_nothing_else() -> None:
    """Each differs from the default in its own fields, and has a directory of its own."""
    args = ablations.Args(total_timesteps=96_000)
    runs = {name: ablations.agent_args(args, name, 101) for name in ablations.VARIANTS}
    default = dataclasses.asdict(runs.pop("default"))
    assert dataclasses.asdict(runs.pop(ablations.SAMPLED)) == default
    assert len({run.run_dir for run in runs.values()}) == len(runs)
    for name, run in runs.items():
        flat = dataclasses.asdict(run)
        differing = {key for key in flat if flat[key] != default[key]} - {"run_dir", "env"}
        differing |= {
            f"env.{key}" for key in flat["env"] if flat["env"][key] != default["env"][key]
        }
        assert differing == set(ablations.VARIANTS[name]), name


def test_the_ablation_of_ops_offers_all_of_them() -> None:
    """In an environment with parking, where the default leaves out two."""
    args = ablations.Args(env_id="Esper-Digits-Contexts-v0")
    offered = []
    for name in ("default", "PRUNE and FOSSILIZE"):
        run = ablations.agent_args(args, name, 1)
        (ops, *_) = make_envs(run.env_id, 1, "cpu", run.env).heads
        offered.append(set(ops.options))
    assert offered[1] - offered[0] == {"PRUNE", "FOSSILIZE"}


def test_the_quick_ablations_compare_each_variant_with_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled actions need no agents of their own; another observation does.

    The agent without memory is compared with the one that has the same observation.
    """
    work, out = tmp_path / "work", tmp_path / "result.json"
    names = [ablations.SAMPLED, "minimal observation, no memory"]
    command = ["ablations", "--quick", "--work-dir", str(work), "--out", str(out)]
    command += ["--env-id", "Esper-Digits-Sizing-v0"]
    monkeypatch.setattr("sys.argv", [*command, "--variants", *names])
    compared = []

    def spy(first: Any, second: Any, rng: np.random.Generator) -> dict[str, float]:
        compared.append((first, second))
        return compare(first, second, rng)

    monkeypatch.setattr(ablations, "compare", spy)
    ablations.main()
    variants = json.loads(out.read_text())["variants"]
    assert list(variants) == ["default", "minimal observation", *names]
    assert len(list(work.glob("*/*/agent.safetensors"))) == 6
    (default, minimal, *_), seconds = zip(*compared, strict=True)
    assert [second is minimal for second in seconds] == [False, False, False, True]
    assert sum(second is default for second in seconds) == 3
    pair = variants["default"]["paired"]
    assert (pair["difference"], pair["low"], pair["high"]) == (0, 0, 0)
    assert variants[names[1]]["paired"]["agent_seeds"] == 2
    assert ablation_table({"variants": variants}).count("\n") == 5
    monkeypatch.setattr("sys.argv", [*command, "--seed", "7"])
    with pytest.raises(ValueError, match="other values of seed; choose another"):
        ablations.main()
    monkeypatch.setattr("sys.argv", [*command, "--variants", "other"])
    with pytest.raises(ValueError, match=r"variants: expected names among .*, got \['other'\]"):
        ablations.main()


def test_arguments_of_agents_are_those_of_the_protocol() -> None:
    """Training instances, the budget, and no evaluation of their own."""
    args = learning.Args(total_timesteps=96_000, env=dataclasses.replace(SHORT, rent_weight=0.5))
    run = learning.agent_args(args, 7, Path("somewhere"))
    assert (run.env.instances, run.env.rent_weight) == ("train", 0.5)
    assert (run.seed, run.total_timesteps, run.eval_episodes) == (7, 96_000, 0)
    assert run.run_dir == Path("somewhere/7")
