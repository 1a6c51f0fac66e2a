"""The hand-written gradients of the slot operations against finite differences, in float64."""

from __future__ import annotations

import numpy as np
import torch

from esper_env.population.torch_engine.mixing import GatherMembers, Group, Mix, MixResiduals
from esper_env.rng import make_key, uniform

B, H, W, M, C = 2, 2, 2, 5, 3


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gather_has_the_gradient_of_indexing_and_none_where_detached() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = tensor(B, H, W, M, C)
    index = torch.tensor([4, 1])
    keep = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: GatherMembers.apply(x, [None, None], index, torch.tensor([0])), (features,)
    )
    (out,) = GatherMembers.apply(features, [keep], index)
    (grad,) = torch.autograd.grad(out.sum(), features)
    assert (grad[:, :, :, 4] == 1).all()
    assert (grad[:, :, :, [0, 1, 2, 3]] == 0).all(), "member 1 is isolated"


def test_mix_has_the_gradient_of_its_formula_when_beta_is_alpha() -> None:
    """One group with ADD, GATE and MULTIPLY members, one with ADD only."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        features, gate = tensor(B, H, W, M, C), tensor(B, 1)
        branches = tensor(B, H, W, 3, C), tensor(B, H, W, 1, C)
    groups = (
        Group(torch.tensor([3, 0, 2]), num_gate=1, num_multiply=1, first_gate=0),
        Group(torch.tensor([4]), num_gate=0, num_multiply=0, first_gate=1),
    )
    alpha = torch.tensor([0.3, 0.7, 0.5], dtype=torch.float64).repeat_interleave(C)
    weights = (alpha, None)
    mixes = [Mix(g, w, w, is_visible=True) for g, w in zip(groups, weights, strict=True)]
    out = MixResiduals.apply(features, gate, mixes, *branches)
    expected = features.detach().clone()
    first, second = (b.detach() for b in branches)
    expected[:, :, :, 3] += 0.3 * first[:, :, :, 0]
    expected[:, :, :, 0] += 0.7 * gate.detach()[:, 0, None, None, None] * first[:, :, :, 1]
    expected[:, :, :, 2] *= 1 + 0.5 * torch.tanh(first[:, :, :, 2])
    expected[:, :, :, 4] += second[:, :, :, 0]
    torch.testing.assert_close(out.detach(), expected)
    assert torch.autograd.gradcheck(
        lambda x, g, *b: MixResiduals.apply(x, g, mixes, *b), (features, gate, *branches)
    )


def test_a_training_seed_is_invisible_forward_and_fully_visible_backward() -> None:
    """The mix h + r - sg(r): alpha 0, beta 1."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        features, branch = tensor(B, H, W, M, C), tensor(B, H, W, 1, C)
    group = Group(torch.tensor([1]), num_gate=0, num_multiply=0, first_gate=0)
    zero = torch.zeros(C, dtype=torch.float64)
    mix = Mix(group, alpha=zero, beta=None, is_visible=False)
    out = MixResiduals.apply(features, None, [mix], branch)
    assert torch.equal(out, features)
    weight = torch.randn_like(out)
    grad_features, grad_branch = torch.autograd.grad((out * weight).sum(), (features, branch))
    torch.testing.assert_close(grad_features, weight)
    torch.testing.assert_close(grad_branch[:, :, :, 0], weight[:, :, :, 1])


def test_streams_are_uniform_independent_and_stateless() -> None:
    """A number depends on key and counter alone; moments of 200,000 draws within 5 sigma."""
    keys = make_key(np.arange(4), 7)
    draws = uniform(keys, 50_000)
    np.testing.assert_array_equal(uniform(keys[2:3], 100), draws[2:3, :100])
    assert len(set(keys.tolist())) == 4
    assert ((draws >= 0) & (draws < 1)).all()
    # Standard error of a mean of uniforms: 1 / sqrt(12 n).
    assert abs(draws.mean() - 0.5) < 5 / np.sqrt(12 * draws.size)
    correlation = np.corrcoef(draws)
    assert np.abs(correlation - np.eye(4)).max() < 5 / np.sqrt(50_000)
    assert not np.array_equal(make_key(np.arange(4), 7, 1), make_key(keys, 2))
