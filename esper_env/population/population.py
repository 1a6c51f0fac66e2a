"""Training and evaluation of many growing hosts by one call.

The population knows members, slots, blueprints and blend weights. It knows nothing of stages,
actions or rewards. It passes members whose layers all have compiled kernels to the numba engine (on
a CPU, in float32), and all other members to the torch engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch

from esper_env.config import BoolArray, FloatArray, IntArray
from esper_env.population.blueprints import Blueprint
from esper_env.population.hosts import Host
from esper_env.population.images import ImageSet
from esper_env.population.interface import (
    Evaluation,
    Exam,
    Seeds,
    SGDSettings,
    Training,
    TrainReport,
)
from esper_env.population.layout import Layout
from esper_env.population.numba_engine.engine import CompiledEngine
from esper_env.population.storage import Storage
from esper_env.population.torch_engine.engine import TorchEngine
from esper_env.rng import KeyArray

Record = TypeVar("Record", TrainReport, Evaluation)


class Population:
    """Hosts and seeds of `num_members` members.

    Args:
        hosts: Host of each width that a member may have; the last is the widest.
        blueprints: The registry, in the order of the blueprint head.
        num_members: Number of members.
        settings: Optimizer settings.
        device: Device of all tensors.
        batch_size: Images per training batch, which the default chunk size depends on.
        chunk_size: Members per grouped tensor operation of the torch engine; None for as many as
            fit `CHUNK_BYTES`.
        precision: "float32", or "bfloat16" for convolutions and linear maps in the torch engine.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        blueprints: Sequence[Blueprint],
        num_members: int,
        settings: SGDSettings,
        device: str | torch.device,
        batch_size: int,
        chunk_size: int | None,
        precision: str = "float32",
    ) -> None:
        self.layout = Layout(hosts, blueprints)
        host = self.layout.host
        self.num_members = num_members
        self.settings = settings
        self.device = device = torch.device(device)
        self.storage = Storage(self.layout, num_members, device)
        self._torch = TorchEngine(self.storage, settings, batch_size, chunk_size, precision)
        # Kernels exist for the CPU and float32 only.
        has_kernels = device.type == "cpu" and precision == "float32"
        self.compiled = CompiledEngine(self.storage, settings) if has_kernels else None
        """Engine of members whose layers have kernels; None passes all to the torch engine."""
        registry = self.layout.blueprints
        # Tables instead of calls: the simulation looks up the sizes of all members at once.
        self.host_parameters: IntArray = np.array([h.num_parameters for h in hosts])
        """Parameters of a host of each width. (widths,)."""
        self.host_multiply_adds: IntArray = np.array([h.multiply_adds for h in hosts])
        """Multiply-adds per image of a host of each width. (widths,)."""
        self.seed_parameters: IntArray = np.array(
            [[[b.num_parameters(c) for b in registry] for c in h.channels] for h in hosts]
        )
        """Parameters of a seed of each blueprint, without gate. (widths, slots, blueprints)."""
        self.gate_parameters: IntArray = np.array([[c + 1 for c in h.channels] for h in hosts])
        """Parameters of a gate. (widths, slots)."""
        sizes = [host.slot_size(i) for i in range(host.num_slots)]
        self.seed_multiply_adds: IntArray = np.array(
            [
                [
                    [b.multiply_adds(c, size, size) for b in registry]
                    for c, size in zip(h.channels, sizes, strict=True)
                ]
                for h in hosts
            ]
        )
        """Multiply-adds per image of a seed of each blueprint. (widths, slots, blueprints)."""

    def member_tensors(self) -> dict[str, torch.Tensor]:
        """Return every tensor with one row per member by name, without copies."""
        saved = {f"snapshot.{name}": tensor for name, tensor in self.storage.snapshots.items()}
        return self.storage.matrices | saved

    def reset(self, members: IntArray, widths: IntArray, key: KeyArray) -> None:
        """Initialize the hosts of some members, and empty their slots.

        Args:
            members: Members to reset. (m,).
            widths: Index of each member's width. (m,).
            key: Random stream of each member's initial weights. (m,) uint64.
        """
        self.storage.clear(members)
        for width in np.unique(widths).tolist():
            here = widths == width
            start = self.layout.host_start(width)
            self.storage.initialize(members[here], key[here], *start)

    def germinate(
        self,
        members: IntArray,
        widths: IntArray,
        slots: IntArray,
        blueprints: IntArray,
        key: KeyArray,
    ) -> None:
        """Initialize the weights and gates of new seeds, with zero momentum.

        Args:
            members: Member of each seed. (m,).
            widths: Index of each member's width. (m,).
            slots: Slot of each seed. (m,).
            blueprints: Index of each seed's blueprint. (m,).
            key: Random stream of each seed's initial weights. (m,) uint64.
        """
        # Seeds with the same slot, blueprint and width share their columns: one call for each kind.
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, kind in enumerate(np.stack([slots, blueprints, widths], axis=1).tolist()):
            alike.setdefault(tuple(kind), []).append(i)
        for (slot, blueprint, width), own in alike.items():
            start = self.layout.seed_start(slot, blueprint, width)
            self.storage.initialize(members[own], key[own], *start)

    def train(self, training: Training) -> TrainReport:
        """Train members on some batches.

        Args:
            training: Members, batches and learning rates.

        Returns:
            Measurements of these members, in their order.
        """
        if self.compiled is None or self.compiled.has_all_kernels:
            return (self.compiled or self._torch).train(training)
        return _joined(
            (own, engine.train(training.of(own)))
            for engine, own in self._engines(self.compiled, training.members, training.seeds)
        )

    def evaluate(
        self,
        members: IntArray,
        alpha: FloatArray,
        seeds: Seeds,
        images: ImageSet,
        exam: Exam | None = None,
    ) -> Evaluation:
        """Evaluate networks that use a member's weights with other blend weights.

        Networks of one member with equal blend weights before a slot share the computation up to
        this slot.

        Args:
            members: Member whose weights each network uses. (rows,).
            alpha: Blend weight of each seed; 0 removes the seed. (rows, slots).
            seeds: Seeds of the whole population, for blueprints and blends.
            images: Split that all networks are evaluated on.
            exam: Images of the split that each member of the population is evaluated on instead,
                and their labels; None for the whole split.

        Returns:
            Accuracy [0 to 1] and mean loss [nats] of each network, over its member's images.
        """
        if self.compiled is None or self.compiled.has_all_kernels:
            return (self.compiled or self._torch).evaluate(members, alpha, seeds, images, exam)
        return _joined(
            (own, engine.evaluate(members[own], alpha[own], seeds, images, exam))
            for engine, own in self._engines(self.compiled, members, seeds)
        )

    def _engines(
        self, compiled: CompiledEngine, members: IntArray, seeds: Seeds
    ) -> list[tuple[TorchEngine | CompiledEngine, BoolArray]]:
        """Return each engine in use with a mask of the members that it serves. (m,) bool."""
        has_kernels = compiled.supports(members, seeds)
        parts = ((compiled, has_kernels), (self._torch, ~has_kernels))
        return [(engine, own) for engine, own in parts if own.any()]


def _joined(parts: Iterable[tuple[Any, Record]]) -> Record:
    """Return one record with the rows of all parts, each of which has a mask of its rows."""
    masks, records = zip(*parts, strict=True)
    if len(records) == 1:
        return cast(Record, records[0])
    order = np.argsort(np.concatenate([np.nonzero(mask)[0] for mask in masks]))
    arrays = (np.concatenate(values)[order] for values in zip(*records, strict=True))
    return cast(Record, type(records[0])(*arrays))
