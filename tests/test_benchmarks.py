"""Benchmarks measure what they say; how fast anything is, is not tested."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks import agent
from esper_agent.ppo_lstm import run_lstm


def test_the_lstm_called_step_by_step_does_the_same_work() -> None:
    """With a start inside; the tolerance 1e-6 is float32 rounding near 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lstm = nn.LSTM(3, 4)
    x = torch.randn(5, 2, 3, generator=generator)
    state = (torch.randn(1, 2, 4, generator=generator), torch.randn(1, 2, 4, generator=generator))
    starts = torch.zeros(5, 2, dtype=torch.bool)
    starts[3, 1] = True
    with torch.no_grad():
        expected = run_lstm(lstm, x, state, starts)
        actual = agent.step_by_step(lstm, x, state, starts)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_the_quick_benchmark_of_the_agent_measures_every_figure() -> None:
    """One timed round; shares are parts of one whole, ratios and times positive."""
    row = agent.measure(agent.Args(quick=True, rounds=1), num_envs=4)
    assert row.pop("num_envs") == 4
    assert all(value["min"] == value["median"] == value["max"] > 0 for value in row.values())
    assert row["inference_share"]["median"] + row["update_share"]["median"] < 1
