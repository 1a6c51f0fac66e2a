"""Third-party blueprints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from esper_env import Op, Stage, register_blueprint
from esper_env.population import blueprints
from esper_env.population.layers import Conv, Layer, Norm, Relu
from tests.test_env import action, make, make_single


@pytest.fixture(autouse=True)
def registry_as_it_was() -> Iterator[None]:
    before = list(blueprints._registry)
    yield
    blueprints._registry[:] = before


def pre_norm(c: int) -> Sequence[Layer]:
    return [Norm(c), Relu(), Conv(c, c, 3, bias=True, zero=True)]


def test_a_registered_blueprint_can_be_grown() -> None:
    before = make_single()
    register_blueprint("pre_norm", pre_norm)
    env = make_single(episode_steps=60)
    assert env.heads[2].options == (*before.heads[2].options, "pre_norm")
    assert len(env.observation_names) == len(before.observation_names) + 2
    env.reset(seed=0)
    index = env.heads[2].options.index("pre_norm")
    *_, info = env.step(action(Op.GERMINATE, 1, blueprint=index, alpha_target=2))
    assert info["parameters"] == 2 * 8 + 8 * 8 * 9 + 8
    while info["stage"][1] != Stage.HOLDING:
        can_advance = env.conditional_masks()["slot"][Op.ADVANCE, 1]
        *_, info = env.step(action(Op.ADVANCE if can_advance else Op.WAIT, int(can_advance)))
    assert np.isfinite(info["accuracy"])


def test_environments_made_before_a_registration_keep_their_options() -> None:
    envs = make(2)
    register_blueprint("pre_norm", pre_norm)
    envs.reset(seed=0)
    assert "pre_norm" not in envs.heads[2].options
    assert envs.conditional_masks()["blueprint"].shape[-1] == len(envs.heads[2].options)


def test_registering_leaves_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    register_blueprint("pre_norm", pre_norm)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_could_not_grow_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="'norm' is registered already"):
        register_blueprint("norm", pre_norm)
    with pytest.raises(ValueError, match=r"changes the shape: expected .* keep channels"):
        register_blueprint("wide", lambda c: [Conv(c, 2 * c, 1, zero=True)])
    with pytest.raises(ValueError, match=r"not the identity at birth: .* expected 0"):
        register_blueprint("loud", lambda c: [Conv(c, c, 3)])
    with pytest.raises(ValueError, match=r"no gradient in 'weight' by the third batch"):
        register_blueprint("dead", lambda c: [Conv(c, c, 3), Norm(c, zero=True), Relu()])
    with pytest.raises(ValueError, match="no parameters"):
        register_blueprint("empty", lambda c: [Relu()])
    with pytest.raises(TypeError, match=r"expected .*Layer instances, got Conv2d"):
        register_blueprint("torch", lambda c: [torch.nn.Conv2d(c, c, 1)])  # type: ignore[list-item]
    assert blueprints.registered_blueprints() == blueprints.CNN_BLUEPRINTS
