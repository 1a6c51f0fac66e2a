"""The joint action space."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from esper_env import JointAction, JointActionVector
from tests.builders import ID, SMALL, is_legal, make, make_single


def test_the_table_lists_every_effective_action_once() -> None:
    """With all heads open: 1 + 2*7*4*3*3 + 2 + 2*4*3*4*5 + 2*4*5 + 2 = 1029."""
    wrapper = JointActionVector(make(1))
    table = wrapper.table.actions
    assert len(table) == len(np.unique(table, axis=0)) == 1029
    assert wrapper.single_action_space.n == 1029
    assert not table[0].any(), "0 is WAIT"


def test_joint_masks_equal_the_factored_legality_along_random_play() -> None:
    envs = make(3)
    wrapper = JointActionVector(envs)
    _, info = wrapper.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(SMALL["episode_steps"]):
        mask, masks = wrapper.action_masks(), envs.conditional_masks()
        np.testing.assert_array_equal(mask, info["action_mask"])
        for index in rng.choice(len(wrapper.table.actions), size=200, replace=False):
            expected = is_legal(masks, np.tile(wrapper.table.actions[index], (3, 1)))
            np.testing.assert_array_equal(mask[:, index], expected)
        actions = np.array([rng.choice(np.nonzero(row)[0]) for row in mask])
        *_, info = wrapper.step(actions)
        assert info["action_valid"].all()


def test_joint_and_factored_actions_do_the_same() -> None:
    single, joint = make_single(), JointAction(make_single())
    single.reset(seed=0)
    joint.reset(seed=0)
    rng = np.random.default_rng(1)
    for _ in range(SMALL["episode_steps"]):
        index = int(rng.choice(np.nonzero(joint.action_masks())[0]))
        observation, reward, *_ = joint.step(index)
        expected, expected_reward, *_ = single.step(joint.table.actions[index])
        np.testing.assert_array_equal(observation, expected)
        assert reward == expected_reward


def test_restricted_heads_give_a_small_space() -> None:
    heads = {
        "op": ["WAIT", "GERMINATE", "ADVANCE", "FOSSILIZE"],
        "blueprint": ["conv_light", "conv_heavy"],
        "style": "LINEAR_ADD",
        "tempo": 3,
        "alpha_target": 1.0,
    }
    assert JointAction(make_single(heads=heads)).action_space.n == 1 + 2 * 2 + 2 + 2


@pytest.mark.parametrize("graft", [False, True])
def test_parking_adds_its_target_to_set_alpha_alone(graft: bool) -> None:
    """GERMINATE: 2*7*4*3*3 as before, or with grafts 2*7*4; SET_ALPHA: 2*4*4*4*5 instead of 3."""
    wrapper = JointActionVector(make(1, parking=True, graft=graft))
    germinations = 2 * 7 * 4 * (1 if graft else 9)
    assert len(wrapper.table.actions) == 1 + germinations + 2 + 640 + 2 * 4 * 5 + 2


def test_wrong_environments_and_actions_are_refused() -> None:
    with pytest.raises(TypeError, match="expected an EsperEnv, got CartPoleEnv"):
        JointAction(gym.make("CartPole-v1"))
    with pytest.raises(TypeError, match="expected an EsperVectorEnv, got SyncVectorEnv"):
        JointActionVector(gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync"))
    wrapper = JointActionVector(gym.make_vec(ID, num_envs=2, **SMALL))
    wrapper.reset(seed=0)
    for actions in (np.array([0, 1029]), np.array([-1, 0]), np.zeros(3, int), np.zeros(2)):
        with pytest.raises(ValueError, match="expected integers from 0 to 1028 of shape"):
            wrapper.step(actions)
    single = JointAction(make_single())
    single.reset(seed=0)
    with pytest.raises(ValueError, match="from 0 to 1028"):
        single.step(5000)
