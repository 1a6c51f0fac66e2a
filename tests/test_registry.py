"""Third-party blueprints and hosts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from esper_env import register_blueprint, register_host
from esper_env.population import blueprints, hosts
from esper_env.population.hosts import Host
from esper_env.population.layers import Conv, Layer, Norm, Relu
from tests.builders import SmallPopulation, grow, make, make_single, play


@pytest.fixture(autouse=True)
def registry_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blueprints, "_registry", list(blueprints.registered_blueprints()))
    monkeypatch.setattr(hosts, "_registry", {})


def pre_norm(c: int) -> Sequence[Layer]:
    return [Norm(c), Relu(), Conv(c, c, 3, bias=True, zero=True)]


def test_a_registered_blueprint_can_be_grown() -> None:
    """Environments made before keep their options, and global random state stays as it was."""
    before, state = make(1), torch.get_rng_state()
    register_blueprint("pre_norm", pre_norm)
    assert torch.equal(torch.get_rng_state(), state)
    before.reset(seed=0)
    assert "pre_norm" not in before.heads[2].options
    assert before.conditional_masks()["blueprint"].shape[-1] == len(before.heads[2].options)
    envs = make(1, episode_steps=60)
    assert envs.heads[2].options == (*before.heads[2].options, "pre_norm")
    assert len(envs.observation_names) == len(before.observation_names) + 2
    envs.reset(seed=0)
    infos = grow(envs, 1, envs.heads[2].options.index("pre_norm"))
    assert infos[0]["parameters"] == 2 * 8 + 8 * 8 * 9 + 8
    assert np.isfinite(infos[-1]["accuracy"])


def test_what_could_not_grow_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="'norm' is already registered"):
        register_blueprint("norm", pre_norm)
    with pytest.raises(ValueError, match=r"wrong shape .* expected .* output 4 channels"):
        register_blueprint("wide", lambda c: [Conv(c, 2 * c, 1, zero=True)])
    with pytest.raises(ValueError, match="expected a new seed to output 0, got up to"):
        register_blueprint("loud", lambda c: [Conv(c, c, 3)])
    with pytest.raises(ValueError, match="expected a gradient in parameter 'weight' by the third"):
        register_blueprint("dead", lambda c: [Conv(c, c, 3), Norm(c, zero=True), Relu()])
    with pytest.raises(ValueError, match="no parameters"):
        register_blueprint("empty", lambda c: [Relu()])
    with pytest.raises(TypeError, match=r"expected .*Layer instances, got Conv2d"):
        register_blueprint("torch", lambda c: [torch.nn.Conv2d(c, c, 1)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"cannot be embedded in .* expected equal outputs"):
        register_blueprint("pooled", lambda c: [ChannelMean(c), Conv(c, c, 1, zero=True)])
    with pytest.raises(ValueError, match="do not fit into"):
        register_blueprint("odd", lambda c: [Conv(c, 32 // c, 1), Conv(32 // c, c, 1, zero=True)])
    assert blueprints.registered_blueprints() == blueprints.CNN_BLUEPRINTS


class ChannelMean(Relu):
    """Adds the mean over channels, which depends on how many there are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        object.__setattr__(self, "channels", channels)

    def forward(self, x, parameters, buffers, training):  # type: ignore[no-untyped-def]
        del parameters, buffers, training
        return x + x.mean(dim=1, keepdim=True)


# ------------------------------------------------------------------ hosts


def separable(before: int, after: int) -> Sequence[Layer]:
    return [Conv(before, before, 3, groups=before), Conv(before, after, 1), Norm(after), Relu()]


@pytest.mark.parametrize("instances", ["default", "train"])
def test_a_registered_host_is_trained_and_grown(instances: str) -> None:
    register_host("separable", channels=(4, 6, 8), build_block=separable)
    envs = make(4, host="separable", instances=instances, episode_steps=30, batch_size=32)
    assert envs.heads[1].options == (0, 1, 2)
    _, info = envs.reset(seed=0)
    if instances == "default":
        # 9 + 4 + 8; 36 + 24 + 12; 54 + 48 + 16; 80 + 10
        assert (info["host_parameters"] == 21 + 72 + 118 + 90).all()
    else:
        assert len(set(info["host_parameters"].tolist())) > 1
    start = info["loss"].mean()
    info = play(envs, 29, seed=0)[-1][4]
    assert info["loss"].mean() < start - 0.1
    assert info["parameters"].any()


def test_images_of_several_channels_may_meet_a_depthwise_convolution_first() -> None:
    """All members share the images in an evaluation; alone and together, the same results."""
    host = Host(in_channels=3, image_size=8, channels=(4, 6), num_classes=5, build_block=separable)
    small = SmallPopulation(3, hosts=(host,))
    together = small.evaluate(np.zeros((3, 2)))
    for i in range(3):
        alone = small.evaluate([[0, 0]], [i])
        assert together.loss[i] == pytest.approx(alone.loss[0], abs=1e-5)


def test_a_registered_host_without_blocks_of_its_own_has_the_built_in_ones() -> None:
    register_host("three", channels=[2, 4, 8])
    _, info = make_single(host="three").reset(seed=0)
    # 18 + 4; 72 + 8; 288 + 16; 80 + 10
    assert info["host_parameters"] == 22 + 80 + 304 + 90


def test_hosts_that_could_not_work_are_refused_with_the_reason() -> None:
    register_host("three", channels=(2, 4, 8))
    with pytest.raises(ValueError, match="'three' is already registered"):
        register_host("three", channels=(2, 4))
    with pytest.raises(ValueError, match="expected at least one block"):
        register_host("none", channels=())
    with pytest.raises(ValueError, match=r"wrong shape .* output 4 channels"):
        register_host("narrow", (4, 8), lambda a, b: [Conv(a, b - 1, 3), Norm(b - 1), Relu()])
    with pytest.raises(ValueError, match="expected a gradient in parameter 'weight'"):
        register_host("dead", (4, 8), lambda a, b: [Conv(a, b, 3, zero=True), Relu()])
    with pytest.raises(ValueError, match=r"expected None or a registered host, one of \['three'\]"):
        make(1, host="four")
    register_host("deep", channels=(2, 2, 2, 2))
    with pytest.raises(ValueError, match="halves the image 4 times, and the images of task"):
        make(1, host="deep")
