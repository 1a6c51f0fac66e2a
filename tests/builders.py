"""What test modules share: environments, random lives, slots by hand, populations and agents."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch

from benchmarks.plain import PlainNetwork, train_batch
from esper_env import EsperEnv, EsperVectorEnv
from esper_env.config import Blend, BoolArray, EnvConfig, IntArray, Op, Stage
from esper_env.growth import lifecycle
from esper_env.growth.action_space import HEAD_NAMES, ActionSpace
from esper_env.growth.simulation import Simulation
from esper_env.growth.state import Measurements, Request, SlotState, blank
from esper_env.population.blueprints import CNN_BLUEPRINTS, Blueprint
from esper_env.population.hosts import Host
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interface import (
    Evaluation,
    Exam,
    Seeds,
    SGDSettings,
    Training,
    TrainReport,
)
from esper_env.population.population import Population
from esper_env.rng import make_key

# ------------------------------------------------------------------ environments

ID = "Esper-Digits-v0"
SMALL: dict[str, Any] = {"batches_per_step": 2, "batch_size": 16, "episode_steps": 12}
"""Settings of environments that cost little."""
CONV_LIGHT, FULL_ALPHA = 5, 2
"""Options of the blueprint head and of the alpha_target head."""
INFO_KEYS = {
    "action_mask", "action_valid", "op", "accuracy", "loss", "committed_accuracy", "score",
    "committed_score", "contribution", "contribution_valid", "stage", "alpha", "blueprint",
    "parameters", "host_parameters", "instance", "flops", "samples", "reward_terms", "rolled_back",
    "flag_parasite", "flag_attribution", "flag_churn", "gradient_cause",
    "test_accuracy", "committed_test_accuracy",
}  # fmt: skip


def make(num_envs: int = 3, **options: Any) -> EsperVectorEnv:
    envs = gym.make_vec(ID, num_envs=num_envs, **(SMALL | options)).unwrapped
    assert isinstance(envs, EsperVectorEnv)
    return envs


def make_single(**options: Any) -> EsperEnv:
    env = gym.make(ID, **(SMALL | options)).unwrapped
    assert isinstance(env, EsperEnv)
    return env


def action(op: Op, slot: int = 0, **options: int) -> npt.NDArray[np.int64]:
    """Return an action of one member; options that are not given are 0."""
    values = {"op": int(op), "slot": slot, **options}
    return np.array([values.get(name, 0) for name in HEAD_NAMES])


def waits(num_envs: int) -> npt.NDArray[np.int64]:
    """Return actions with which all members wait."""
    return np.tile(action(Op.WAIT), (num_envs, 1))


def play(envs: EsperVectorEnv, steps: int, seed: int = 1) -> list[Any]:
    """Take random legal actions; return the results of all steps."""
    rng = np.random.default_rng(seed)
    return [envs.step(envs.sample_valid_actions(rng)) for _ in range(steps)]


def grow(envs: EsperVectorEnv, slot: int = 0, blueprint: int = CONV_LIGHT) -> list[dict[str, Any]]:
    """Germinate a seed in every member and advance it until all hold theirs; return the infos."""
    germinate = action(Op.GERMINATE, slot, blueprint=blueprint, alpha_target=FULL_ALPHA)
    infos = [envs.step(np.tile(germinate, (envs.num_envs, 1)))[4]]
    while (infos[-1]["stage"][:, slot] != Stage.HOLDING).any():
        can_advance = envs.conditional_masks()["slot"][:, Op.ADVANCE, slot, None]
        infos.append(envs.step(np.where(can_advance, action(Op.ADVANCE, slot), 0))[4])
    return infos


def poison(envs: EsperVectorEnv, member: int) -> None:
    """Write NaN into a weight of a member's host."""
    envs.debug_state().population.storage.parameters[member, 0] = float("nan")


def is_legal(masks: dict[str, BoolArray], actions: IntArray) -> BoolArray:
    """Look up every option of one joint action per row in conditional masks. (num_envs,) bool."""
    rows, (op, slot, *options) = np.arange(len(actions)), actions.T
    of_op, of_slot, *rest = masks.values()
    legal = of_op[rows, op] & of_slot[rows, op, slot]
    for mask, option in zip(rest, options, strict=True):
        legal &= mask[rows, op, slot, option]
    return legal


def assert_same(a: Any, b: Any) -> None:
    """Compare nested results bit by bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (tuple, list)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray) and a.dtype == object:
        assert_same(list(a), list(b))
    else:
        np.testing.assert_array_equal(a, b)


def train_calls(sim: Simulation, num_steps: int) -> list[Training]:
    """Let all members wait for some steps; return what training was called with, in its stead."""
    calls = []
    n, num_slots = sim.state.slots.stage.shape

    def train(training: Training) -> TrainReport:
        calls.append(training)
        return TrainReport(
            np.ones(n), np.zeros((n, num_slots, 1)), np.zeros(n), np.ones(n, dtype=bool)
        )

    sim.population.train = train  # type: ignore[method-assign]
    everyone = np.ones(n, dtype=bool)
    for _ in range(num_steps):
        sim.step(blank(Request, n), everyone, everyone)
    return calls


# ------------------------------------------------------------------ the lifecycle

TRANSITIONS = {
    (Stage.DORMANT, Stage.GERMINATED),
    (Stage.GERMINATED, Stage.TRAINING),
    (Stage.GERMINATED, Stage.HOLDING),
    (Stage.TRAINING, Stage.BLENDING),
    (Stage.BLENDING, Stage.HOLDING),
    (Stage.HOLDING, Stage.FOSSILIZED),
    (Stage.HOLDING, Stage.BLENDING),
    (Stage.GERMINATED, Stage.EMBARGOED),
    (Stage.TRAINING, Stage.EMBARGOED),
    (Stage.BLENDING, Stage.EMBARGOED),
    (Stage.HOLDING, Stage.EMBARGOED),
    (Stage.EMBARGOED, Stage.DORMANT),
}
"""The legal changes of stage, written again so that a change of the code alone is detected."""
LIVE = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED)
BLUEPRINTS = ("small", "middle", "large")
SEED_PARAMETERS = np.array([[10, 60, 150], [20, 90, 300], [30, 120, 400]])
"""(slots, blueprints)."""
HOST_PARAMETERS = np.array([100])
move = lifecycle._move
"""The one function that changes stages."""


@dataclass(frozen=True)
class Step:
    """One decision of all members, with copies of the state around it."""

    before: SlotState
    measured: Measurements
    """Measurements at the decision."""
    actions: npt.NDArray[np.int64]
    active: BoolArray
    acted: SlotState
    """After `apply`, before `tick`."""
    after: SlotState


def walk(
    config: EnvConfig,
    rng: np.random.Generator,
    *,
    num_envs: int,
    num_steps: int,
    num_slots: int = 2,
    active_share: float = 1.0,
    restart_share: float = 0.0,
) -> Iterator[Step]:
    """Take random legal actions, without networks.

    Args:
        config: Rules.
        rng: Draws actions, measurements, inactive members and restarts.
        num_envs: Members.
        num_steps: Decisions.
        num_slots: Slots, up to 3.
        active_share: Probability with which a member takes part in a step.
        restart_share: Probability with which a member starts a new episode before a step.
    """
    space = ActionSpace(num_slots, BLUEPRINTS, config)
    state = SlotState.empty(num_envs, num_slots)
    measured = Measurements.empty(num_envs, num_slots)
    table = SEED_PARAMETERS[:num_slots]
    for _ in range(num_steps):
        restarts = np.broadcast_to(rng.random((num_envs, 1)) < restart_share, state.stage.shape)
        state.clear(restarts)
        measured.clear(restarts)
        before, seen = copy.deepcopy(state), copy.deepcopy(measured)
        masks = space.conditional_masks(state, measured, table, HOST_PARAMETERS)
        active = rng.random(num_envs) < active_share
        actions = np.where(active[:, None], space.sample(masks, rng), 0)
        asked, is_valid = space.parse(actions, masks, active, raises_on_illegal=False)
        assert is_valid[active].all()
        lifecycle.apply(state, measured, asked, config)
        acted = copy.deepcopy(state)
        lifecycle.tick(state, measured, active, config)
        yield Step(before, seen, actions, active, acted, copy.deepcopy(state))
        measure(state, measured, config, rng)


def measure(
    state: SlotState, measured: Measurements, config: EnvConfig, rng: np.random.Generator
) -> None:
    """Make up what training and evaluation might measure; each gate passes and fails."""
    shape = state.stage.shape
    trains = (state.stage >= Stage.TRAINING) & (state.stage <= Stage.FOSSILIZED)
    has_gradient = trains & (rng.random(shape) < 0.95)
    is_exploding = has_gradient & (rng.random(shape) < 0.05)
    measured.has_gradient[:] = has_gradient
    measured.exploding[:] = np.where(is_exploding, rng.random(shape), 0.0)
    measured.health[:] = np.where(has_gradient, 0.6 + 0.4 * rng.random(shape), 0.0)
    if config.attribution != "none":
        is_trial = lifecycle.is_trial(state.stage)
        is_tested = is_trial & (state.alpha > 0) & (rng.random(shape) < 0.9)
        contribution = rng.normal(0.02, 0.05, shape)
        measured.contribution[:] = np.where(is_tested, contribution, measured.contribution)
        measured.has_contribution[:] |= is_tested


def slots(stages: Sequence[Sequence[Stage]], alpha: Sequence[Sequence[float]]) -> SlotState:
    """Return members with given stages and blend weights. Both (members, slots)."""
    state = SlotState.empty(*np.shape(stages))
    state.stage[:] = stages
    state.alpha[:] = alpha
    return state


def seed_in(stage: Stage, **fields: Any) -> tuple[SlotState, Measurements]:
    """Return one member with one slot in `stage`, healthy, measured and past every waiting time."""
    state, measured = SlotState.empty(1, 1), Measurements.empty(1, 1)
    state.stage[:] = stage
    values: dict[str, Any] = {}
    if stage in LIVE:
        values = {"blueprint": 0, "style": 0, "tempo": 3, "first_target": 1.0}
        values |= {"age": 50, "stage_steps": 50, "has_gradient": True, "health": 1.0}
        values |= {"has_contribution": True, "contribution": 0.1}
        if stage in (Stage.BLENDING, Stage.HOLDING, Stage.FOSSILIZED):
            values |= {"alpha": 1.0, "alpha_target": 1.0}
    elif stage == Stage.EMBARGOED:
        values = {"cooldown": 2, "stage_steps": 1}
    for name, value in {**values, **fields}.items():
        getattr(state if hasattr(state, name) else measured, name)[:] = value
    return state, measured


def request(op: Op, **fields: Any) -> Request:
    """Return a request of one member for slot 0: blueprint 0, ramps of 3 ticks to 1, linear."""
    values = {"tempo": 3, "speed": 3, "target": 1.0, "op": op, **fields}
    return Request(*(np.array([values.get(name, 0)]) for name in Request._fields))


# ------------------------------------------------------------------ populations

NAMES = [blueprint.name for blueprint in CNN_BLUEPRINTS]
TINY = Host(in_channels=2, image_size=8, channels=(3, 6), num_classes=5)
RATE = 0.05
BATCHES, BATCH_SIZE = 3, 16
# float32 results of a grouped and of a single convolution differ by rounding, a few 1e-7 after
# some optimizer steps; 2e-5 leaves room for other BLAS builds.
TOLERANCE = 2e-5
STAGES = {
    "training": {"alpha": 0.0, "beta": 1.0, "is_isolated": True},
    "blending": {"alpha": 0.4, "beta": 0.4, "is_isolated": True},
    "holding": {"alpha": 1.0, "beta": 1.0, "is_isolated": False},
    "half": {"alpha": 0.5, "beta": 0.5, "is_isolated": False},
}


def make_images(count: int = 200, host: Host = TINY) -> ImageSet:
    rng = np.random.default_rng(0)
    shape = (count, host.image_size, host.image_size, host.in_channels)
    images = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, host.num_classes, count))
    mean, std = (torch.full((host.in_channels,), value) for value in (120.0, 70.0))
    return ImageSet(images, labels, mean, std)


def train_plain(network: PlainNetwork, images: ImageSet, indices: IntArray) -> float:
    """Train an ordinary network on some batches; return the mean loss."""
    optimizer = network.optimizer(RATE, RATE, SGDSettings().weight_decay)
    network.train()
    losses = []
    for index in torch.from_numpy(indices):
        x = ((images.images[index].float() - images.mean) / images.std).permute(0, 3, 1, 2)
        losses.append(
            train_batch(network, optimizer, x, images.labels[index], SGDSettings().clip_norm)
        )
    return float(torch.stack(losses).mean())


class SmallPopulation:
    """A population of small hosts without seeds, its seed table, and images.

    Args:
        num_members: Members.
        hosts: Host of each width; member i has the width i modulo their number.
        blueprints: The registry.
        chunk_size: Members per tensor program.
        precision: See `Population`.
    """

    def __init__(
        self,
        num_members: int = 1,
        *,
        hosts: Sequence[Host] = (TINY,),
        blueprints: Sequence[Blueprint] = CNN_BLUEPRINTS,
        chunk_size: int | None = None,
        precision: str = "float32",
    ) -> None:
        self.images = make_images(host=hosts[-1])
        self.members = np.arange(num_members)
        shape = num_members, hosts[-1].num_slots
        self.seeds = Seeds(
            blueprint=np.full(shape, -1),
            blend=np.zeros(shape, dtype=np.int64),
            alpha=np.zeros(shape),
            beta=np.zeros(shape),
            is_isolated=np.zeros(shape, dtype=bool),
            is_frozen=np.zeros(shape, dtype=bool),
            width=self.members % len(hosts),
        )
        self.population = Population(
            hosts,
            blueprints,
            num_members,
            SGDSettings(),
            torch.device("cpu"),
            BATCH_SIZE,
            chunk_size,
            precision,
        )
        self.population.reset(self.members, self.seeds.width, make_key(self.members))
        self.layout, self.storage = self.population.layout, self.population.storage

    def plant(
        self,
        member: int,
        slot: int,
        blueprint: int | str,
        stage: str | None = None,
        blend: int = Blend.ADD,
    ) -> None:
        """Germinate a seed and bring it into a stage of `STAGES`; without one it does not run."""
        index = NAMES.index(blueprint) if isinstance(blueprint, str) else blueprint
        one = np.array([member])
        place = self.seeds.width[one], np.array([slot]), np.array([index])
        self.population.germinate(one, *place, make_key(one, 77 + slot))
        values = {"blueprint": index, "blend": blend, **(STAGES[stage] if stage else {})}
        for name, value in values.items():
            getattr(self.seeds, name)[member, slot] = value

    def awaken(self) -> None:
        """Move all parameters off their start values, zeros included, so that nothing cancels."""
        noise = np.random.default_rng(0).normal(0, 0.1, self.storage.parameters.shape)
        self.storage.parameters += torch.from_numpy(noise.astype(np.float32))

    def draw(self, seed: int, m: int | None = None) -> IntArray:
        """Draw images for `m` members, or for all. (batches, batch_size, m)."""
        shape = BATCHES, BATCH_SIZE, m or len(self.members)
        return np.random.default_rng(seed).integers(0, len(self.images), shape)

    def train(
        self, indices: IntArray, members: Sequence[int] | None = None, rate: float = RATE
    ) -> TrainReport:
        """Train some members, or all, on the images that `indices` name."""
        who = self.members if members is None else np.array(members)
        rates = np.full(len(who), rate)
        batches = Draw(indices, self.images.labels.numpy()[indices])
        training = Training(who, self.seeds, self.images, batches, rates, rates)
        return self.population.train(training)

    def evaluate(
        self,
        alpha: Any,
        members: Sequence[int] | IntArray | None = None,
        exam: Exam | None = None,
    ) -> Evaluation:
        """Evaluate some members, or all, with given blend weights. (rows, slots)."""
        who = self.members if members is None else np.asarray(members)
        alpha = np.asarray(alpha, float)
        return self.population.evaluate(who, alpha, self.seeds, self.images, exam)

    def plain(self, member: int) -> PlainNetwork:
        """Return the ordinary network that a member should be."""
        seeds = self.seeds
        network = PlainNetwork(self.layout.hosts[int(seeds.width[member])])
        network.load_host(self.population, member)
        for slot in np.nonzero(seeds.blueprint[member] >= 0)[0].tolist():
            kind = int(seeds.blueprint[member, slot]), int(seeds.blend[member, slot])
            seed = network.add_seed(self.population, member, slot, *kind)
            seed.alpha = float(seeds.alpha[member, slot])
            seed.is_training_stage = bool(seeds.alpha[member, slot] == 0)
            seed.is_isolated = bool(seeds.is_isolated[member, slot])
        return network

    def plains(self) -> list[PlainNetwork]:
        """Return the ordinary networks that all members should be."""
        return [self.plain(i) for i in self.members.tolist()]

    def assert_equals(self, member: int, network: PlainNetwork) -> None:
        """Compare every weight and statistic of a member."""
        actual = self.plain(member).state_dict()
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                torch.testing.assert_close(actual[name], tensor, atol=TOLERANCE, rtol=TOLERANCE)


# ------------------------------------------------------------------ agents


def tiny_config(**changes: Any) -> EnvConfig:
    """Return settings of one batch of 8 images per env step and 6 env steps, unless changed."""
    settings = {"batches_per_step": 1, "batch_size": 8, "episode_steps": 6}
    return EnvConfig(**(settings | changes))


def sharpen(agent: Any) -> Any:
    """Make the heads of a new agent far from uniform (their initial gain is 0.01)."""
    with torch.no_grad():
        for head in (agent.op_head, agent.slot_head, agent.rest_head):
            head.weight.mul_(100.0)
    return agent
