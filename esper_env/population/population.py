"""Training and evaluation of many growing hosts as one tensor program.

The population knows members, slots, blueprints and blend weights; it knows nothing of stages,
actions or rewards. Per env step it makes one copy of results to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esper_env import streams
from esper_env.config import BoolArray, FloatArray, IntArray
from esper_env.population.blueprints import Blueprint
from esper_env.population.hosts import Host
from esper_env.population.images import Draw, ImageSet
from esper_env.population.layers import cross_entropy
from esper_env.population.layout import Layout
from esper_env.population.optimizer import SGDSettings
from esper_env.population.program import Program
from esper_env.population.slots import Seeds
from esper_env.population.storage import Storage
from esper_env.population.tree import Tree

CHUNK_BYTES = 4 * 2**20
"""Activations of one block that a chunk may have, by default: about what stays in cache."""
EVALUATION_BYTES = 2**20
"""Likewise for one slice of an evaluation. Larger slices make glibc return and fetch memory pages
in every step: 8 MiB took twice as long (16 members, 350 digits)."""


@dataclass(frozen=True)
class TrainReport:
    """What one env step of training measured."""

    loss: FloatArray
    """Mean training loss. (m,) [nats]."""
    seed_gradient_norms: FloatArray
    """Norm of each tensor's gradient before clipping, root mean square over the batches; NaN where
    there is no such tensor. (m, slots, max_tensors)."""
    is_finite: BoolArray
    """Whether all weights and statistics are finite afterwards. (m,)."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy and loss of some networks on one split. Arrays are (rows,)."""

    accuracy: FloatArray
    loss: FloatArray


class Population:
    """`num_members` hosts with their seeds.

    Args:
        hosts: Shapes of the host, one per width that a member may have; the last is the widest.
        blueprints: The registry.
        num_members: How many hosts.
        settings: Optimiser rules.
        device: Where all tensors live.
        batch_size: Images per training batch; used for the default chunk size.
        chunk_size: Members per tensor program, or None for as many as fit `CHUNK_BYTES`.
    """

    def __init__(
        self,
        hosts: Sequence[Host],
        blueprints: Sequence[Blueprint],
        num_members: int,
        settings: SGDSettings,
        device: torch.device,
        batch_size: int,
        chunk_size: int | None,
    ) -> None:
        self.layout = Layout(hosts, blueprints)
        host = self.layout.host
        self.num_members = num_members
        self.settings = settings
        self.device = device
        largest = max(c * host.slot_size(i) ** 2 for i, c in enumerate(host.channels))
        self._feature_bytes = 4 * largest
        fitting = CHUNK_BYTES // (self._feature_bytes * batch_size)
        self.chunk_size = min(num_members, chunk_size or max(1, fitting))
        self.storage = Storage(self.layout, num_members, device)
        registry = self.layout.blueprints
        self.host_parameters: IntArray = np.array([h.num_parameters for h in hosts])
        """Parameters of a host of each width. (widths,)."""
        self.host_multiply_adds: IntArray = np.array([h.multiply_adds for h in hosts])
        """Multiply-adds per image of a host of each width. (widths,)."""
        self.seed_parameters: IntArray = np.array(
            [[[b.num_parameters(c) for b in registry] for c in h.channels] for h in hosts]
        )
        """Parameters of each blueprint, without gate. (widths, slots, blueprints)."""
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
        """Multiply-adds per image of each blueprint. (widths, slots, blueprints)."""
        self._programs: dict[int, tuple[bytes, Program]] = {}

    def reset(self, members: IntArray, widths: IntArray, key: streams.KeyArray) -> None:
        """Give members fresh hosts and empty slots.

        Args:
            members: Which. (m,).
            widths: Index of each one's width. (m,).
            key: Stream of each member's initial weights. (m,) uint64.
        """
        self.storage.clear(members)
        for width in np.unique(widths).tolist():
            here = widths == width
            start = self.layout.host_start(width)
            self.storage.initialise(members[here], key[here], *start)

    def germinate(
        self,
        members: IntArray,
        widths: IntArray,
        slots: IntArray,
        blueprints: IntArray,
        key: streams.KeyArray,
    ) -> None:
        """Build seeds: initial weights, gate, no momentum. All arrays are (m,)."""
        kinds = np.stack([slots, blueprints, widths], axis=1)
        for kind in np.unique(kinds, axis=0):
            here = (kinds == kind).all(axis=1)
            start = self.layout.seed_start(*kind.tolist())
            self.storage.initialise(members[here], key[here], *start)

    # A caller may step the environment inside no_grad.
    @torch.enable_grad()
    def train(
        self,
        members: IntArray,
        seeds: Seeds,
        images: ImageSet,
        draw: Draw,
        host_rate: FloatArray,
        seed_rate: FloatArray,
    ) -> TrainReport:
        """Train members for some batches.

        Args:
            members: Which. (m,).
            seeds: Seeds of the whole population.
            images: The training split.
            draw: What each batch shows to each of them.
            host_rate: Learning rate of each member's host. (m,).
            seed_rate: Learning rate of each member's seeds. (m,).

        Returns:
            Measurements of these members.
        """
        losses, squares, programs = [], [], []
        for start in range(0, len(members), self.chunk_size):
            part = slice(start, start + self.chunk_size)
            program = self._program(start, members[part], seeds)
            batches = images.batches(draw.of(part))
            loss, square = program.train(seeds, *batches, host_rate[part], seed_rate[part])
            losses.append(loss)
            squares.append(square)
            programs.append(program)
        result = torch.cat([*losses, *squares]).cpu().numpy().astype(np.float64)
        num_slots = self.layout.host.num_slots
        norms = np.full((self.num_members, num_slots, self.layout.max_seed_tensors), np.nan)
        start = len(members)
        for program, square in zip(programs, squares, strict=True):
            values = np.sqrt(result[start : start + len(square)])
            start += len(square)
            measured = values[program.seed_segments]
            norms[program.segment_at] = np.where(np.isnan(measured), np.inf, measured)
        return TrainReport(
            loss=result[: len(members)],
            seed_gradient_norms=norms[members],
            is_finite=self.storage.is_finite(members),
        )

    @torch.inference_mode()
    def evaluate(
        self, members: IntArray, alpha: FloatArray, seeds: Seeds, images: ImageSet
    ) -> Evaluation:
        """Evaluate networks that share weights with members but have blend weights of their own.

        What several networks of one member have in common up to a slot is computed once.

        Args:
            members: The member whose weights each network has. (rows,).
            alpha: Blend weight of each slot; 0 leaves a seed out. (rows, slots).
            seeds: Blueprints and blends of the whole population.
            images: The split, the same images for all.

        Returns:
            Accuracy [0 to 1] and mean loss [nats] per row.
        """
        correct, loss = [], []
        distinct = np.unique(members)
        for start in range(0, len(distinct), self.chunk_size):
            part = distinct[start : start + self.chunk_size]
            rows = np.nonzero(np.isin(members, part))[0]
            tree = Tree(self.storage, members[rows], alpha[rows], seeds)
            per_image = self._feature_bytes * len(part)
            step = max(1, min(len(images), EVALUATION_BYTES // per_image))
            chunk_correct = torch.zeros(len(rows), device=self.device)
            chunk_loss = torch.zeros(len(rows), device=self.device, dtype=torch.float64)
            for first in range(0, len(images), step):
                last = min(first + step, len(images))
                logits = tree.forward(images.normalised(first, last))
                labels = images.labels[first:last].expand(len(rows), -1)
                chunk_correct += (logits.argmax(2) == labels).sum(1)
                chunk_loss += cross_entropy(logits, labels).sum(1, dtype=torch.float64)
            order = torch.from_numpy(rows)
            correct.append((order, chunk_correct))
            loss.append(chunk_loss)
        stacked = torch.stack([torch.cat([c for _, c in correct]), torch.cat(loss)]).cpu()
        result = np.empty((2, len(members)))
        result[:, np.concatenate([order.numpy() for order, _ in correct])] = stacked.numpy()
        result /= len(images)
        return Evaluation(accuracy=result[0], loss=result[1])

    def _program(self, position: int, members: IntArray, seeds: Seeds) -> Program:
        """Return the chunk's program, rebuilt only when its composition changed."""
        here = [
            array[members]
            for array in (seeds.blueprint, seeds.blend, seeds.is_isolated, seeds.is_frozen)
        ]
        runs = seeds.beta[members] > 0
        key = b"".join(a.tobytes() for a in (members, *here, runs))
        known = self._programs.get(position)
        if known is None or known[0] != key:
            program = Program(self.storage, members, seeds, self.settings)
            self._programs[position] = known = (key, program)
        return known[1]
