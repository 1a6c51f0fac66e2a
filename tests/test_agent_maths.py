"""Formulas of the agent against hand-computed examples, NumPy and plain loops.

No environment is stepped here: advantages, return scale, masked heads, losses and the LSTM with
resets inside a sequence are pure functions of tensors. `test_agent_training.py` runs them on
rollouts.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.agent import step_by_step
from esper_agent.envs import ReturnScale, one_thread, pad_masks
from esper_agent.layers import MaskedCategorical
from esper_agent.ppo_lstm import (
    Agent,
    compute_gae,
    mean_entropies,
    policy_loss,
    run_lstm,
    subtract_group_baseline,
)
from tests.builders import is_legal, sharpen

HEADS: dict[str, list[Any]] = {"op": [0, 1, 2], "slot": [0, 1], "x": [0, 1, 2], "y": [0, 1]}
"""A small action space with 36 joint actions."""
OBSERVATION_NAMES = ["a", "b", "slot_0.c", "slot_0.d", "slot_1.c", "slot_1.d"]
FLOAT32_SUM = 1e-5
"""Tolerance of a sum of some dozen float32 probabilities, each rounded to 6e-8."""


# ------------------------------------------------------------------------------ advantages


@pytest.mark.parametrize(
    ("termination", "truncation", "expected"),
    [
        # delta_1 = 1 + 0 - 2 = -1; A_1 = -1, nothing from A_2; A_0 = 1 - 1/4.
        pytest.param(True, False, [0.75, -1.0, 2.0], id="termination"),
        # The state is terminal whatever else ended.
        pytest.param(True, True, [0.75, -1.0, 2.0], id="both"),
        # delta_1 = 1 + 8/2 - 2 = 3, with the value before the reset; A_1 = 3; A_0 = 1 + 3/4.
        pytest.param(False, True, [1.75, 3.0, 2.0], id="truncation"),
        # delta_1 = 1 + 4/2 - 2 = 1; A_1 = 1 + 2/4; A_0 = 1 + 3/8.
        pytest.param(False, False, [1.375, 1.5, 2.0], id="neither"),
    ],
)
def test_advantages_bootstrap_at_a_truncation_and_not_at_a_termination(
    termination: bool, truncation: bool, expected: list[float]
) -> None:
    """Finding LOOP-3: three steps, gamma = lambda = 1/2; every number is exact in binary.

    r = (1, 1, 1), V(s) = (1, 2, 4), V(s') before any reset = (2, v, 10), where v is V(s_2) = 4 if
    the episode goes on after step 1, and 8 if it ends there. delta_0 = 1 + 2/2 - 1 = 1 and
    A_2 = delta_2 = 1 + 10/2 - 4 = 2: the end of a rollout bootstraps.
    """
    column = [[1.0], [1.0], [1.0]]
    advantages = compute_gae(
        torch.tensor(column),
        torch.tensor([[1.0], [2.0], [4.0]]),
        torch.tensor([[2.0], [8.0 if termination or truncation else 4.0], [10.0]]),
        torch.tensor([[False], [termination], [False]]),
        torch.tensor([[False], [truncation], [False]]),
        gamma=0.5,
        gae_lambda=0.5,
    )
    assert advantages[:, 0].tolist() == expected


def test_advantages_of_one_sub_environment_do_not_depend_on_another() -> None:
    """Finding SYN-POS, also where they end at different steps."""
    rng = np.random.default_rng(0)
    numbers = [torch.from_numpy(rng.normal(size=(9, 3))).float() for _ in range(3)]
    ends = [torch.from_numpy(rng.random((9, 3)) < 0.2) for _ in range(2)]
    together = compute_gae(*numbers, *ends, 0.9, 0.8)
    assert ends[0].any()
    assert ends[1].any()
    for i in range(3):
        alone = compute_gae(*(part[:, i : i + 1] for part in (*numbers, *ends)), 0.9, 0.8)
        assert torch.equal(alone, together[:, i : i + 1])


# ------------------------------------------------------------------------------ group baseline


def test_the_group_baseline_by_hand() -> None:
    """Others have (1, 3) and (-1, -3): coefficient (4 x 3) / (1 + 9 + 1 + 9) = 0.6.

    3 - 0.6 x 1 = 2.4 and 1 - 0.6 x 3 = -0.8; squares sum to 12.8 instead of 20. A group of one
    keeps its advantages.
    """
    advantages = torch.tensor([[3.0, 1.0], [-3.0, -1.0]])
    result, left = subtract_group_baseline(advantages, 2)
    assert torch.allclose(result, torch.tensor([[2.4, -0.8], [-2.4, 0.8]]))
    assert left == pytest.approx(0.64)
    result, left = subtract_group_baseline(advantages, 1)
    assert torch.equal(result, advantages)
    assert left == 1.0


def test_the_group_baseline_removes_shared_luck_and_keeps_the_effect_of_actions() -> None:
    """Advantage = effect of the own action (+-1) + luck of the group (sd 10).

    With luck removed, variance 1 + 1/3 of 101 is left. The policy gradient, the mean of the action
    times the advantage, is 1 with a standard error of 0.07 before (sd 10 over 20,000 samples)
    and 0.01 after: within 0.05 of 1 it is unbiased.
    """
    rng = torch.Generator().manual_seed(0)
    action = torch.randint(0, 2, (500, 40), generator=rng) * 2.0 - 1
    luck = 10 * torch.randn(500, 10, generator=rng).repeat_interleave(4, dim=1)
    result, left = subtract_group_baseline(action + luck, 4)
    assert left < 0.05
    assert float((action * result).mean()) == pytest.approx(1.0, abs=0.05)


# ------------------------------------------------------------------------------ return scale


def std_of_returns(rewards: np.ndarray, dones: np.ndarray, gamma: float) -> float:
    """Return the standard deviation of R_t = gamma * R_{t-1} + r_t, with R = 0 at each start."""
    returns, running = np.zeros_like(rewards), np.zeros(rewards.shape[1])
    for t in range(len(rewards)):
        returns[t] = running = gamma * running + rewards[t]
        running = np.where(dones[t], 0.0, running)
    return float(np.std(returns))


@pytest.mark.parametrize(("gamma", "tolerance"), [(0.0, 1e-6), (0.9, 1e-12)])
@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("num_envs", [1, 5])
def test_return_scale_is_the_standard_deviation_of_discounted_returns(
    gamma: float, tolerance: float, offset: float, num_envs: int
) -> None:
    """Finding TRN-1.

    With gamma = 0 the returns are the rewards themselves, so an offset of 1e8 meets a spread of 1:
    a sum of squares would lose all its digits (1e16 * 2e-16 = 2), and so would float32 (a step of
    8). The tolerance is 1e-6 because a number near 1e8 is rounded by 1.5e-8 in float64. With
    gamma = 0.9 it is 1e-12: 1,000 float64 additions, each rounded to 1e-16 of values no more than
    ten times their standard deviation.
    """
    rng = np.random.default_rng(1)
    rewards = offset + rng.normal(size=(200, num_envs))
    dones = rng.random((200, num_envs)) < 0.1
    expected = std_of_returns(rewards, dones, gamma)
    if gamma:
        assert expected != pytest.approx(std_of_returns(rewards, dones & False, gamma), rel=1e-3)
    scale = ReturnScale(gamma, np.zeros(num_envs))
    for row, done in zip(rewards, dones, strict=True):
        scale.update(row, done)
    assert scale.std == pytest.approx(expected, rel=tolerance)


def test_return_scale_is_one_while_there_is_no_spread() -> None:
    """Rewards are divided by it, so it is never 0; the standard deviation of -3 and 3 is 3."""
    for rewards, expected in (([], 1.0), ([3.0], 1.0), ([3.0, 3.0], 1.0), ([-3.0, 3.0], 3.0)):
        scale = ReturnScale(0.0, np.zeros(1))
        for reward in rewards:
            scale.update(np.array([reward]), np.zeros(1, dtype=bool))
        assert scale.std == expected


# ------------------------------------------------------------------------------ masked heads


def small_agent() -> Agent:
    """An agent for HEADS whose heads are far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return sharpen(Agent(OBSERVATION_NAMES, HEADS, hidden_size=8))


def small_inputs(num_envs: int) -> tuple[Tensor, Tensor]:
    """Hidden states and slot encodings as `get_next_state` gives them."""
    generator = torch.Generator().manual_seed(5)
    slots = torch.rand(num_envs, 2 * 32, generator=generator)
    return torch.randn(num_envs, 8, generator=generator), slots


def small_masks(num_envs: int) -> dict[str, np.ndarray]:
    """Random conditional masks of HEADS, as an environment gives them.

    Op 0 is always legal with slot 0 and option 0 only; rows below an illegal choice are empty.
    """
    rng = np.random.default_rng(7)
    ops, slots, first, second = map(len, HEADS.values())
    rest = [rng.random((num_envs, ops, slots, n)) < 0.7 for n in (first, second)]
    slot = rng.random((num_envs, ops, slots)) < 0.7
    slot[:, 0] = [True, False]
    for mask in rest:
        mask[:, 0] = False
        mask[:, 0, 0, 0] = True
        slot &= mask.any(axis=-1)
    for mask in rest:
        mask &= slot[..., None]
    return {"op": slot.any(axis=-1), "slot": slot, "x": rest[0], "y": rest[1]}


def masks_of(op: Tensor, slot: Tensor, rest: Tensor) -> Tensor:
    """Pad masks given op and slot: op (..., 3), slot (..., 2), both others (..., 2, 3)."""
    slot = torch.cat([slot, torch.zeros_like(slot[..., :1])], dim=-1)
    return torch.cat([op[..., None, :], slot[..., None, :], rest], dim=-2)


def test_padded_masks_are_those_of_the_environment_for_every_op_and_slot() -> None:
    """Brute force: options that a mask does not have are False."""
    masks = small_masks(4)
    padded = pad_masks(masks, "cpu")
    assert padded.shape == (4, 3, 2, len(HEADS), 3)
    for env, op, slot in itertools.product(range(4), range(3), range(2)):
        rows = [masks["op"][env], masks["slot"][env, op]]
        rows += [masks[name][env, op, slot] for name in ("x", "y")]
        expected = [row.tolist() + [False] * (3 - len(row)) for row in rows]
        assert padded[env, op, slot].tolist() == expected


def test_probabilities_of_all_legal_joint_actions_sum_to_one() -> None:
    """Brute force over the 36 joint actions of each of 20 sub-environments.

    The sum over legal ones is 1, so the heads form one distribution; an illegal one has
    probability exactly 0.
    """
    num_envs = 20
    agent, conditional = small_agent(), small_masks(num_envs)
    masks = pad_masks(conditional, "cpu")
    total, num_illegal = torch.zeros(num_envs), 0
    for action in itertools.product(*HEADS.values()):
        actions = torch.tensor(action).expand(num_envs, -1)
        chosen = masks[torch.arange(num_envs), actions[:, 0], actions[:, 1]]
        with torch.no_grad():
            log_probs, _, _ = agent.evaluate_actions(*small_inputs(num_envs), actions, chosen)
        probability = log_probs.sum(-1).exp()
        illegal = torch.from_numpy(~is_legal(conditional, actions.numpy()))
        assert (probability[illegal] == 0.0).all(), action
        total += probability
        num_illegal += int(illegal.sum())
    assert num_illegal > 100
    torch.testing.assert_close(total, torch.ones(num_envs), rtol=0, atol=FLOAT32_SUM)


def test_illegal_actions_are_never_sampled() -> None:
    """300 samples for 20 sub-environments with random masks, each of which forbids a third."""
    num_envs = 20
    agent, conditional = small_agent(), small_masks(num_envs)
    masks, generator = pad_masks(conditional, "cpu"), torch.Generator().manual_seed(0)
    seen: set[Any] = set()
    for _ in range(300):
        with torch.no_grad():
            actions, _ = agent.get_action(*small_inputs(num_envs), masks, generator)
        assert is_legal(conditional, actions.numpy()).all()
        seen |= {(env, tuple(action)) for env, action in enumerate(actions.tolist())}
    assert len(seen) > 5 * num_envs, "the samples hardly vary, so the test says little"


def test_the_most_likely_action_is_legal_even_if_an_illegal_op_is_preferred() -> None:
    """The bias makes the illegal op by far the most likely one before masking."""
    agent, conditional = small_agent(), small_masks(20)
    with torch.no_grad():
        agent.op_head.bias[2] = 1e4
        actions, _ = agent.get_action(*small_inputs(20), pad_masks(conditional, "cpu"), None)
    allows = conditional["op"][:, 2]
    assert not allows.all()
    assert np.array_equal(actions[:, 0].numpy() == 2, allows)


def test_samples_follow_the_log_probabilities() -> None:
    """Frequencies of 20,000 samples lie within 5 standard errors of the probabilities.

    The error of a bin is sqrt(p (1 - p) / n) <= 0.0036, and chance exceeds 5 of them in one of 2
    million bins. The samples are seeded.
    """
    count = 20_000
    agent = small_agent()
    hidden, slots = (part.expand(count, -1) for part in small_inputs(1))
    masks = torch.zeros(count, 3, 2, 4, 3, dtype=torch.bool)
    for head, options in enumerate(([0, 1, 2], [0, 1], [0, 2], [0, 1])):
        masks[..., head, options] = True
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        actions, chosen = agent.get_action(hidden, slots, masks, generator)
        log_probs, _, _ = agent.evaluate_actions(hidden, slots, actions, chosen)
    joint, counts = torch.unique(actions, dim=0, return_counts=True)
    assert len(joint) > 12
    for action, frequency in zip(joint, counts / count, strict=True):
        first = (actions == action).all(dim=1).nonzero()[0, 0]
        p = float(log_probs[first].sum().exp())
        error = math.sqrt(p * (1 - p) / count)
        assert abs(float(frequency) - p) < 5 * error + 1 / count, action.tolist()


def test_a_head_with_one_legal_option_has_no_probability_entropy_or_gradient() -> None:
    """Its log-probability is exactly 0, so neither the ratio nor the loss can move it."""
    agent = small_agent()
    actions = torch.zeros(4, 4, dtype=torch.int64)
    one = torch.tensor([True, False, False])
    masks = masks_of(
        op=torch.tensor([True, True, False]).expand(4, -1),
        slot=one[:2].expand(4, -1),
        rest=one.expand(4, 2, -1),
    )
    log_probs, entropies, num_legal = agent.evaluate_actions(*small_inputs(4), actions, masks)
    assert (num_legal > 1).tolist() == [[True, False, False, False]] * 4
    assert (log_probs[:, 1:] == 0).all()
    assert (entropies[:, 1:] == 0).all()
    assert (log_probs[:, 0] < 0).all()
    assert (entropies[:, 0] > 0).all()
    (log_probs.sum() + entropies.sum()).backward()
    for head in (agent.slot_head, agent.rest_head, agent.slots_to_joint, agent.hidden_to_joint):
        assert head.weight.grad is not None
        assert (head.weight.grad == 0).all()
    assert agent.op_head.weight.grad is not None
    assert (agent.op_head.weight.grad != 0).any()


def test_a_masked_categorical_by_hand() -> None:
    """Two legal options with logits 0 and ln 3 have p = 1/4, 3/4.

    H = ln 4 / 4 + 3/4 ln(4/3) = 0.5623 nats; the third option is illegal and its logit, 50, is
    irrelevant. With the noise of the first option 2 larger, 0 + 2 exceeds ln 3 = 1.1. Tolerance
    1e-6: float32 rounding of three terms below 1.
    """
    logits, mask = torch.tensor([[0.0, math.log(3.0), 50.0]]), torch.tensor([[True, True, False]])
    options = MaskedCategorical(logits, mask)
    log_probs = [float(options.log_prob(torch.tensor([k]))) for k in (0, 1)]
    assert log_probs == pytest.approx([math.log(0.25), math.log(0.75)], abs=1e-6)
    expected = math.log(4) / 4 + 0.75 * math.log(4 / 3)
    assert float(options.entropy()) == pytest.approx(expected, abs=1e-6)
    assert (options.num_legal() > 1).tolist() == [True]
    assert options.mode().tolist() == [1]
    assert options.sample(torch.tensor([[2.0, 0.0, 0.0]])).tolist() == [0]


def test_no_op_has_a_probability_floor() -> None:
    """Finding PRE-11.

    Ops 0 and 1 have logit 0 and op 2 has -200: log p = -200 - ln(2 + e^-200) = -200.693, and
    exp of that is below the smallest float32. With +200 its probability is 1. Tolerance 1e-4: a
    float32 near 200 is rounded by 1.5e-5.
    """
    for logit, expected in ((-200.0, -200.0 - math.log(2.0)), (200.0, 0.0)):
        options = MaskedCategorical(torch.tensor([0.0, 0.0, logit]), torch.ones(3) > 0)
        log_prob = options.log_prob(torch.tensor(2))
        assert float(log_prob) == pytest.approx(expected, abs=1e-4)
        assert float(log_prob.exp()) == (0.0 if logit < 0 else 1.0)


def test_mean_entropy_counts_only_steps_with_a_choice() -> None:
    """Finding SYN-H3.

    2 steps, 2 sub-environments. Head 0 always has a choice: (1 + 2 + 3 + 4) / 4 = 2.5. Head 1 has
    it once: 8, not 8 / 4. Head 2 has it twice: (6 + 2) / 2 = 4; its other entropies, 100, do not
    count. Head 3 never has it: 0, not 0 / 0.
    """
    entropies = [[[1, 8, 100, 5], [2, 0, 6, 5]], [[3, 0, 2, 5], [4, 0, 100, 5]]]
    choices = [[[1, 1, 0, 0], [1, 0, 1, 0]], [[1, 0, 1, 0], [1, 0, 0, 0]]]
    result = mean_entropies(torch.tensor(entropies).float(), torch.tensor(choices) > 0)
    assert result.tolist() == [2.5, 8.0, 4.0, 0.0]


# ------------------------------------------------------------------------------ policy loss


@pytest.mark.parametrize(("first", "expected"), [(1.5, -0.8), (0.75, -0.35)])
def test_policy_loss_by_hand(first: float, expected: float) -> None:
    """Advantages 2 and -1, clipping 0.2.

    Ratio 1.5 and A = 2: min(3, 1.2 * 2) = 2.4; ratio 0.75: min(1.5, 0.8 * 2) = 1.5. Ratio 0.5 and
    A = -1: min(-0.5, -0.8) = -0.8. The loss is -(2.4 - 0.8) / 2 or -(1.5 - 0.8) / 2. Tolerance
    1e-6: float32.
    """
    loss = policy_loss(torch.tensor([[first, 0.5]]), torch.tensor([[2.0, -1.0]]), 0.2)
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_heads_without_a_choice_add_nothing_to_the_joint_kl() -> None:
    """Finding SYN-H6.

    The weights of slot and rest heads change a lot between old and new policy. Rows 0 and 1 take
    op 0, which leaves those heads one option, so their joint log ratio is exactly 0. Rows 2 and 3
    take op 1, which leaves them a choice, and differ.
    """
    agent = small_agent()
    inputs = small_inputs(4)
    actions = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 2, 1], [1, 0, 1, 0]])
    is_op_one = (actions[:, 0] == 1)[:, None]
    masks = masks_of(
        torch.ones(4, 3, dtype=torch.bool),
        torch.tensor([True, False]) | is_op_one,
        torch.tensor([True, False, False]) | is_op_one[..., None].expand(-1, 2, 3),
    )
    with torch.no_grad():
        old = agent.evaluate_actions(*inputs, actions, masks)[0]
        for head in (agent.slot_head, agent.rest_head):
            head.weight.mul_(-3.0)
        new, _, num_legal = agent.evaluate_actions(*inputs, actions, masks)
    logratio = (new - old).sum(-1)
    kl = logratio.exp() - 1 - logratio
    assert (num_legal > 1).sum(-1).tolist() == [1, 1, 4, 4]
    assert kl[:2].tolist() == [0.0, 0.0]
    assert (kl[2:] > 1e-3).all()


# ------------------------------------------------------------------------------ LSTM


def loop_over_steps(
    lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor], dones: Tensor
) -> Tensor:
    """Run an LSTM step by step and sequence by sequence, from zeros wherever an episode starts."""
    rows = []
    for i in range(x.shape[1]):
        h, c = state[0][:, i : i + 1], state[1][:, i : i + 1]
        outputs = []
        for t in range(len(x)):
            if dones[t, i]:
                h, c = torch.zeros_like(h), torch.zeros_like(c)
            out, (h, c) = lstm(x[t : t + 1, i : i + 1], (h, c))
            outputs.append(out[0, 0])
        rows.append(torch.stack(outputs))
    return torch.stack(rows, dim=1)


def dones_at(*sequences: tuple[int, ...]) -> Tensor:
    """Return `dones` of 7 steps; one tuple of step indices per sequence."""
    dones = torch.zeros(7, len(sequences), dtype=torch.bool)
    for i, steps in enumerate(sequences):
        dones[list(steps), i] = True
    return dones


@pytest.mark.parametrize(
    "dones",
    [
        pytest.param(dones_at((), (), ()), id="none"),
        pytest.param(dones_at((0,), (0,), (0,)), id="all-at-0"),
        pytest.param(dones_at((0,), (), (0,)), id="some-at-0"),
        pytest.param(dones_at((1,), (), ()), id="at-1-only"),
        pytest.param(dones_at((3,), (3,), (3,)), id="together"),
        pytest.param(dones_at((2,), (5,), ()), id="staggered"),
        pytest.param(dones_at((0, 2, 3), (6,), (1, 4, 5, 6)), id="several"),
        pytest.param(dones_at((), (0, 1, 2, 3, 4, 5, 6), (4,)), id="every-step"),
        pytest.param(dones_at((2, 4)), id="one-sequence"),
    ],
)
def test_lstm_over_whole_sequences_equals_a_loop_with_resets(dones: Tensor) -> None:
    """Findings TRN-2, SYN-H5: each sequence is reset at its own steps, in outputs and gradients.

    `step_by_step`, with which the benchmark of the agent compares, gives the same.
    Run in float64, where the order of additions changes results by about 1e-15; 1e-12 leaves a
    margin.
    """
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_envs = dones.shape[1]
    lstm = nn.LSTM(3, 4).double()
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.copy_(draw(*parameter.shape))
    inputs = [draw(7, num_envs, 3), draw(1, num_envs, 4), draw(1, num_envs, 4)]
    weight = draw(7, num_envs, 4)
    results = []
    for run in (run_lstm, loop_over_steps, step_by_step):
        x, h, c = (tensor.clone().requires_grad_() for tensor in inputs)
        lstm.zero_grad()
        out = run(lstm, x, (h, c), dones)
        (out * weight).sum().backward()
        # A state that a reset cuts off everywhere may have no gradient at all; that is a zero.
        gradients = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()
            for tensor in (x, h, c, *lstm.parameters())
        ]
        results.append([out.detach(), *gradients])
    for actual, expected, benchmarked in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(benchmarked, expected, rtol=0, atol=1e-12)


def test_nothing_before_an_episode_starts_reaches_it() -> None:
    """Findings TRN-2 and TRN-7: once sequence 0 starts again at step 3, it ignores steps before.

    Sequence 1 starts at step 5, so its step 4 still depends on its step 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lstm = nn.LSTM(3, 4)
    dones = dones_at((3,), (5,))
    x = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(1))
    state = (torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    changed = x.clone()
    changed[0] += 1.0
    with torch.no_grad():
        before, after = run_lstm(lstm, x, state, dones), run_lstm(lstm, changed, state, dones)
    assert torch.equal(before[3:, 0], after[3:, 0])
    assert torch.equal(before[5:, 1], after[5:, 1])
    assert (before[2, 0] != after[2, 0]).any()
    assert (before[4, 1] != after[4, 1]).any()


def test_one_step_equals_a_sequence_of_one_with_and_without_a_reset() -> None:
    """Acting and training share the network; the tolerance 1e-6 is float32 rounding near 1."""
    agent = small_agent()
    generator = torch.Generator().manual_seed(2)
    obs = torch.rand(2, len(OBSERVATION_NAMES), generator=generator)
    h, c = torch.randn(2, 1, 2, 8, generator=generator)
    dones = torch.tensor([True, False])
    with torch.no_grad():
        hidden, slots, _ = agent.get_next_state(obs, (h, c), dones)
        sequence, encodings = agent.get_states(obs[None], (h, c), dones[None])
        fresh, _, _ = agent.get_next_state(obs, agent.get_initial_state(2), dones & False)
    torch.testing.assert_close(sequence[0], hidden, rtol=0, atol=1e-6)
    torch.testing.assert_close(encodings[0], slots, rtol=0, atol=1e-6)
    assert torch.equal(hidden[0], fresh[0])
    assert (hidden[1] - fresh[1]).abs().max() > 1e-3


def test_an_agent_without_memory_acts_on_the_present_observation_alone() -> None:
    """Whatever the state, step by step and in whole sequences; one with memory does not."""
    generator = torch.Generator().manual_seed(0)
    for recurrent in (False, True):
        agent = Agent(["a", "slot_0.b"], {"op": [0, 1], "slot": [0], "x": [0, 1]}, 8, recurrent)
        obs = torch.randn(5, 3, 2, generator=generator)
        h, c = torch.randn(2, 1, 3, 8, generator=generator)
        dones = torch.zeros(5, 3, dtype=torch.bool)
        with torch.no_grad():
            whole, _ = agent.get_states(obs, (h, c), dones)
            alone, *_ = agent.get_next_state(obs[4], agent.get_initial_state(3), dones[4])
            later, *_ = agent.get_next_state(obs[4], (h, c), dones[4])
        assert torch.allclose(whole[4], alone, atol=FLOAT32_SUM) is not recurrent
        assert torch.equal(later, alone) is not recurrent


# ------------------------------------------------------------------------------ threads


@pytest.mark.usefixtures("threads")
def test_one_thread_restores_the_number_of_threads_also_after_an_error() -> None:
    """As a context manager and as a decorator, which must work on every call."""

    @one_thread()
    def fail() -> None:
        assert torch.get_num_threads() == 1
        raise KeyError

    torch.set_num_threads(3)
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert torch.get_num_threads() == 3
