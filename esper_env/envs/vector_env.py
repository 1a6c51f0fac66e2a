"""The vector environment: one engine call trains all sub-environments together."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from esper_env.config import BoolArray, EnvConfig, FloatArray, IntArray
from esper_env.envs.history import History
from esper_env.envs.info import build_info, masked_info
from esper_env.envs.render import RENDER_FPS, RENDER_MODES, describe, draw
from esper_env.envs.reset_options import check_reset
from esper_env.envs.saved_state import check_state, writable
from esper_env.growth.action_space import ActionHead, ActionSpace, as_array
from esper_env.growth.observation import ObservationBuilder
from esper_env.growth.reward import resolve_weights
from esper_env.growth.simulation import Simulation, StepResult
from esper_env.population.blueprints import registered_blueprints
from esper_env.tasks import TASKS, resolve_host

_IMPORTING_PROCESS = os.getpid()
_NOT_RESET = "the environment has not been reset"

Method = TypeVar("Method", bound=Callable[..., Any])


def _exclusive(method: Method) -> Method:
    """Let a method of `EsperVectorEnv` reject other threads, and record why it did not end.

    A method that changes the decision process first sets `_simulation` to None and `_missing` to
    "<method>() was interrupted", and then sets `_simulation` again with its last statement. What an
    interrupted call leaves behind may be half written, also in caches and by threads that still
    train. The next `reset` or `set_state` therefore builds a new decision process.
    """
    name = method.__name__

    @functools.wraps(method)
    def call_alone(self: EsperVectorEnv, *args: Any, **kwargs: Any) -> Any:
        own = os.getpid(), threading.get_ident()
        holder = self._holder.setdefault("call", own)  # One operation, also between threads.
        # A fork may copy the entry of a thread that does not exist in the new process.
        if holder != own and holder[0] == own[0]:
            raise RuntimeError(
                f"{name}: another thread is using this environment; use an environment in one "
                "thread at a time, or make one for each thread"
            )
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            if self._simulation is None and self._missing == f"{name}() was interrupted":
                # Only the text, because the exception would keep the old tensors alive.
                text = "".join(traceback.format_exception_only(error)).strip()
                self._missing += f" by {text}"
            raise
        finally:
            self._holder.pop("call", None)

    return cast(Method, call_alone)


class EsperVectorEnv(VectorEnv[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[Any]]):
    """Vector environment of `num_envs` hosts that train and grow at the same time.

    A step takes one action per sub-environment and then trains each host on `batches_per_step`
    batches. All sub-environments have the same validation images. The work of a step per
    sub-environment does not depend on `num_envs`.

    `step`, `reset`, `set_state` and `fork` happen completely or not at all. If an exception, for
    example a KeyboardInterrupt or an error of a registered layer, ends one of them halfway, the
    next calls raise ResetNeeded with the reason, until all sub-environments are reset or a state is
    restored. Invalid arguments are rejected before anything changes. Threads may use different
    environments at the same time; a second thread in one environment gets a RuntimeError.

    Args:
        num_envs: Number of sub-environments.
        device: Torch device of all tensors, e.g. "cpu" or "cuda".
        autoreset_mode: Gymnasium's `AutoresetMode` or its value; NEXT_STEP by default.
        render_mode: Result of `render` for each sub-environment: "rgb_array" (a chart of the
            current episode), "ansi" (the same as text) or None (no rendering).
        **config: Fields of `EnvConfig`.

    Raises:
        TypeError: If a keyword is not a field of `EnvConfig`, or a value has a wrong type.
        ValueError: If a value is out of range.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        device: str = "cpu",
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **config: Any,
    ) -> None:
        # First, because a constructor that raises leaves an object that is closed later.
        self._simulation: Simulation | None = None
        """None before the first reset, and while a call changes it (see `_exclusive`)."""
        self._missing = _NOT_RESET
        """Why `_simulation` is None, as a sentence without a full stop."""
        self._holder: dict[str, tuple[int, int]] = {}
        """Process and thread of the call in progress. Unlike a lock it can be copied and pickled,
        and one that an interrupt left behind does not block the same thread."""
        is_count = isinstance(num_envs, (int, np.integer)) and not isinstance(num_envs, bool)
        if not is_count or not 1 <= num_envs < 2**31:
            raise ValueError(f"num_envs: expected an integer of at least 1, got {num_envs!r}")
        is_mode = isinstance(render_mode, str) and render_mode in RENDER_MODES
        if render_mode is not None and not is_mode:
            raise ValueError(
                f"render_mode: expected None or one of {RENDER_MODES}, got {render_mode!r}"
            )
        modes = [mode.value for mode in AutoresetMode]
        is_mode = isinstance(autoreset_mode, str) and autoreset_mode in modes
        if not isinstance(autoreset_mode, AutoresetMode) and not is_mode:
            raise ValueError(
                f"autoreset_mode: expected an AutoresetMode or one of {modes}, got "
                f"{autoreset_mode!r}"
            )
        name = config.get("task", EnvConfig.task)
        if isinstance(name, str) and name in TASKS:
            config = {**TASKS[name].defaults, **config}
        self.config = EnvConfig.from_keywords(config)
        host = resolve_host(self.config)
        self.num_envs = int(num_envs)
        self.device = _device(device)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {
            "render_modes": list(RENDER_MODES),
            "render_fps": RENDER_FPS,
            "autoreset_mode": self.autoreset_mode,
        }
        self.render_mode = render_mode
        self.gamma = self.config.gamma
        """Discount factor of shaping; with the term `pbrs` the agent must use the same value."""

        self._blueprints = registered_blueprints()
        names = [blueprint.name for blueprint in self._blueprints]
        if self.config.attribution == "full" and host.num_slots > 4:
            raise ValueError(
                f"attribution: 'full' evaluates 2**slots networks and takes at most 4 slots, the "
                f"host has {host.num_slots}; use 'leave_one_out'"
            )
        self._no_terms = dict.fromkeys(resolve_weights(self.config), np.zeros(self.num_envs))
        self._actions = ActionSpace(host.num_slots, names, self.config)
        self._observations = ObservationBuilder(
            host.num_slots, names, host.num_classes, self.config
        )
        self.heads: tuple[ActionHead, ...] = self._actions.heads
        """Components of the action, each with the values of its options."""
        self.observation_names: tuple[str, ...] = self._observations.names
        """Name of each feature of the observation."""
        shape = (len(self.observation_names),)
        self.single_observation_space = gym.spaces.Box(-1.0, 1.0, shape, np.float32)
        self.single_action_space = gym.spaces.MultiDiscrete(self._actions.nvec)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._conditional: dict[str, BoolArray] = {}
        self._final_conditional: dict[str, BoolArray] = {}
        self._history = History(self.num_envs, host.num_slots, self.config.episode_steps)
        self._is_done: BoolArray = np.zeros(self.num_envs, dtype=bool)

    # ------------------------------------------------------------------ Gymnasium

    @_exclusive
    # A caller may be inside inference_mode, whose tensors could not be trained later.
    @torch.inference_mode(False)
    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start new episodes.

        Args:
            seed: Random seed. Sub-environment i becomes a function of seed + i, or of entry i of a
                list. None keeps the current random streams.
            options: "reset_mask", (num_envs,) bool, selects the sub-environments to reset.
                "instance", one index into the configured set or (num_envs,) of them, selects the
                instances of the new episodes. Without it each sub-environment samples one.

        Returns:
            Observations (num_envs, features) float32, and info.

        Raises:
            gymnasium.error.ResetNeeded: If the first reset, or the first one after a call that was
                interrupted, does not reset all sub-environments.
            ValueError: If a seed or an option is invalid. The state is unchanged in this case.
        """
        is_first = self._simulation is None
        request = check_reset(
            seed,
            options,
            num_envs=self.num_envs,
            num_instances=self.num_instances,
            must_reset_all=self._missing if is_first else None,
        )
        sim = self._simulation or self._build()
        self._missing, self._simulation = "reset() was interrupted", None
        if isinstance(seed, (int, np.integer)):
            self._np_random, self._np_random_seed = gym.utils.seeding.np_random(int(seed))
        for i in request.members.tolist():
            value = request.seeds[i]
            if value is None and is_first:
                value = int(self.np_random.integers(2**62))
            if value is not None:
                sim.seed(i, value)
        self._begin(sim, request.members, request.instance)
        result = self._present(sim, recorded=request.members)
        self._simulation = sim
        return result

    @_exclusive
    @torch.inference_mode(False)
    def step(
        self, actions: npt.NDArray[np.int64]
    ) -> tuple[
        npt.NDArray[np.float32],
        npt.NDArray[np.float64],
        npt.NDArray[np.bool_],
        npt.NDArray[np.bool_],
        dict[str, Any],
    ]:
        """Apply the actions, train all hosts, evaluate them.

        Args:
            actions: Option indices in the order of `heads`. (num_envs, 8) integers.

        Returns:
            Observations, rewards, terminations, truncations, info.

        Raises:
            gymnasium.error.ResetNeeded: Before the first `reset`, or if autoreset is disabled and
                a sub-environment is done.
            TypeError: If the actions are not integers.
            ValueError: If the shape or an index is out of range, or if an action is illegal and
                `illegal_actions="raise"`.
        """
        sim = self._ready()
        resetting, active = np.nonzero(self._is_done)[0], ~self._is_done
        if len(resetting) and self.autoreset_mode == AutoresetMode.DISABLED:
            raise gym.error.ResetNeeded(
                f"sub-environments {resetting.tolist()} have finished; call "
                "reset(options={'reset_mask': mask}) before step, or choose another "
                "autoreset_mode"
            )
        request, is_legal = self._actions.parse(
            actions,
            self._conditional,
            active,
            raises_on_illegal=self.config.illegal_actions == "raise",
        )
        self._missing, self._simulation = "step() was interrupted", None
        if len(resetting):
            self._begin(sim, resetting)
        result = sim.step(request, is_legal, active)
        observations, info = self._present(
            sim, result.reward_terms, recorded=np.arange(self.num_envs), op_slot=request.slot
        )
        self._final_conditional = self._conditional
        self._is_done = result.terminated | result.truncated
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self._is_done.any():
            observations, info = self._reset_ended(sim, result, observations, info)
        self._simulation = sim
        return observations, result.reward, result.terminated, result.truncated, info

    @_exclusive
    def render(self) -> tuple[npt.NDArray[np.uint8] | str, ...] | None:
        """Render the current episode of each sub-environment according to `render_mode`.

        Returns:
            One image, (600, 960, 3) uint8, or one text per sub-environment. Without a render mode
            it is None, and a warning is logged.

        Raises:
            gymnasium.error.ResetNeeded: Before the first `reset`.
        """
        if self.render_mode is None:
            gym.logger.warn(
                "render() shows nothing without a render mode; name one at the start, e.g. "
                'gym.make_vec("Esper-Digits-v0", render_mode="rgb_array")'
            )
            return None
        show = draw if self.render_mode == "rgb_array" else describe
        names = [blueprint.name for blueprint in self._blueprints]
        sim = self._ready()
        has_instances = len(sim.instances) > 1
        return tuple(
            show(
                self._history,
                i,
                blueprints=names,
                host_parameters=int(sim.networks.sizes.host[i]),
                instance=f"{self.config.instances} {sim.state.episode.instance[i]}"
                if has_instances
                else None,
            )
            for i in range(self.num_envs)
        )

    @_exclusive
    def close_extras(self, **kwargs: Any) -> None:
        """Release the tensors."""
        del kwargs
        self._missing, self._simulation = _NOT_RESET, None

    # ------------------------------------------------------------------ state

    @_exclusive
    def get_state(self) -> dict[str, Any]:
        """Return the full state, sufficient to resume exactly.

        Returns:
            Dictionary of NumPy arrays and JSON-able settings. `set_state` accepts it in this or in
            another process. Later steps are bitwise the same on the same device; third-party layers
            and bfloat16 also need the same number of threads.
        """
        sim = self._ready()
        tensors = sim.population.member_tensors()
        arrays = self._member_arrays(sim)
        return {
            "made_with": self._made_with(),
            "arrays": {name: array.copy() for name, array in arrays.items()},
            "tensors": {name: t.cpu().numpy().copy() for name, t in tensors.items()},
            "is_done": self._is_done.copy(),
            "np_random": copy.deepcopy(self.np_random.bit_generator.state),
        }

    @_exclusive
    @torch.inference_mode(False)
    def set_state(self, state: dict[str, Any]) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Restore a state returned by `get_state`; no `reset` is needed before it.

        `device`, `data_dir`, `chunk_size`, `autoreset_mode` and `render_mode` may differ from those
        of the environment that the state comes from.

        Returns:
            Observations and info of the restored state.

        Raises:
            ValueError: If the state comes from an environment with another configuration, other
                registered blueprints or another `num_envs`. Also if a part of it is missing, not
                known, or has a wrong shape, dtype or value. Nothing has changed in this case.
        """
        sim = self._simulation or self._build()
        arrays, tensors = self._member_arrays(sim), sim.population.member_tensors()
        check_state(
            state,
            made_with=self._made_with(),
            arrays=arrays,
            tensors=tensors,
            generator=self.np_random.bit_generator,
            num_instances=self.num_instances,
        )
        self._missing, self._simulation = "set_state() was interrupted", None
        for name, array in arrays.items():
            array[...] = state["arrays"][name]
        for name, tensor in tensors.items():
            tensor.copy_(torch.from_numpy(writable(state["tensors"][name])))
        self._is_done = state["is_done"].copy()
        self.np_random.bit_generator.state = copy.deepcopy(state["np_random"])
        result = self._present(sim)
        self._simulation = sim
        return result

    @_exclusive
    @torch.inference_mode(False)
    def fork(
        self, source_indices: npt.ArrayLike, target_indices: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Copy the state of some sub-environments over others, random streams included.

        Args:
            source_indices: Sub-environments to copy from. (k,) integers.
            target_indices: Distinct sub-environments to overwrite, one per source. (k,) integers.

        Returns:
            Observations and info after copying.

        Raises:
            ValueError: If an index is out of range, a target is repeated, or the numbers of
                sources and targets differ.
        """
        sim = self._ready()
        source = self._check_indices("source_indices", source_indices)
        target = self._check_indices("target_indices", target_indices)
        if len(source) != len(target) or len(set(target.tolist())) != len(target):
            raise ValueError(
                f"fork: expected one distinct target per source, got sources "
                f"{source.tolist()} and targets {target.tolist()}"
            )
        self._missing, self._simulation = "fork() was interrupted", None
        for array in (*self._member_arrays(sim).values(), self._is_done):
            array[target] = array[source]
        for tensor in sim.population.member_tensors().values():
            tensor[torch.from_numpy(target)] = tensor[torch.from_numpy(source)]
        result = self._present(sim)
        self._simulation = sim
        return result

    # ------------------------------------------------------------------ masks and samples

    @property
    def num_regimes(self) -> int:
        """Number of kinds of problems in the task, 0 without regimes."""
        regimes = TASKS[self.config.task].regimes
        return 0 if regimes is None else len(regimes.kinds)

    @property
    def num_instances(self) -> int:
        """Number of instances in the configured set."""
        return TASKS[self.config.task].ranges.set_size(self.config.instances)

    @_exclusive
    def action_masks(self) -> BoolArray:
        """Return the marginal mask of the next action; True is legal.

        Returns:
            (num_envs, sum(nvec)) bool; also in `info["action_mask"]`.
        """
        self._ready()
        return self._marginal.copy()

    @_exclusive
    def conditional_masks(self) -> dict[str, BoolArray]:
        """Return the exact mask for a policy that samples op, then slot, then the other heads.

        Returns:
            "op" (num_envs, ops); "slot" (num_envs, ops, slots); every other head
            (num_envs, ops, slots, options). All bool; True is legal. Rows of an illegal op, or of
            an illegal slot for the op, are all False.
        """
        self._ready()
        return {name: mask.copy() for name, mask in self._conditional.items()}

    @_exclusive
    def final_conditional_masks(self) -> dict[str, BoolArray]:
        """Return the `conditional_masks` of the states after the last step, before any autoreset.

        With SAME_STEP the rows of sub-environments that are done belong to `final_obs`. All other
        rows equal those of `conditional_masks`. Call it after `step`, not after `reset`.
        """
        self._ready()
        return {name: mask.copy() for name, mask in self._final_conditional.items()}

    @_exclusive
    def sample_valid_actions(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Sample legal actions: uniform over ops, slots, then options. (num_envs, 8) int64."""
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: expected a numpy.random.Generator, got {rng!r}")
        self._ready()
        return self._actions.sample(self._conditional, rng)

    # ------------------------------------------------------------------ inside

    @_exclusive
    def debug_state(self) -> Simulation:
        """Return the decision process: state, networks and population, for tests and debugging.

        Its attributes are not part of the public interface. Values that are computed from the state
        follow when it is changed; masks, observations and info follow at the next `step`.

        Raises:
            gymnasium.error.ResetNeeded: Before the first `reset`, or after a call was interrupted.
        """
        return self._ready()

    def _ready(self) -> Simulation:
        """Return the decision process; raise ResetNeeded with the reason if there is none."""
        if self._simulation is None:
            raise gym.error.ResetNeeded(
                f"{self._missing}; call reset() for all sub-environments, or set_state()"
            )
        return self._simulation

    def _build(self) -> Simulation:
        if os.getpid() != _IMPORTING_PROCESS:
            # A forked process inherits the state of torch's threads but not the threads
            # themselves, so a parallel operation would never return.
            torch.set_num_threads(1)
        return Simulation(self.num_envs, str(self.device), self.config, self._blueprints)

    def _begin(self, sim: Simulation, members: IntArray, instance: IntArray | None = None) -> None:
        """Start a new episode for some members; `instance` is (m,), None samples them."""
        sim.begin_episodes(members, instance)
        self._history.begin(members)
        self._is_done[members] = False

    def _reset_ended(
        self,
        sim: Simulation,
        result: StepResult,
        final_observations: npt.NDArray[np.float32],
        final_info: dict[str, Any],
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Start new episodes for members that are done; return observations and info after it."""
        ended = self._is_done.copy()
        members = np.nonzero(ended)[0]
        self._begin(sim, members)
        observations, info = self._present(sim, result.reward_terms, recorded=members)
        rows = np.full(self.num_envs, None, dtype=object)
        for i in members:
            rows[i] = final_observations[i]
        info["final_obs"], info["_final_obs"] = rows, ended.copy()
        info["final_info"], info["_final_info"] = masked_info(final_info, ended), ended.copy()
        return observations, info

    def _check_indices(self, name: str, indices: npt.ArrayLike) -> IntArray:
        """Return indices of sub-environments as an array. (k,) int64."""
        array = np.atleast_1d(as_array(indices))
        is_integer = np.issubdtype(array.dtype, np.integer) and array.ndim == 1
        if not is_integer or ((array < 0) | (array >= self.num_envs)).any():
            raise ValueError(
                f"{name}: expected integers from 0 to {self.num_envs - 1}, got {indices!r}"
            )
        return array.astype(np.int64)

    def _present(
        self,
        sim: Simulation,
        terms: dict[str, FloatArray] | None = None,
        *,
        recorded: IntArray | None = None,
        op_slot: IntArray | None = None,
    ) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
        """Return observations and info of the current state; every change of it ends here.

        Args:
            sim: The decision process.
            terms: Terms of the last reward; None for zeros.
            recorded: Members that were reset or took a step; their state joins the history.
            op_slot: Slots that the ops acted on; None for zeros. (num_envs,).
        """
        networks, scores = sim.networks, sim.scores
        self._conditional = self._actions.conditional_masks(
            sim.state.slots, sim.state.measured, networks.budget_table, networks.sizes.host
        )
        self._marginal = self._actions.marginal_mask(self._conditional)
        terms = self._no_terms if terms is None else terms
        regime = None if sim.task.regimes is None else sim.regime
        info = build_info(
            sim.state, scores, networks.sizes, self._marginal, terms, self.config, regime
        )
        if recorded is not None:
            slots = np.zeros(self.num_envs, dtype=np.int64) if op_slot is None else op_slot
            self._history.record(recorded, info, slots)
        observations = self._observations.build(sim.state, networks.sizes, networks.conditions)
        return observations, info

    def _member_arrays(self, sim: Simulation) -> dict[str, npt.NDArray[Any]]:
        """Return every NumPy array of the state with one row per member, by a unique name."""
        return dict(sim.state.arrays()) | self._history.arrays()

    def _made_with(self) -> dict[str, Any]:
        """Return the settings that a state must share to be restored, as JSON-able values."""
        settings = json.loads(json.dumps(dataclasses.asdict(self.config)))
        for name in ("data_dir", "chunk_size"):  # They do not change the results.
            del settings[name]
        names = [blueprint.name for blueprint in self._blueprints]
        return {"num_envs": self.num_envs, "blueprints": names, **settings}


def _device(device: Any) -> torch.device:
    """Return a torch device.

    Raises:
        ValueError: If there is no such device.
    """
    problem = f"device: expected a device of this machine, e.g. 'cpu' or 'cuda', got {device!r}"
    if not isinstance(device, (str, torch.device)):
        raise ValueError(problem)
    try:
        result = torch.device(device)
    except RuntimeError as error:
        raise ValueError(problem) from error
    if result.type == "cuda" and (result.index or 0) >= torch.cuda.device_count():
        raise ValueError(problem)
    return result
