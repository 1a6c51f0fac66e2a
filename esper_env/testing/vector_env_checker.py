"""Checker for vector environments.

The counterpart of `gymnasium.utils.env_checker.check_env`, which accepts single environments only.
It does not depend on Esper and checks any `gymnasium.vector.VectorEnv` that returns NumPy arrays.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import logger
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from esper_env.testing.compare import (
    difference,
    global_random_state,
    leaves,
    misfit,
    set_global_random_state,
)

FINAL_KEYS = {"final_obs", "_final_obs", "final_info", "_final_info"}
"""Keys of info that exist only under SAME_STEP, in steps that end an episode."""

Env = VectorEnv[Any, Any, Any]
BoolArray = npt.NDArray[np.bool_]


def check_vector_env(env: Env, *, num_steps: int = 50, seed: int = 0) -> None:
    """Check that a vector environment conforms to Gymnasium's interface.

    The checker records a run of random steps. It then repeats the run under conditions that must
    not change the results, such as another global random state, or a caller who writes into
    returned arrays. It restores the global random state, but not the environment: reset the
    environment before use.

    Two requirements are stricter than Gymnasium's. Info has the same keys in every step, each with
    a mask; and the environment uses no global random generator. Check an environment before it is
    wrapped in `RecordEpisodeStatistics`, which adds the elapsed time to info.

    Args:
        env: Environment to check. Actions come from `env.unwrapped.sample_valid_actions(rng)` if
            that exists for the same action space, else from `env.single_action_space`.
        num_steps: Length of the run [env steps]. If no episode ends within it, a warning says that
            autoreset was not checked.
        seed: Seed of the environment and of the actions.

    Raises:
        AssertionError: If a requirement is violated, with the expected value, the actual value and
            the likely remedy. `check_env` raises this type too, and test runners report it as a
            failed test. It does not come from an `assert`, so `python -O` keeps it.
        TypeError: If `env` is not a `VectorEnv`.
        ValueError: If `num_steps` is less than 1.
    """
    if not isinstance(env, VectorEnv):
        raise TypeError(
            f"env: expected a gymnasium.vector.VectorEnv, got {type(env).__name__}; for a single "
            "environment use gymnasium.utils.env_checker.check_env"
        )
    if num_steps < 1:
        raise ValueError(f"num_steps: expected at least 1, got {num_steps}")
    global_state = global_random_state()
    try:
        _check_attributes(env)
        trial = _Trial(env, seed, _record(env, num_steps, seed))
        for check in CHECKS:
            check(trial)
    finally:
        set_global_random_state(global_state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Call:
    """Arguments of a call of `step`, or of `reset` if there are no actions."""

    seed: int | None = None
    options: dict[str, Any] | None = None
    actions: Any = None

    @property
    def name(self) -> str:
        if self.actions is not None:
            return "step"
        return f"reset(seed={self.seed}, options={self.options})"


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A call and a copy of its result."""

    call: _Call
    result: dict[str, Any]
    """Returned values by name."""
    ended: BoolArray
    """Whether the call ended the episode of each sub-environment. (num_envs,)."""


@dataclasses.dataclass(frozen=True)
class _Trial:
    """An environment and its recorded run, the reference for all other runs."""

    env: Env
    seed: int
    turns: list[_Turn]


def _expect(holds: bool | np.bool_, where: str, expected: str, got: Any, remedy: str) -> None:
    if not holds:
        raise AssertionError(f"{where}: expected {expected}, got {got!r}; {remedy}")


def _reject(problem: str | None, violation: str, remedy: str) -> None:
    """Raise AssertionError if there is a problem, a result of `misfit` or `difference`."""
    if problem is not None:
        raise AssertionError(f"{violation}: {problem}; {remedy}")


# ------------------------------------------------------------------ requirements on each result


def _check_attributes(env: Env) -> None:
    is_count = type(env.num_envs) is int and env.num_envs > 0
    _expect(is_count, "num_envs", "an int of at least 1", env.num_envs, "convert it with int()")
    # The batched spaces must follow from the single ones.
    for name in ("observation_space", "action_space"):
        batched, remedy = batch_space(getattr(env, f"single_{name}"), env.num_envs), "use it"
        expected = f"batch_space(single_{name}, num_envs) = {batched}"
        _expect(getattr(env, name) == batched, name, expected, getattr(env, name), remedy)
    mode = env.metadata.get("autoreset_mode")
    remedy = "wrappers and agents read it there"
    is_mode = isinstance(mode, AutoresetMode)
    _expect(is_mode, "metadata['autoreset_mode']", "an AutoresetMode", mode, remedy)


def _perform(env: Env, call: _Call) -> dict[str, Any]:
    """Make a call, check its result, and return the result by name."""
    # Pass a copy of the arguments, which shows whether the environment changes them.
    passed = copy.deepcopy(call)
    values: Any
    if call.actions is None:
        names = ["observations", "info"]
        values = env.reset(seed=passed.seed, options=passed.options)
    else:
        names = ["observations", "rewards", "terminations", "truncations", "info"]
        values = env.step(passed.actions)
    change = difference(vars(call), vars(passed), "arguments")
    if change is not None:
        raise AssertionError(f"{call.name} changed its caller's {change}; copy it first")
    is_tuple = isinstance(values, tuple) and len(values) == len(names)
    _expect(is_tuple, call.name, f"a tuple of {', '.join(names)}", values, "return exactly these")
    result = dict(zip(names, values, strict=True))
    problem = misfit(env.observation_space, result["observations"])
    _reject(problem, f"{call.name}: observations", "correct them or the space")
    _check_info(result["info"], "info", np.ones(env.num_envs, dtype=bool))
    if call.actions is not None:
        _check_rewards_and_flags(result, env.num_envs)
        if env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP:
            _check_final(env, result["info"], _ended(result, env.num_envs))
    return result


def _check_rewards_and_flags(result: dict[str, Any], num_envs: int) -> None:
    kinds = {"rewards": np.floating, "terminations": np.bool_, "truncations": np.bool_}
    for name, kind in kinds.items():
        array = result[name]
        is_kind = isinstance(array, np.ndarray) and np.issubdtype(array.dtype, kind)
        expected = f"a NumPy array of {kind.__name__} and shape ({num_envs},)"
        is_fit = is_kind and array.shape == (num_envs,)
        _expect(is_fit, f"step: {name}", expected, array, "convert it with np.asarray")
    is_finite = np.isfinite(result["rewards"]).all()
    remedy = "look for divisions by zero"
    _expect(is_finite, "step: rewards", "finite numbers", result["rewards"], remedy)


def _check_info(info: Any, name: str, members: BoolArray) -> None:
    """Check that every value is an array or a dict of arrays, and has a mask.

    Args:
        info: Info of a call, or a dict inside of it.
        name: Name of `info` in error messages.
        members: Whether a sub-environment may have values in it. (num_envs,) bool.
    """
    _expect(isinstance(info, dict), name, "a dict of NumPy arrays", info, "return {} for nothing")
    for key, value in info.items():
        where = f"{name}[{key!r}]"
        remedy = "rename it, or check without RecordEpisodeStatistics, whose key it is"
        _expect(key != "episode", where, "no such key", value, remedy)
        if key.startswith("_") and key[1:] in info:
            continue  # a mask, which is checked together with its key
        mask = info.get(f"_{key}")
        is_mask = isinstance(mask, np.ndarray) and mask.dtype == bool
        is_mask = is_mask and mask.shape == members.shape
        remedy = f"set it to True for sub-environments with a value of {key!r}"
        expected = f"a mask, bool of shape {members.shape}"
        _expect(is_mask, f"{name}['_{key}']", expected, mask, remedy)
        remedy = "set it to False where the mask of the dict around it is False"
        is_within = not (mask & ~members).any()
        _expect(is_within, f"{name}['_{key}']", "True only within the outer mask", mask, remedy)
        if isinstance(value, dict):
            _check_info(value, where, mask)
            continue
        is_batch = isinstance(value, np.ndarray) and value.shape[:1] == members.shape
        expected = f"a NumPy array with {len(members)} rows, or a dict"
        _expect(is_batch, where, expected, value, "convert tensors, lists and scalars")


def _check_final(env: Env, info: dict[str, Any], ended: BoolArray) -> None:
    """Check the entries of info that describe ended episodes under SAME_STEP.

    Args:
        env: The environment.
        info: Info of a step.
        ended: Whether the step ended the episode of each sub-environment. (num_envs,) bool.
    """
    present, due = FINAL_KEYS & info.keys(), FINAL_KEYS if ended.any() else set()
    remedy = "return final_obs and final_info, with masks, exactly in steps that end an episode"
    _expect(present == due, "info under SAME_STEP", f"keys {sorted(due)}", present, remedy)
    if not due:
        return
    for key in ("_final_obs", "_final_info"):
        is_right = np.array_equal(info[key], ended)
        remedy = "set it where an episode ended"
        _expect(is_right, f"info[{key!r}]", "terminations | truncations", info[key], remedy)
    rows, final_info = info["final_obs"], info["final_info"]
    remedy = "begin with np.full(num_envs, None, dtype=object)"
    is_rows = isinstance(rows, np.ndarray) and rows.dtype == object and rows.shape == ended.shape
    _expect(is_rows, "info['final_obs']", f"objects of shape {ended.shape}", rows, remedy)
    for i, row in enumerate(rows):
        where = f"info['final_obs'][{i}]"
        _expect(ended[i] or row is None, where, "None, as no episode ended", row, remedy)
        problem = misfit(env.single_observation_space, row) if ended[i] else None
        _reject(problem, where, "return the last observation of the episode")
    remedy = "return an ordinary info with masks restricted to the episodes that ended"
    _expect(isinstance(final_info, dict), "info['final_info']", "a dict", final_info, remedy)


# ------------------------------------------------------------------ requirements on a run


def _check_global_random_state_is_not_written(trial: _Trial) -> None:
    before = global_random_state()
    for turn, _ in _replay(trial.env, trial.turns):
        change = difference(before, global_random_state(), "state")
        violation = f"{turn.call.name} used a global random generator"
        _reject(change, violation, "use generators that belong to the environment")


def _check_seeding(trial: _Trial) -> None:
    calls = _Call(seed=trial.seed, options={}), _Call(options={})
    _require_same(
        _replay(trial.env, [_take(trial.env, call) for call in calls]),
        "a seeded reset and an unseeded reset after it do not repeat",
        "derive all randomness from the seed, and remove times from info",
    )


def _check_steps_repeat(trial: _Trial) -> None:
    _require_same(
        _replay(trial.env, trial.turns),
        "two runs with the same seed and actions differ",
        "derive all randomness from the seed, and reset all other state",
    )


def _check_global_random_state_is_not_read(trial: _Trial) -> None:
    value = random.getrandbits(32)  # not a constant: it must differ from the caller's seed
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 - the check is about the legacy global state
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(value)
    _require_same(
        _replay(trial.env, trial.turns),
        "the run depends on the state of a global random generator",
        "use generators that belong to the environment",
    )


def _check_returned_arrays_stay(trial: _Trial) -> None:
    results = [result for _, result in _replay(trial.env, trial.turns)]
    _require_same(
        zip(trial.turns, results, strict=True),
        "a later step changed returned arrays",
        "return copies instead of the environment's buffers",
    )


def _check_returned_arrays_are_the_callers(trial: _Trial) -> None:
    def scribble() -> Iterator[tuple[_Turn, dict[str, Any]]]:
        for turn, result in _replay(trial.env, trial.turns):
            yield turn, copy.deepcopy(result)
            for _, leaf in leaves(result, ""):
                if isinstance(leaf, np.ndarray) and leaf.flags.writeable:
                    leaf[...] = leaf == 0  # changes any number and any bool

    _require_same(
        scribble(),
        "writing into returned arrays changed later results",
        "return copies instead of the environment's arrays",
    )


def _check_info_keys(trial: _Trial) -> None:
    is_same_step = trial.env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    ignored = FINAL_KEYS if is_same_step else set()
    paths: list[set[str]] = []
    for turn in trial.turns:
        if turn.call.actions is not None:
            info = {k: v for k, v in turn.result["info"].items() if k not in ignored}
            paths.append({path for path, _ in leaves(info, "info")})
    remedy = "return every key in every step, and set its mask to False where it has no value"
    for some in paths:
        odd = sorted(some ^ paths[0])
        _expect(not odd, "step: info", "the same keys in every step", odd, remedy)


def _check_state_copies(trial: _Trial) -> None:
    """Check `get_state` and `set_state` of the innermost environment, if it has both."""
    env = trial.env.unwrapped
    if not (hasattr(env, "get_state") and hasattr(env, "set_state")):
        return
    turns = trial.turns if env is trial.env else _record(env, len(trial.turns), trial.seed)
    # Save the state between two halves of the run, then replay the second half from it: twice from
    # an untouched copy, to find changes of the caller's state, and once from the returned object.
    head, tail = turns[: len(turns) // 2], turns[len(turns) // 2 :]
    _rerun(env, head)
    state = env.get_state()
    kept = copy.deepcopy(state)
    _require_same(_replay(env, tail), "get_state changed the steps after it", "make it read-only")
    for source, violation, remedy in (
        (kept, "steps after set_state differ", "include the full state in get_state"),
        (kept, "steps after set_state changed the caller's state", "copy in set_state"),
        (state, "later steps changed the state that get_state returned", "copy in get_state"),
    ):
        env.set_state(source)
        _require_same(_replay(env, tail), violation, remedy)


# ------------------------------------------------------------------ autoreset


def _check_new_episodes_are_shown(trial: _Trial) -> None:
    """Check that some episode begins with another observation than the last one ended with.

    Gymnasium requires no more than that, because a new episode may begin in any state.
    """
    is_same_step = trial.env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    changes = []
    for turn, following in itertools.pairwise(trial.turns):
        last, first = _rows(trial.env, turn), _rows(trial.env, following)
        if is_same_step and turn.ended.any():
            last, first = turn.result["info"]["final_obs"], last
        changes += [difference(last[i], first[i], "") for i in np.nonzero(turn.ended)[0]]
    if not changes:
        logger.warn(
            "check_vector_env: no episode ended before the last step, so autoreset was not "
            "checked; increase num_steps or shorten the episodes"
        )
        return
    observations = [turn.result["observations"] for turn in trial.turns]
    is_constant = all(difference(observations[0], o, "") is None for o in observations)
    remedy = "reset before observing; under SAME_STEP, return the last observation in final_obs"
    expected = "the first observations of new episodes"
    _expect(any(changes) or is_constant, "autoreset", expected, "final observations", remedy)


def _check_next_step(trial: _Trial) -> None:
    """Check that under NEXT_STEP the step after an episode's end resets and ignores the action."""
    env = trial.env
    if env.metadata["autoreset_mode"] != AutoresetMode.NEXT_STEP:
        return
    remedy = "a sub-environment that resets must not take a step"
    for before, turn in itertools.pairwise(trial.turns):
        rewards, ended = turn.result["rewards"][before.ended], turn.ended[before.ended]
        _expect(not rewards.any(), "rewards of the step that resets", "0", rewards, remedy)
        _expect(not ended.any(), "flags of the step that resets", "False", ended, remedy)
    _require_same(
        _replay_with_other_actions(env, trial.turns, _sampler(env, trial.seed + 1)),
        "the action of a sub-environment that resets changes the results",
        remedy,
    )


def _replay_with_other_actions(
    env: Env, turns: list[_Turn], other: Callable[[], Any]
) -> Iterator[tuple[_Turn, dict[str, Any]]]:
    """Replay a run with other actions for the sub-environments that reset."""
    yield from _replay(env, turns[:1])
    for before, turn in itertools.pairwise(turns):
        recorded = list(iterate(env.action_space, turn.call.actions))
        replaced = list(iterate(env.action_space, other()))
        actions = [replaced[i] if before.ended[i] else recorded[i] for i in range(env.num_envs)]
        yield turn, _perform(env, _Call(actions=_batch(env, actions)))


def _check_disabled(trial: _Trial) -> None:
    """Check that under DISABLED `reset_mask` resets only its sub-environments, and is required."""
    env = trial.env
    if env.metadata["autoreset_mode"] != AutoresetMode.DISABLED:
        return
    for before, turn in itertools.pairwise(trial.turns):
        if turn.call.options is not None:
            _check_others_untouched(env, before, turn)
    begin, step = trial.turns[:2]
    if not step.ended.any():
        _rerun(env, [begin, step])
        mask = np.arange(env.num_envs) == 0
        _check_others_untouched(env, step, _take(env, _Call(options={"reset_mask": mask})))
    end = next((n for n, turn in enumerate(trial.turns) if turn.ended.any()), None)
    if end is None:
        return
    _rerun(env, trial.turns[: end + 1])
    try:
        env.step(copy.deepcopy(step.call.actions))
    except Exception:  # Gymnasium leaves the type open; SyncVectorEnv raises AssertionError
        return
    remedy = "raise gymnasium.error.ResetNeeded"
    _expect(False, "step of finished sub-environments under DISABLED", "an error", "none", remedy)


def _check_others_untouched(env: Env, before: _Turn, turn: _Turn) -> None:
    for i in np.nonzero(~(turn.call.options or {})["reset_mask"])[0]:
        change = difference(_rows(env, before)[i], _rows(env, turn)[i], f"observations[{i}]")
        violation = f"{turn.call.name} changed a sub-environment outside of the mask"
        _reject(change, violation, "reset those in the mask only")


CHECKS: tuple[Callable[[_Trial], None], ...] = (
    _check_global_random_state_is_not_written,
    _check_seeding,
    _check_steps_repeat,
    _check_global_random_state_is_not_read,
    _check_returned_arrays_stay,
    _check_returned_arrays_are_the_callers,
    _check_info_keys,
    _check_new_episodes_are_shown,
    _check_next_step,
    _check_state_copies,
    _check_disabled,
)
"""Checks in order. Each relies on those before it, and the last leaves an error behind."""


# ------------------------------------------------------------------ runs


def _record(env: Env, num_steps: int, seed: int) -> list[_Turn]:
    """Record a run from a seeded reset. Under DISABLED, reset sub-environments when they finish."""
    sample = _sampler(env, seed)
    turns = [_take(env, _Call(seed=seed))]
    for _ in range(num_steps):
        turns.append(_take(env, _Call(actions=sample())))
        ended = turns[-1].ended
        if ended.any() and env.metadata["autoreset_mode"] == AutoresetMode.DISABLED:
            turns.append(_take(env, _Call(options={"reset_mask": ended})))
    return turns


def _take(env: Env, call: _Call) -> _Turn:
    result = copy.deepcopy(_perform(env, call))
    return _Turn(call, result, _ended(result, env.num_envs))


def _ended(result: dict[str, Any], num_envs: int) -> BoolArray:
    ended: BoolArray = np.zeros(num_envs, dtype=bool)
    for name in ("terminations", "truncations"):
        ended |= result.get(name, False)
    return ended


def _replay(env: Env, turns: list[_Turn]) -> Iterator[tuple[_Turn, dict[str, Any]]]:
    """Repeat recorded calls, and yield each turn with the new result, not copied."""
    for turn in turns:
        yield turn, _perform(env, turn.call)


def _rerun(env: Env, turns: list[_Turn]) -> None:
    """Restore the state of the environment after these calls."""
    for _ in _replay(env, turns):
        pass


def _require_same(
    results: Iterable[tuple[_Turn, dict[str, Any]]], violation: str, remedy: str
) -> None:
    for turn, result in results:
        _reject(difference(turn.result, result, turn.call.name), violation, remedy)


def _sampler(env: Env, seed: int) -> Callable[[], Any]:
    """Return a function that samples an action for every sub-environment."""
    inner = env.unwrapped
    if hasattr(inner, "sample_valid_actions") and inner.action_space == env.action_space:
        rng = np.random.default_rng(seed)
        return lambda: inner.sample_valid_actions(rng)
    space = copy.deepcopy(env.single_action_space)
    space.seed(seed)
    return lambda: _batch(env, [space.sample() for _ in range(env.num_envs)])


def _batch(env: Env, actions: list[Any]) -> Any:
    out: Any = create_empty_array(env.single_action_space, env.num_envs)
    return concatenate(env.single_action_space, actions, out)


def _rows(env: Env, turn: _Turn) -> list[Any]:
    """Return the observation of each sub-environment."""
    return list(iterate(env.observation_space, turn.result["observations"]))
