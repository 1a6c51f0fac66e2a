"""Training and evaluation of members as one tensor program, on any device.

Members are processed in chunks that fit the cache; see `program` and `tree`. `compiled` does the
same faster for small networks on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch

from esper_env.config import FloatArray, IntArray
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interface import Evaluation, Seeds, SGDSettings, TrainReport
from esper_env.population.layers import cross_entropy
from esper_env.population.storage import Storage
from esper_env.population.torch_engine.evaluation import Tree
from esper_env.population.torch_engine.training import Program, in_precision

CHUNK_BYTES = 4 * 2**20
"""Activations of one block that a chunk may have, by default: about what stays in cache."""
EVALUATION_BYTES = 2**20
"""Likewise for one slice of an evaluation. Larger slices make glibc return and fetch memory pages
in every step: 8 MiB took twice as long (16 members, 350 digits)."""


class TorchEngine:
    """Trains and evaluates members with tensor operations.

    Args:
        storage: Tensors of all members.
        settings: Optimiser rules.
        batch_size: Images per training batch; used for the default chunk size.
        chunk_size: Members per tensor program, or None for as many as fit `CHUNK_BYTES`.
        precision: Of convolutions and linear maps, "float32" or "bfloat16".
    """

    def __init__(
        self,
        storage: Storage,
        settings: SGDSettings,
        batch_size: int,
        chunk_size: int | None,
        precision: str,
    ) -> None:
        self.storage, self.layout, self.device = storage, storage.layout, storage.device
        self.settings, self.precision = settings, precision
        host = self.layout.host
        largest = max(c * host.slot_size(i) ** 2 for i, c in enumerate(host.channels))
        self._feature_bytes = 4 * largest
        fitting = CHUNK_BYTES // (self._feature_bytes * batch_size)
        self.chunk_size = min(len(storage.parameters), chunk_size or max(1, fitting))
        self._programs: dict[int, tuple[bytes, Program]] = {}

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
        """Train members for some batches; see `Population.train`."""
        losses, squares, programs = [], [], []
        for start in range(0, len(members), self.chunk_size):
            part = slice(start, start + self.chunk_size)
            program = self._program(start, members[part], seeds)
            batches = images.batches(draw.of(part))
            loss, segment_squares = program.train(seeds, *batches, host_rate[part], seed_rate[part])
            losses.append(loss)
            squares.append(segment_squares)
            programs.append(program)
        # The one place where the host waits for results.
        result = torch.cat([*losses, self.storage.total(members), *squares]).cpu().numpy()
        mean_loss, total, square = np.split(
            result.astype(np.float64), np.cumsum([len(members)] * 2)
        )
        num_slots = self.layout.host.num_slots
        norms = np.full(
            (len(self.storage.parameters), num_slots, self.layout.max_seed_tensors), np.nan
        )
        ends = np.cumsum([len(program.sgd.lengths) for program in programs])[:-1]
        for program, values in zip(programs, np.split(np.sqrt(square), ends), strict=True):
            own = values[program.seed_segments]
            norms[program.segment_at] = np.where(np.isnan(own), np.inf, own)
        return TrainReport(mean_loss, norms[members], np.isfinite(total))

    @torch.inference_mode()
    def evaluate(
        self, members: IntArray, alpha: FloatArray, seeds: Seeds, images: ImageSet
    ) -> Evaluation:
        """Evaluate networks; see `Population.evaluate`."""
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
                with in_precision(self.precision, self.device):
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
            program = Program(self.storage, members, seeds, self.settings, self.precision)
            self._programs[position] = known = (key, program)
        return known[1]
