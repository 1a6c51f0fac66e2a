"""Formulas of the agent against hand-computed examples, NumPy and plain loops.

No environment is stepped here: advantages, return scale, masked heads, losses and the LSTM with
resets inside a sequence are pure functions of tensors. `test_agent_training.py` runs them on
rollouts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper_agent.ppo_lstm import (
    Agent,
    ReturnScale,
    compute_gae,
    mean_entropies,
    one_thread,
    pad_masks,
    policy_loss,
    run_lstm,
    subtract_group_baseline,
)

NVEC = (3, 2, 3, 2)
"""Options of a small action space: op, slot and two more heads; 36 joint actions."""
OBSERVATION_NAMES = ("a", "b", "slot_0.c", "slot_0.d", "slot_1.c", "slot_1.d")
FLOAT32_SUM = 1e-5
"""Tolerance of a sum of some dozen float32 probabilities, each rounded to 6e-8."""


# ------------------------------------------------------------------------------ advantages


def gae_of_three_steps(terminations: list[bool], truncations: list[bool]) -> list[float]:
    """Advantages of one member with gamma = lambda = 1/2; every number is exact in binary.

    r = (1, 1, 1), V(s) = (1, 2, 4), V(s') before any reset = (2, v, 10), where v is V(s_2) = 4 if
    the episode goes on after step 1, and 8 if it ends there.
    """
    ends = terminations[1] or truncations[1]
    column = [[1.0], [1.0], [1.0]]
    advantages = compute_gae(
        torch.tensor(column),
        torch.tensor([[1.0], [2.0], [4.0]]),
        torch.tensor([[2.0], [8.0 if ends else 4.0], [10.0]]),
        torch.tensor(terminations)[:, None],
        torch.tensor(truncations)[:, None],
        gamma=0.5,
        gae_lambda=0.5,
    )
    result: list[float] = advantages[:, 0].tolist()
    return result


def test_advantages_do_not_bootstrap_at_a_termination() -> None:
    """Finding LOOP-3.

    delta_2 = 1 + 5 - 4 = 2; delta_1 = 1 + 0 - 2 = -1 (not 1 + 4 - 2 = 3);
    delta_0 = 1 + 1 - 1 = 1. A_2 = 2; A_1 = -1, nothing from A_2; A_0 = 1 - 1/4 = 3/4.
    """
    assert gae_of_three_steps([False, True, False], [False] * 3) == [0.75, -1.0, 2.0]


def test_advantages_bootstrap_the_value_before_the_reset_at_a_truncation() -> None:
    """Finding LOOP-3.

    delta_1 = 1 + 8/2 - 2 = 3, with the value before the reset, and A_1 = 3 takes nothing from
    A_2 = 2, which belongs to the next episode. A_0 = 1 + 3/4 = 7/4.
    """
    assert gae_of_three_steps([False] * 3, [False, True, False]) == [1.75, 3.0, 2.0]


def test_advantages_accumulate_while_the_episode_goes_on() -> None:
    """Finding LOOP-3.

    delta_2 = 1 + 10/2 - 4 = 2 (the end of a rollout bootstraps); delta_1 = 1 + 4/2 - 2 = 1;
    delta_0 = 1 + 2/2 - 1 = 1. A_2 = 2; A_1 = 1 + 2/4 = 3/2; A_0 = 1 + 3/8 = 11/8.
    """
    assert gae_of_three_steps([False] * 3, [False] * 3) == [1.375, 1.5, 2.0]


def test_a_termination_outweighs_a_truncation_in_the_same_step() -> None:
    """The state is terminal whatever else ended: delta_1 = 1 - 2 = -1."""
    both = [False, True, False]
    assert gae_of_three_steps(both, both) == [0.75, -1.0, 2.0]


def test_advantages_of_one_member_do_not_depend_on_another() -> None:
    """Finding SYN-POS: members are isolated, also when they end at different steps."""
    rng = np.random.default_rng(0)
    rewards, values, next_values = (
        torch.from_numpy(rng.normal(size=(9, 3))).float() for _ in range(3)
    )
    terminations = torch.from_numpy(rng.random((9, 3)) < 0.2)
    truncations = torch.from_numpy(rng.random((9, 3)) < 0.2)
    together = compute_gae(rewards, values, next_values, terminations, truncations, 0.9, 0.8)
    assert terminations.any()
    assert truncations.any()
    for i in range(3):
        one = slice(i, i + 1)
        alone = compute_gae(
            rewards[:, one],
            values[:, one],
            next_values[:, one],
            terminations[:, one],
            truncations[:, one],
            0.9,
            0.8,
        )
        assert torch.equal(alone, together[:, one])


# ------------------------------------------------------------------------------ group baseline


def test_the_group_baseline_by_hand() -> None:
    """Others have (1, 3) and (-1, -3): coefficient (4 x 3) / (1 + 9 + 1 + 9) = 0.6.

    3 - 0.6 x 1 = 2.4 and 1 - 0.6 x 3 = -0.8; squares sum to 12.8 instead of 20.
    """
    advantages = torch.tensor([[3.0, 1.0], [-3.0, -1.0]])
    result, left = subtract_group_baseline(advantages, 2)
    assert torch.allclose(result, torch.tensor([[2.4, -0.8], [-2.4, 0.8]]))
    assert left == pytest.approx(0.64)


def test_a_group_of_one_keeps_its_advantages() -> None:
    """There is nobody to compare with."""
    advantages = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
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


def discounted_returns(rewards: np.ndarray, is_over: np.ndarray, gamma: float) -> np.ndarray:
    """Return R_t = gamma * R_{t-1} + r_t, with R = 0 before the first step of an episode."""
    returns = np.zeros_like(rewards)
    for i in range(rewards.shape[1]):
        running = 0.0
        for t in range(len(rewards)):
            running = gamma * running + rewards[t, i]
            returns[t, i] = running
            if is_over[t, i]:
                running = 0.0
    return returns


@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("num_envs", [1, 5])
def test_return_scale_is_numpys_std_of_the_discounted_returns(offset: float, num_envs: int) -> None:
    """Finding TRN-1.

    With gamma = 0 the returns are the rewards themselves, so an offset of 1e8 meets a spread of 1:
    a sum of squares would lose all its digits (1e16 * 2e-16 = 2), and so would float32 (a step of
    8). The tolerance is 1e-6 because a number near 1e8 is rounded by 1.5e-8 in float64.
    """
    rng = np.random.default_rng(1)
    rewards = offset + rng.normal(size=(200, num_envs))
    is_over = rng.random((200, num_envs)) < 0.1
    scale = ReturnScale(num_envs, gamma=0.0)
    for row, ends in zip(rewards, is_over, strict=True):
        scale.update(row, ends)
    assert scale.std == pytest.approx(np.std(rewards), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e8])
def test_return_scale_starts_anew_where_episodes_end(offset: float) -> None:
    """Finding TRN-1.

    Tolerance 1e-12: 300 float64 additions, each rounded to 1e-16 of values no more than ten times
    their std.
    """
    rng = np.random.default_rng(2)
    rewards = offset + rng.normal(size=(100, 3))
    is_over = rng.random((100, 3)) < 0.1
    returns = discounted_returns(rewards, is_over, 0.9)
    assert np.std(returns) != pytest.approx(
        np.std(discounted_returns(rewards, np.zeros_like(is_over), 0.9)), rel=1e-3
    )
    scale = ReturnScale(3, gamma=0.9)
    for row, ends in zip(rewards, is_over, strict=True):
        scale.update(row, ends)
    assert scale.std == pytest.approx(np.std(returns), rel=1e-12)


def test_return_scale_is_one_while_there_is_no_spread() -> None:
    """Rewards are divided by it, so it is never 0; the std of -3 and 3 is 3."""
    scale = ReturnScale(1, gamma=0.0)
    never = np.zeros(1, dtype=bool)
    assert scale.std == 1.0
    scale.update(np.array([3.0]), never)
    assert scale.std == 1.0
    scale.update(np.array([3.0]), never)
    assert scale.std == 1.0
    scale = ReturnScale(1, gamma=0.0)
    for reward in (-3.0, 3.0):
        scale.update(np.array([reward]), never)
    assert scale.std == 3.0


# ------------------------------------------------------------------------------ masked heads


def small_agent(rng_seed: int = 0) -> Agent:
    """An agent for NVEC whose heads are far from uniform (their initial gain is 0.01)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng_seed)
        agent = Agent(OBSERVATION_NAMES, NVEC, hidden_size=8)
    with torch.no_grad():
        for head in (agent.op_head, agent.slot_head, agent.rest_head):
            head.weight.mul_(100.0)
    return agent


def small_inputs(num_envs: int) -> tuple[Tensor, Tensor]:
    """Core and slot encodings as `step_core` gives them."""
    generator = torch.Generator().manual_seed(5)
    slots = torch.rand(num_envs, 2 * 32, generator=generator)
    return torch.randn(num_envs, 8, generator=generator), slots


def small_masks(num_envs: int) -> dict[str, np.ndarray]:
    """Random conditional masks of NVEC, as an environment gives them.

    Op 0 is always legal with slot 0 and option 0 only; rows below an illegal choice are empty.
    """
    rng = np.random.default_rng(7)
    ops, slots, first, second = NVEC
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


def is_legal(masks: dict[str, np.ndarray], env: int, action: tuple[int, ...]) -> bool:
    """Look a joint action up in conditional masks."""
    op, slot, x, y = action
    return bool(
        masks["op"][env, op]
        and masks["slot"][env, op, slot]
        and masks["x"][env, op, slot, x]
        and masks["y"][env, op, slot, y]
    )


def along_choice(masks: Tensor, actions: Tensor) -> Tensor:
    """Select the masks that a choice meets, as `Agent.act` returns them."""
    return masks[torch.arange(len(actions)), actions[:, 0], actions[:, 1]]


def masks_of(op: Tensor, slot: Tensor, rest: Tensor) -> Tensor:
    """Pad masks along a choice: op (..., 3), slot (..., 2), both others (..., 2, 3)."""
    slot = torch.cat([slot, torch.zeros_like(slot[..., :1])], dim=-1)
    return torch.cat([op[..., None, :], slot[..., None, :], rest], dim=-2)


def test_padded_masks_are_those_of_the_environment_for_every_op_and_slot() -> None:
    """Brute force: what a mask does not have is False."""
    masks = small_masks(4)
    padded = pad_masks(masks, torch.device("cpu"))
    assert padded.shape == (4, 3, 2, len(NVEC), 3)
    for env, op, slot in itertools.product(range(4), range(3), range(2)):
        rows = [masks["op"][env], masks["slot"][env, op]]
        rows += [masks[name][env, op, slot] for name in ("x", "y")]
        expected = [row.tolist() + [False] * (3 - len(row)) for row in rows]
        assert padded[env, op, slot].tolist() == expected


def test_probabilities_of_all_legal_joint_actions_sum_to_one() -> None:
    """Brute force over the 36 joint actions of each of 20 members.

    The sum over legal ones is 1, so the heads form one distribution; an illegal one has
    probability exactly 0.
    """
    num_envs = 20
    agent, conditional = small_agent(), small_masks(num_envs)
    core, slots = small_inputs(num_envs)
    masks = pad_masks(conditional, torch.device("cpu"))
    total = torch.zeros(num_envs)
    num_illegal = 0
    for action in itertools.product(*(range(n) for n in NVEC)):
        actions = torch.tensor(action).expand(num_envs, -1)
        with torch.no_grad():
            log_probs, _, _ = agent.evaluate_actions(
                core, slots, actions, along_choice(masks, actions)
            )
        probability = log_probs.sum(-1).exp()
        for env in range(num_envs):
            if is_legal(conditional, env, action):
                total[env] += probability[env]
            else:
                num_illegal += 1
                assert probability[env] == 0.0, (env, action)
    assert num_illegal > 100
    torch.testing.assert_close(total, torch.ones(num_envs), rtol=0, atol=FLOAT32_SUM)


def test_illegal_actions_are_never_drawn() -> None:
    """300 draws of 20 members with random masks, of which each forbids about a third."""
    num_envs = 20
    agent, conditional = small_agent(), small_masks(num_envs)
    core, slots = small_inputs(num_envs)
    masks = pad_masks(conditional, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        with torch.no_grad():
            actions, _ = agent.act(core, slots, masks, generator)
        for env, action in enumerate(actions.tolist()):
            assert is_legal(conditional, env, tuple(action)), (env, action)
            seen.add((env, tuple(action)))
    assert len(seen) > 5 * num_envs, "the draws hardly vary, so the test says little"


def test_the_likeliest_action_is_legal_even_if_an_illegal_op_is_preferred() -> None:
    """The bias makes the illegal op by far the likeliest before masking."""
    num_envs = 20
    agent, conditional = small_agent(), small_masks(num_envs)
    core, slots = small_inputs(num_envs)
    with torch.no_grad():
        agent.op_head.bias[2] = 1e4
        actions, _ = agent.act(core, slots, pad_masks(conditional, torch.device("cpu")), None)
    forbids = ~conditional["op"][:, 2]
    assert forbids.any()
    assert (actions[:, 0].numpy()[forbids] != 2).all()
    assert (actions[:, 0].numpy()[~forbids] == 2).all()


def test_draws_follow_the_log_probabilities() -> None:
    """Frequencies of 20,000 draws lie within 5 standard errors of the probabilities.

    An error of a bin is sqrt(p (1 - p) / n) <= 0.0036, and 5 of them are passed by chance in one
    of 2 million bins. The draws are seeded.
    """
    num_draws = 20_000
    agent = small_agent()
    core, slots = (part.expand(num_draws, -1) for part in small_inputs(1))
    conditional = {
        name: np.broadcast_to(mask, (num_draws, *mask.shape[1:])).copy()
        for name, mask in {
            "op": np.ones((1, 3), dtype=bool),
            "slot": np.ones((1, 3, 2), dtype=bool),
            "x": np.array([True, False, True]) & np.ones((1, 3, 2, 3), dtype=bool),
            "y": np.ones((1, 3, 2, 2), dtype=bool),
        }.items()
    }
    masks = pad_masks(conditional, torch.device("cpu"))
    with torch.no_grad():
        actions, along = agent.act(core, slots, masks, torch.Generator().manual_seed(3))
        log_probs, _, _ = agent.evaluate_actions(core, slots, actions, along)
    joint, counts = torch.unique(actions, dim=0, return_counts=True)
    assert len(joint) > 12
    for action, count in zip(joint, counts, strict=True):
        first = (actions == action).all(dim=1).nonzero()[0, 0]
        p = float(log_probs[first].sum().exp())
        error = math.sqrt(p * (1 - p) / num_draws)
        assert abs(int(count) / num_draws - p) < 5 * error + 1 / num_draws, action.tolist()


def test_a_head_with_one_legal_option_has_no_probability_entropy_or_gradient() -> None:
    """Its log-probability is exactly 0, so neither the ratio nor the loss can move it."""
    agent = small_agent()
    core, slots = small_inputs(4)
    actions = torch.zeros(4, 4, dtype=torch.int64)
    masks = masks_of(
        op=torch.tensor([[True, True, False]]).expand(4, -1),
        slot=torch.tensor([[True, False]]).expand(4, -1),
        rest=torch.tensor([[True, False, False], [True, False, False]]).expand(4, -1, -1),
    )
    log_probs, entropies, choices = agent.evaluate_actions(core, slots, actions, masks)
    assert choices.tolist() == [[True, False, False, False]] * 4
    assert (log_probs[:, 1:] == 0).all()
    assert (entropies[:, 1:] == 0).all()
    assert (log_probs[:, 0] < 0).all()
    assert (entropies[:, 0] > 0).all()
    (log_probs.sum() + entropies.sum()).backward()
    for head in (agent.slot_head, agent.rest_head, agent.slots_to_joint, agent.core_to_joint):
        assert head.weight.grad is not None
        assert (head.weight.grad == 0).all()
    assert agent.op_head.weight.grad is not None
    assert (agent.op_head.weight.grad != 0).any()


def test_entropy_is_that_of_the_legal_options_alone() -> None:
    """Two legal options with logits 0 and ln 3 have p = 1/4, 3/4.

    H = ln 4 / 4 + 3/4 ln(4/3) = 0.5623 nats; the third option is illegal and its logit, 50, is
    irrelevant. Tolerance 1e-6: float32 rounding of three terms below 1.
    """
    agent = small_agent()
    with torch.no_grad():
        agent.op_head.weight.zero_()
        agent.op_head.bias.copy_(torch.tensor([0.0, math.log(3.0), 50.0]))
    core, slots = small_inputs(1)
    masks = masks_of(
        torch.tensor([[True, True, False]]),
        torch.tensor([[True, False]]),
        torch.tensor([[[True, False, False], [True, False, False]]]),
    )
    actions = torch.tensor([[1, 0, 0, 0]])
    with torch.no_grad():
        log_probs, entropies, _ = agent.evaluate_actions(core, slots, actions, masks)
    assert float(log_probs[0, 0]) == pytest.approx(math.log(0.75), abs=1e-6)
    expected = math.log(4) / 4 + 0.75 * math.log(4 / 3)
    assert float(entropies[0, 0]) == pytest.approx(expected, abs=1e-6)


def test_no_op_has_a_probability_floor() -> None:
    """Finding PRE-11.

    Ops 0 and 1 have logit 0 and op 2 has -200: log p = -200 - ln(2 + e^-200) = -200.693, and
    exp of that is below the smallest float32. With +200 its probability is 1. Tolerance 1e-4: a
    float32 near 200 is rounded by 1.5e-5.
    """
    agent = small_agent()
    core, slots = small_inputs(1)
    masks = masks_of(
        torch.ones(1, 3, dtype=torch.bool),
        torch.ones(1, 2, dtype=torch.bool),
        torch.ones(1, 2, 3, dtype=torch.bool),
    )
    actions = torch.tensor([[2, 0, 0, 0]])
    for logit, expected in ((-200.0, -200.0 - math.log(2.0)), (200.0, 0.0)):
        with torch.no_grad():
            agent.op_head.weight.zero_()
            agent.op_head.bias.copy_(torch.tensor([0.0, 0.0, logit]))
            log_prob = agent.evaluate_actions(core, slots, actions, masks)[0][0, 0]
        assert float(log_prob) == pytest.approx(expected, abs=1e-4)
        assert float(log_prob.exp()) == (0.0 if logit < 0 else 1.0)


def test_mean_entropy_counts_only_steps_with_a_choice() -> None:
    """Finding SYN-H3.

    2 steps, 2 members. Head 0 always has a choice: (1 + 2 + 3 + 4) / 4 = 2.5. Head 1 has it in
    one step of one member: 8, not 8 / 4. Head 2 has it in two: (6 + 2) / 2 = 4; its other
    entropies, 100, do not count. Head 3 never has it: 0, not 0 / 0.
    """
    entropies = torch.tensor(
        [
            [[1.0, 8.0, 100.0, 5.0], [2.0, 0.0, 6.0, 5.0]],
            [[3.0, 0.0, 2.0, 5.0], [4.0, 0.0, 100.0, 5.0]],
        ]
    )
    choices = torch.tensor(
        [
            [[True, True, False, False], [True, False, True, False]],
            [[True, False, True, False], [True, False, False, False]],
        ]
    )
    assert mean_entropies(entropies, choices).tolist() == [2.5, 8.0, 4.0, 0.0]


# ------------------------------------------------------------------------------ policy loss


def loss_of_two_steps(log_ratio: list[list[float]], choices: list[list[bool]], ratio: str) -> float:
    """Policy loss of one step of two members with advantages 2 and -1 and clipping 0.2."""
    loss = policy_loss(
        torch.tensor([log_ratio]),
        torch.tensor([choices]),
        torch.tensor([[2.0, -1.0]]),
        0.2,
        ratio,
    )
    return float(loss)


def test_joint_policy_loss_by_hand() -> None:
    """One ratio per action, the product over its heads.

    Member 0: 1.5 * 1 = 1.5, A = 2: min(3, 1.2 * 2) = 2.4. Member 1: 0.5 * 1, A = -1:
    min(-0.5, -0.8) = -0.8. Loss = -(2.4 - 0.8) / 2 = -0.8. With ratios 1.5 * 0.5 = 0.75 for
    member 0, min(1.5, 1.6) = 1.5 and the loss is -(1.5 - 0.8) / 2 = -0.35. Tolerance 1e-6:
    float32.
    """
    up, down = math.log(1.5), math.log(0.5)
    choices = [[True, True], [True, False]]
    assert loss_of_two_steps([[up, 0.0], [down, 0.0]], choices, "joint") == pytest.approx(
        -0.8, abs=1e-6
    )
    assert loss_of_two_steps([[up, down], [down, 0.0]], choices, "joint") == pytest.approx(
        -0.35, abs=1e-6
    )


def test_per_head_policy_loss_divides_all_heads_by_the_number_of_steps() -> None:
    """Each head that had a choice is clipped by itself; the denominator is common.

    Member 0, A = 2: head 0 gives min(3, 2.4) = 2.4, head 1 gives 1 * 2 = 2. Member 1, A = -1:
    head 0 gives -0.8, head 1 had no choice. Loss = -(2.4 + 2 - 0.8) / 2 = -1.8. (A mean per head
    over its own steps would be -(0.8 + 2) = -2.8.) Tolerance 1e-6: float32.
    """
    log_ratio = [[math.log(1.5), 0.0], [math.log(0.5), 0.0]]
    choices = [[True, True], [True, False]]
    assert loss_of_two_steps(log_ratio, choices, "per-head") == pytest.approx(-1.8, abs=1e-6)


def test_both_ratios_have_the_same_gradient_at_unchanged_weights() -> None:
    """At ratio 1, d(product)/d log p_h = d(sum)/d log p_h = 1 for a head with a choice.

    So the gradient with respect to each head's log ratio is -A / 2 in both; tolerance: exact.
    """
    choices = torch.ones(1, 2, 3, dtype=torch.bool)
    for ratio in ("joint", "per-head"):
        log_ratio = torch.zeros(1, 2, 3, requires_grad=True)
        policy_loss(log_ratio, choices, torch.tensor([[2.0, -1.0]]), 0.2, ratio).backward()
        assert log_ratio.grad is not None
        assert log_ratio.grad.tolist() == [[[-1.0] * 3, [0.5] * 3]], ratio


def test_heads_without_a_choice_add_nothing_to_the_joint_kl() -> None:
    """Finding SYN-H6.

    The weights of slot and rest heads change a lot between old and new policy. Members 0 and 1
    take op 0, which leaves those heads one option, so their joint log ratio is exactly 0. Members
    2 and 3 take op 1, which leaves them a choice, and differ.
    """
    agent = small_agent()
    core, slots = small_inputs(4)
    actions = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 2, 1], [1, 0, 1, 0]])
    forced = torch.tensor([True, False])
    is_op_one = (actions[:, 0] == 1)[:, None]
    masks = masks_of(
        torch.ones(4, 3, dtype=torch.bool),
        forced | is_op_one,
        torch.tensor([True, False, False]) | is_op_one[..., None].expand(-1, 2, 3),
    )
    with torch.no_grad():
        old = agent.evaluate_actions(core, slots, actions, masks)[0]
        for head in (agent.slot_head, agent.rest_head):
            head.weight.mul_(-3.0)
        new, _, choices = agent.evaluate_actions(core, slots, actions, masks)
    joint = (new - old).sum(-1)
    kl = joint.exp() - 1 - joint
    assert choices.sum(-1).tolist() == [1, 1, 4, 4]
    assert kl[:2].tolist() == [0.0, 0.0]
    assert (kl[2:] > 1e-3).all()


# ------------------------------------------------------------------------------ LSTM


def loop_over_steps(
    lstm: nn.LSTM, x: Tensor, state: tuple[Tensor, Tensor], starts: Tensor
) -> Tensor:
    """Run an LSTM one step and one member at a time, from zeros wherever an episode starts."""
    rows = []
    for i in range(x.shape[1]):
        hidden, cell = state[0][:, i : i + 1], state[1][:, i : i + 1]
        outputs = []
        for t in range(len(x)):
            if starts[t, i]:
                hidden, cell = torch.zeros_like(hidden), torch.zeros_like(cell)
            out, (hidden, cell) = lstm(x[t : t + 1, i : i + 1], (hidden, cell))
            outputs.append(out[0, 0])
        rows.append(torch.stack(outputs))
    return torch.stack(rows, dim=1)


def starts_of(*members: tuple[int, ...]) -> Tensor:
    """Episode starts of 7 steps; one tuple of step indices per member."""
    starts = torch.zeros(7, len(members), dtype=torch.bool)
    for i, steps in enumerate(members):
        starts[list(steps), i] = True
    return starts


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param(starts_of((), (), ()), id="none"),
        pytest.param(starts_of((0,), (0,), (0,)), id="all-at-0"),
        pytest.param(starts_of((0,), (), (0,)), id="some-at-0"),
        pytest.param(starts_of((3,), (3,), (3,)), id="together"),
        pytest.param(starts_of((2,), (5,), ()), id="staggered"),
        pytest.param(starts_of((0, 2, 3), (6,), (1, 4, 5, 6)), id="several"),
        pytest.param(starts_of((), (0, 1, 2, 3, 4, 5, 6), (4,)), id="every-step"),
        pytest.param(starts_of((2, 4)), id="one-member"),
    ],
)
def test_lstm_over_whole_sequences_equals_a_loop_with_resets(starts: Tensor) -> None:
    """Findings TRN-2, SYN-H5: each member is reset at its own steps, in outputs and gradients.

    Run in float64, where the order of additions changes results by about 1e-15; 1e-12 leaves a
    margin.
    """
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    num_envs = starts.shape[1]
    lstm = nn.LSTM(3, 4).double()
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.copy_(draw(*parameter.shape))
    inputs = [draw(7, num_envs, 3), draw(1, num_envs, 4), draw(1, num_envs, 4)]
    weight = draw(7, num_envs, 4)
    results = []
    for run in (run_lstm, loop_over_steps):
        x, hidden, cell = (tensor.clone().requires_grad_() for tensor in inputs)
        lstm.zero_grad()
        out = run(lstm, x, (hidden, cell), starts)
        (out * weight).sum().backward()
        # A state that a reset cuts off everywhere may have no gradient at all; that is a zero.
        gradients = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()
            for tensor in (x, hidden, cell, *lstm.parameters())
        ]
        results.append([out.detach(), *gradients])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_nothing_before_an_episode_starts_reaches_it() -> None:
    """Findings TRN-2 and TRN-7: once member 0 starts anew at step 3, it ignores the steps before.

    Member 1 starts at step 5, so its step 4 still depends on its step 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lstm = nn.LSTM(3, 4)
    starts = starts_of((3,), (5,))
    x = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(1))
    state = (torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    changed = x.clone()
    changed[0] += 1.0
    with torch.no_grad():
        before, after = run_lstm(lstm, x, state, starts), run_lstm(lstm, changed, state, starts)
    assert torch.equal(before[3:, 0], after[3:, 0])
    assert torch.equal(before[5:, 1], after[5:, 1])
    assert (before[2, 0] != after[2, 0]).any()
    assert (before[4, 1] != after[4, 1]).any()


def test_one_step_of_the_core_equals_a_sequence_of_one_with_and_without_a_reset() -> None:
    """Acting and training share the core; the tolerance 1e-6 is float32 rounding near 1."""
    agent = small_agent()
    generator = torch.Generator().manual_seed(2)
    observations = torch.rand(2, len(OBSERVATION_NAMES), generator=generator)
    state = (
        torch.randn(1, 2, 8, generator=generator),
        torch.randn(1, 2, 8, generator=generator),
    )
    starts = torch.tensor([True, False])
    with torch.no_grad():
        core, slots, _ = agent.step_core(observations, state, starts)
        sequence, encodings = agent.sequence_core(observations[None], state, starts[None])
        fresh, _, _ = agent.step_core(
            observations, agent.initial_state(2), torch.zeros(2, dtype=torch.bool)
        )
    torch.testing.assert_close(sequence[0], core, rtol=0, atol=1e-6)
    torch.testing.assert_close(encodings[0], slots, rtol=0, atol=1e-6)
    assert torch.equal(core[0], fresh[0])
    assert (core[1] - fresh[1]).abs().max() > 1e-3


# ------------------------------------------------------------------------------ threads


@pytest.fixture(name="three_threads")
def let_torch_use_three_threads() -> Iterator[None]:
    """More than one, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_the_number_of_threads_is_as_before_after_one_thread_also_if_something_fails() -> None:
    """As a block and as a decorator, which must work on every call."""

    @one_thread()
    def fail() -> None:
        assert torch.get_num_threads() == 1
        raise KeyError

    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3
    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert torch.get_num_threads() == 3
