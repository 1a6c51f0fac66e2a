"""The checker of vector environments: it passes sound ones and names what broken ones break."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space, iterate

from esper_env import JointActionVector
from esper_env.testing.vector_env_checker import check_vector_env

NEXT, SAME, DISABLED = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED
MODES = pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.value)
ESPER: dict[str, Any] = {
    "num_envs": 3,
    "episode_steps": 5,
    "batches_per_step": 1,
    "batch_size": 4,
}
Result = tuple[Any, ...]


class CountingEnv(VectorEnv[Any, Any, Any]):
    """Members count their steps and add up their actions from a random start.

    Member i truncates (even i) or terminates (odd i) after 3 + i steps. Each observation is
    (steps, sum). Broken versions override one of the methods below.
    """

    def __init__(self, mode: AutoresetMode = NEXT, num_envs: int = 3) -> None:
        self.mode, self.num_envs = mode, num_envs
        self.metadata = {"autoreset_mode": mode}
        self.single_observation_space = gym.spaces.Box(0, 99, (2,), np.float32)
        self.single_action_space = gym.spaces.Discrete(5)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.state = np.zeros((num_envs, 2), np.float32)
        self.is_done = np.zeros(num_envs, bool)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        self.begin(mask)
        return self.observe(), self.info()

    def step(self, actions: Any) -> Any:
        resetting = self.is_done.copy()
        if self.mode == DISABLED and resetting.any():
            raise gym.error.ResetNeeded("finished members")
        self.begin(resetting)
        self.act(np.asarray(actions), ~resetting)
        rewards = np.where(resetting, 0.0, 1.0)
        ends = ~resetting & (self.state[:, 0] >= 3 + np.arange(self.num_envs))
        is_even = np.arange(self.num_envs) % 2 == 0
        self.is_done = ends.copy()
        observations, info = self.observe(), self.info()
        if self.mode == SAME and ends.any():
            rows = np.full(self.num_envs, None, dtype=object)
            for i, row in enumerate(iterate(self.observation_space, observations)):
                rows[i] = row if ends[i] else None
            final_info = self.info()
            final_info["_steps"] = ends.copy()
            final_info["_parts"] = ends.copy()
            final_info["parts"]["_sum"] = ends.copy()
            self.begin(ends)
            observations, info = self.observe(), self.info()
            info |= {"final_obs": rows, "_final_obs": ends.copy()}
            info |= {"final_info": final_info, "_final_info": ends.copy()}
        return observations, rewards, ends & ~is_even, ends & is_even, info

    def begin(self, mask: npt.NDArray[np.bool_]) -> None:
        self.state[mask] = 0
        self.state[mask, 1] = self.np_random.integers(0, 9, mask.sum())
        self.is_done[mask] = False

    def act(self, actions: npt.NDArray[Any], active: npt.NDArray[np.bool_]) -> None:
        self.state[active, 0] += 1
        self.state[active, 1] += actions[active]

    def observe(self) -> Any:
        return self.state.copy()

    def info(self) -> Any:
        everyone = np.ones(self.num_envs, bool)
        parts = {"sum": self.state[:, 1].copy(), "_sum": everyone.copy()}
        return {
            "steps": self.state[:, 0].copy(),
            "_steps": everyone.copy(),
            "parts": parts,
            "_parts": everyone.copy(),
        }

    def get_state(self) -> dict[str, Any]:
        generator = copy.deepcopy(self.np_random)
        return {"state": self.state.copy(), "is_done": self.is_done.copy(), "rng": generator}

    def set_state(self, state: dict[str, Any]) -> None:
        self.state, self.is_done = state["state"].copy(), state["is_done"].copy()
        self.np_random = copy.deepcopy(state["rng"])


class DictEnv(CountingEnv):
    """The same with observations in a Dict that has a Tuple inside."""

    def __init__(self, mode: AutoresetMode, num_envs: int = 3) -> None:
        super().__init__(mode, num_envs)
        parts = gym.spaces.Discrete(99), gym.spaces.Box(0, 99, (1,), np.float32)
        self.single_observation_space = gym.spaces.Dict(
            steps=parts[0], rest=gym.spaces.Tuple(parts)
        )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def observe(self) -> Any:
        steps, total = self.state[:, 0].astype(np.int64), self.state[:, 1:].copy()
        return {"steps": steps, "rest": (steps.copy(), total)}


class CountingSingle(gym.Env[Any, Any]):
    """One member of the above, for Gymnasium's own vector environments."""

    observation_space = gym.spaces.Box(0, 99, (2,), np.float32)
    action_space = gym.spaces.Discrete(5)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.state = np.array([0, self.np_random.integers(0, 9)], np.float32)
        return self.state.copy(), {"steps": 0}

    def step(self, action: Any) -> Any:
        self.state += 1, action
        return self.state.copy(), 1.0, bool(self.state[0] >= 3), False, {"steps": 1}


# ------------------------------------------------------------------ sound environments


def check_without_warning(env: VectorEnv[Any, Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_vector_env(env, num_steps=12)


@MODES
@pytest.mark.parametrize("cls", [CountingEnv, DictEnv])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_counting_environment_passes(
    num_envs: int, cls: type[CountingEnv], mode: AutoresetMode
) -> None:
    check_without_warning(cls(mode, num_envs))


@MODES
def test_esper_passes(mode: AutoresetMode) -> None:
    check_without_warning(gym.make_vec("Esper-Digits-v0", autoreset_mode=mode, **ESPER))


@MODES
def test_esper_with_joint_actions_passes(mode: AutoresetMode) -> None:
    """Actions come from the wrapper's own space, not from the inner sampler."""
    envs = gym.make_vec("Esper-Digits-v0", autoreset_mode=mode, **ESPER)
    check_without_warning(JointActionVector(envs))


@pytest.mark.parametrize("mode", [NEXT, SAME])
def test_gymnasiums_sync_environment_passes_with_autoreset(mode: AutoresetMode) -> None:
    check_without_warning(SyncVectorEnv([CountingSingle] * 3, autoreset_mode=mode))


def test_gymnasiums_sync_environment_takes_the_mask_out_of_its_callers_options() -> None:
    envs = SyncVectorEnv([CountingSingle] * 3, autoreset_mode=DISABLED)
    message = r"changed its caller's .*\['reset_mask'\].*; copy it first"
    with pytest.raises(AssertionError, match=message):
        check_vector_env(envs)


def test_gymnasiums_sync_environment_passes_without_autoreset_given_a_copy_of_options() -> None:
    """The mask is all that is wrong with it."""

    class Copying(SyncVectorEnv):
        def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> Any:
            return super().reset(seed=seed, options=dict(options or {}))

    check_without_warning(Copying([CountingSingle] * 3, autoreset_mode=DISABLED))


def test_an_environment_in_record_episode_statistics_is_refused_for_its_clock() -> None:
    envs = gym.wrappers.vector.RecordEpisodeStatistics(CountingEnv())
    with pytest.raises(AssertionError, match=r"info\['episode'\]: expected no such key"):
        check_vector_env(envs)


def test_a_run_without_an_end_warns_that_autoreset_was_not_checked() -> None:
    with pytest.warns(UserWarning, match="no episode ended"):
        check_vector_env(CountingEnv(), num_steps=2)


# ------------------------------------------------------------------ the checker itself


def test_a_single_environment_is_referred_to_gymnasiums_checker() -> None:
    with pytest.raises(TypeError, match=r"use gymnasium\.utils\.env_checker"):
        check_vector_env(CountingSingle())  # type: ignore[arg-type]


def test_a_run_needs_a_step() -> None:
    with pytest.raises(ValueError, match="num_steps: expected at least 1, got 0"):
        check_vector_env(CountingEnv(), num_steps=0)


def global_draws() -> list[float]:
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]  # noqa: NPY002


def seed_global_generators() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


def test_the_global_random_state_is_restored_after_success_and_failure() -> None:
    seed_global_generators()
    expected = global_draws()
    seed_global_generators()
    check_vector_env(CountingEnv(), num_steps=6)
    assert global_draws() == expected
    seed_global_generators()
    env = CountingEnv()
    reads_a_global_generator_and_hides_it(env)
    with pytest.raises(AssertionError):
        check_vector_env(env)
    assert global_draws() == expected


def test_the_random_state_of_cuda_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the device's functions, so that the test runs without one."""
    state = torch.arange(16, dtype=torch.uint8)
    restored: list[torch.Tensor] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.extend)
    check_vector_env(CountingEnv(), num_steps=6)
    assert len(restored) == 1
    assert torch.equal(restored[0], state)


# ------------------------------------------------------------------ broken environments

Break = Callable[[CountingEnv], None]
BROKEN: list[Any] = []


def rejected(match: str, mode: AutoresetMode = NEXT) -> Callable[[Break], Break]:
    """Register a way to break one promise, and the words by which the checker names it."""

    def register(function: Break) -> Break:
        BROKEN.append(pytest.param(function, mode, match, id=function.__name__))
        return function

    return register


def after(env: CountingEnv, method: str, change: Callable[[Any], Any]) -> None:
    """Let `change` replace what a method of this environment returns."""
    original = getattr(env, method)
    setattr(env, method, lambda *args, **kwargs: change(original(*args, **kwargs)))


def set_result(env: CountingEnv, index: int, change: Callable[[Any], Any]) -> None:
    """Let `change` replace one of the five results of `step`."""
    after(env, "step", lambda r: (*r[:index], change(r[index]), *r[index + 1 :]))


def set_info(env: CountingEnv, **values: Any) -> None:
    after(env, "info", lambda info: info | values)


def set_final(env: CountingEnv, change: Callable[[dict[str, Any]], Any]) -> None:
    """Let `change` edit info where it tells of ended episodes."""

    def edit(info: dict[str, Any]) -> dict[str, Any]:
        if "final_obs" in info:
            change(info)
        return info

    set_result(env, 4, edit)


def everyone() -> npt.NDArray[np.bool_]:
    return np.ones(3, bool)


@rejected("num_envs: expected an int of at least 1, got 3.0")
def num_envs_is_a_float(env: CountingEnv) -> None:
    env.num_envs = 3.0  # type: ignore[assignment]


@rejected(r"action_space: expected batch_space\(single_action_space, num_envs\)")
def action_space_is_not_batched(env: CountingEnv) -> None:
    env.action_space = env.single_action_space


@rejected("observation_space: expected batch_space")
def observation_space_has_another_batch_size(env: CountingEnv) -> None:
    env.observation_space = batch_space(env.single_observation_space, 4)


@rejected(r"metadata\['autoreset_mode'\]: expected an AutoresetMode, got 'NextStep'")
def autoreset_mode_is_a_string(env: CountingEnv) -> None:
    env.metadata = {"autoreset_mode": "NextStep"}


@rejected(r"reset\(seed=0.*expected a tuple of observations, info")
def reset_returns_observations_alone(env: CountingEnv) -> None:
    after(env, "reset", lambda r: r[0])


@rejected("step: expected a tuple of observations, rewards, terminations")
def step_returns_four_values(env: CountingEnv) -> None:
    after(env, "step", lambda r: r[:4])


@rejected("observations: expected dtype float32, got float64")
def observations_have_another_dtype(env: CountingEnv) -> None:
    after(env, "observe", lambda obs: obs.astype(np.float64))


@rejected("observations: expected an element of Box")
def observations_leave_their_space(env: CountingEnv) -> None:
    set_result(env, 0, lambda obs: obs - 100)


@rejected("observations: expected a NumPy array, got tensor")
def observations_are_tensors(env: CountingEnv) -> None:
    after(env, "observe", torch.from_numpy)


@rejected("step: rewards: expected a NumPy array of floating")
def rewards_are_integers(env: CountingEnv) -> None:
    set_result(env, 1, lambda rewards: rewards.astype(np.int64))


@rejected("step: rewards: expected finite numbers")
def a_reward_is_nan(env: CountingEnv) -> None:
    set_result(env, 1, lambda rewards: rewards * np.nan)


@rejected(r"step: terminations: expected a NumPy array of bool\w* and shape \(3,\)")
def flags_are_a_list(env: CountingEnv) -> None:
    set_result(env, 2, list)


@rejected("step: truncations: expected a NumPy array of bool")
def flags_have_another_shape(env: CountingEnv) -> None:
    set_result(env, 3, lambda flags: flags[:, None])


@rejected("info: expected a dict of NumPy arrays, got None")
def info_is_none(env: CountingEnv) -> None:
    after(env, "info", lambda _: None)


@rejected(r"info\['_lives'\]: expected a mask, bool of shape \(3,\), got None")
def a_value_has_no_mask(env: CountingEnv) -> None:
    set_info(env, lives=np.ones(3))


@rejected(r"info\['_lives'\]: expected a mask")
def a_mask_is_not_bool(env: CountingEnv) -> None:
    set_info(env, lives=np.ones(3), _lives=np.ones(3))


@rejected(r"info\['parts'\]\['_x'\]: expected a mask")
def a_nested_value_has_no_mask(env: CountingEnv) -> None:
    set_info(env, parts={"x": np.ones(3)})


@rejected(r"info\['parts'\]\['_x'\]: expected True only within the outer mask")
def a_nested_mask_exceeds_its_dictionarys(env: CountingEnv) -> None:
    set_info(env, parts={"x": np.ones(3), "_x": everyone()}, _parts=~everyone())


@rejected(r"info\['lives'\]: expected a NumPy array with 3 rows, or a dict, got tensor")
def info_has_a_tensor(env: CountingEnv) -> None:
    set_info(env, lives=torch.ones(3), _lives=everyone())


@rejected(r"info\['lives'\]: expected a NumPy array with 3 rows")
def info_has_one_value_for_all(env: CountingEnv) -> None:
    set_info(env, lives=np.array(3), _lives=everyone())


@rejected(r"the same keys in every step, got .*info\['odd'\]")
def a_key_of_info_comes_and_goes(env: CountingEnv) -> None:
    def add(info: dict[str, Any]) -> dict[str, Any]:
        return info | ({"odd": np.ones(3), "_odd": everyone()} if env.state[0, 0] == 2 else {})

    set_result(env, 4, add)


@rejected("the same keys in every step, got .*final_obs")
def final_keys_come_without_same_step(env: CountingEnv) -> None:
    def add(r: Any) -> Any:
        ends = r[2] | r[3]
        extra = {"final_obs": np.full(3, None, object), "_final_obs": ends} if ends.any() else {}
        return (*r[:4], r[4] | extra)

    after(env, "step", add)


@rejected(r"reset\(seed=0, options=\{\}\) changed its caller's arguments.*\['seen'\]")
def reset_writes_into_options(env: CountingEnv) -> None:
    reset = env.reset

    def writing(*, seed: Any = None, options: Any = None) -> Any:
        if options is not None:
            options["seen"] = True
        return reset(seed=seed)

    env.reset = writing  # type: ignore[method-assign]


@rejected(r"step changed its caller's arguments\['actions'\]")
def step_writes_into_actions(env: CountingEnv) -> None:
    act = env.act

    def writing(actions: Any, active: Any) -> None:
        actions += 1
        act(actions, active)

    env.act = writing  # type: ignore[method-assign]


@rejected(r"do not repeat: reset\(seed=0.*\['info'\]\['clock'\]")
def info_has_a_number_that_grows_for_ever(env: CountingEnv) -> None:
    clock = itertools.count()
    after(env, "info", lambda i: i | {"clock": np.full(3, next(clock)), "_clock": everyone()})


@rejected(r"do not repeat: reset\(seed=0.*\['observations'\]")
def reset_ignores_its_seed(env: CountingEnv) -> None:
    reset = env.reset
    env.reset = lambda *, seed=None, options=None: reset(options=options)  # type: ignore[method-assign]


@rejected(r"do not repeat: reset\(seed=None")
def an_unseeded_reset_draws_from_the_system(env: CountingEnv) -> None:
    # A new seed each time, as the system would give, but the same ones in every run of the tests.
    reset, system = env.reset, itertools.count()

    def forgetting(*, seed: Any = None, options: Any = None) -> Any:
        return reset(seed=next(system) if seed is None else seed)

    env.reset = forgetting  # type: ignore[method-assign]


@rejected("two runs with the same seed and actions differ: step")
def steps_have_a_generator_that_no_seed_reaches(env: CountingEnv) -> None:
    rng = np.random.default_rng()
    set_result(env, 1, lambda rewards: rewards * rng.random())


@rejected("two runs with the same seed and actions differ: step")
def a_reset_does_not_forget_earlier_runs(env: CountingEnv) -> None:
    total = np.zeros(3)
    set_result(env, 1, lambda rewards: np.where(rewards > 0, np.add(total, rewards, total), 0.0))


@rejected(r"reset\(seed=0, options=None\) used a global .*state\['numpy'\]")
def resets_draw_from_numpy(env: CountingEnv) -> None:
    def draw(result: Any) -> Any:
        np.random.rand()  # noqa: NPY002
        return result

    after(env, "reset", draw)


@rejected(r"step used a global random generator: state\['random'\]")
def steps_draw_from_random(env: CountingEnv) -> None:
    set_result(env, 1, lambda rewards: rewards * random.random())


@rejected(r"step used a global random generator: state\['torch'\]")
def steps_draw_from_torch(env: CountingEnv) -> None:
    set_result(env, 1, lambda rewards: rewards * float(torch.rand(())))


@rejected("the run depends on the state of a global random generator")
def reads_a_global_generator_and_hides_it(env: CountingEnv) -> None:
    def draw(rewards: Any) -> Any:
        state = np.random.get_state()  # noqa: NPY002
        factor = np.random.rand()  # noqa: NPY002
        np.random.set_state(state)  # noqa: NPY002
        return rewards * factor

    set_result(env, 1, draw)


@rejected(r"a later step changed returned arrays: reset.*\['observations'\]")
def observations_are_one_buffer(env: CountingEnv) -> None:
    buffer = np.zeros((3, 2), np.float32)

    def reuse(obs: Any) -> Any:
        buffer[...] = obs
        return buffer

    after(env, "observe", reuse)


@rejected("a later step changed returned arrays: step.*rewards")
def rewards_are_one_buffer(env: CountingEnv) -> None:
    buffer = np.zeros(3)

    def reuse(rewards: Any) -> Any:
        buffer[...] = rewards
        return buffer

    set_result(env, 1, reuse)


@rejected(r"writing into returned arrays changed later results: .*\['info'\]\['_a'\]")
def info_hands_out_a_constant_of_the_environment(env: CountingEnv) -> None:
    constant = everyone()
    after(env, "info", lambda info: info | {"a": np.ones(3), "_a": constant})


@rejected("writing into returned arrays changed later results: step")
def observations_are_the_state_itself(env: CountingEnv) -> None:
    """A new array each step, so that earlier ones stay, but the caller can write into the state."""

    def renew(mask: Any) -> None:
        env.state = env.state.copy()
        CountingEnv.begin(env, mask)

    env.begin = renew  # type: ignore[method-assign]
    env.observe = lambda: env.state  # type: ignore[method-assign]


@rejected("rewards of the step that resets: expected 0")
def a_resetting_step_is_rewarded(env: CountingEnv) -> None:
    set_result(env, 1, np.ones_like)


@rejected("flags of the step that resets: expected False")
def an_end_is_told_twice(env: CountingEnv) -> None:
    last = np.zeros(3, bool)

    def repeat(truncations: Any) -> Any:
        both = truncations | last
        last[...] = truncations
        return both

    def forget(result: Any) -> Any:
        last[...] = False
        return result

    after(env, "reset", forget)
    set_result(env, 3, repeat)


@rejected("the action of a sub-environment that resets changes the results: step")
def a_resetting_step_acts(env: CountingEnv) -> None:
    act = env.act
    env.act = lambda actions, active: act(actions, active | True)  # type: ignore[method-assign]


@rejected(r"info under SAME_STEP: expected keys \['_final_info'", SAME)
def final_info_is_missing(env: CountingEnv) -> None:
    set_final(env, lambda info: (info.pop("final_info"), info.pop("_final_info")))


@rejected(r"info under SAME_STEP: expected keys \[\]", SAME)
def final_keys_come_in_every_step(env: CountingEnv) -> None:
    set_result(
        env, 4, lambda i: {"final_obs": np.full(3, None, object), "_final_obs": ~everyone()} | i
    )


@rejected(r"info\['_final_obs'\]: expected terminations \| truncations", SAME)
def final_mask_holds_for_all(env: CountingEnv) -> None:
    set_final(env, lambda info: info.update(_final_obs=everyone()))


@rejected(r"info\['final_obs'\]: expected objects of shape \(3,\)", SAME)
def final_observations_are_a_plain_array(env: CountingEnv) -> None:
    set_final(env, lambda info: info.update(final_obs=env.observe()))


@rejected(r"info\['final_obs'\]\[1\]: expected None", SAME)
def final_observations_cover_members_that_go_on(env: CountingEnv) -> None:
    def fill(info: dict[str, Any]) -> None:
        for i in range(3):
            info["final_obs"][i] = np.ones(2, np.float32)

    set_final(env, fill)


@rejected(r"info\['final_obs'\]\[0\]: expected an element of Box", SAME)
def final_observations_have_another_shape(env: CountingEnv) -> None:
    def fill(info: dict[str, Any]) -> None:
        for i in np.nonzero(info["_final_obs"])[0]:
            info["final_obs"][i] = np.ones(3, np.float32)

    set_final(env, fill)


@rejected(r"info\['final_info'\]\['_steps'\]: expected True only within the outer mask", SAME)
def final_info_masks_hold_for_all(env: CountingEnv) -> None:
    set_final(env, lambda info: info["final_info"].update(_steps=everyone()))


@rejected(r"info\['final_info'\]: expected a dict", SAME)
def final_info_is_an_array_of_dictionaries(env: CountingEnv) -> None:
    set_final(env, lambda info: info.update(final_info=np.full(3, None, object)))


@rejected("step of finished sub-environments under DISABLED: expected an error", DISABLED)
def finished_members_can_be_stepped(env: CountingEnv) -> None:
    step = env.step

    def lenient(actions: Any) -> Any:
        env.is_done[:] = False
        return step(actions)

    env.step = lenient  # type: ignore[method-assign]


@rejected(r"changed a sub-environment outside of the mask: observations\[1\]", DISABLED)
def reset_ignores_the_mask(env: CountingEnv) -> None:
    reset = env.reset
    env.reset = lambda *, seed=None, options=None: reset(seed=seed)  # type: ignore[method-assign]


@rejected("get_state changed the steps after it")
def get_state_draws_a_number(env: CountingEnv) -> None:
    def draw(state: Any) -> Any:
        env.np_random.random()
        return state

    after(env, "get_state", draw)


@rejected("steps after set_state differ")
def the_generator_is_not_in_the_state(env: CountingEnv) -> None:
    after(env, "get_state", lambda state: state | {"rng": np.random.default_rng(0)})


@rejected("later steps changed the state that get_state returned")
def get_state_returns_the_generator_itself(env: CountingEnv) -> None:
    after(env, "get_state", lambda state: state | {"rng": env.np_random})


@rejected("steps after set_state changed the caller's state")
def set_state_takes_the_array_itself(env: CountingEnv) -> None:
    def take(state: dict[str, Any]) -> None:
        CountingEnv.set_state(env, state)
        env.state = state["state"]

    env.set_state = take  # type: ignore[method-assign]


@pytest.mark.parametrize(("breaks", "mode", "match"), BROKEN)
def test_an_environment_is_refused_if(breaks: Break, mode: AutoresetMode, match: str) -> None:
    env = CountingEnv(mode)
    breaks(env)
    with pytest.raises(AssertionError, match=match):
        check_vector_env(env, num_steps=12)


@MODES
def test_an_environment_is_refused_if_episodes_begin_where_the_last_ended(
    mode: AutoresetMode,
) -> None:
    def begin(mask: Any) -> None:
        if mask.all():
            CountingEnv.begin(env, mask)
        env.is_done[mask] = False

    env = CountingEnv(mode)
    env.begin = begin  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="expected the first observations of new episodes"):
        check_vector_env(env, num_steps=4)  # stops before all members end at once
