"""Engine that trains and evaluates members in grouped tensor operations, on any device.

The engine processes members in chunks whose activations fit the cache. `training` has the graph of
one chunk's training, `evaluation` that of its evaluation. On a CPU the numba engine is faster for
small networks, but supports fewer layers.
"""

from __future__ import annotations

import numpy as np
import torch

from esper_env.config import FloatArray, IntArray
from esper_env.population.images import Draw, ImageSet
from esper_env.population.interface import (
    Evaluation,
    Exam,
    Seeds,
    SGDSettings,
    Training,
    TrainReport,
)
from esper_env.population.layers import cross_entropy
from esper_env.population.storage import Storage
from esper_env.population.torch_engine.evaluation import EvaluationGraph
from esper_env.population.torch_engine.training import TrainingGraph, in_precision

CHUNK_BYTES = 4 * 2**20
"""Default limit on one block's activations in a chunk, about the size of a cache [bytes]."""
EVALUATION_BYTES = 2**20
"""Limit on one block's activations in a slice of an evaluation [bytes]. With larger slices glibc
returns memory pages to the system and requests them again in every step: 8 MiB took twice as long
(16 members, 350 digits)."""


class TorchEngine:
    """Engine that trains and evaluates members in grouped tensor operations.

    Args:
        storage: Tensors of all members.
        settings: Optimizer settings.
        batch_size: Images per training batch, which the default chunk size depends on.
        chunk_size: Members per grouped tensor operation; None for as many as fit `CHUNK_BYTES`.
        precision: "float32" or "bfloat16", for convolutions and linear maps.
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
        # Bytes of the largest block's output, for one member and image.
        self._feature_bytes = 4 * largest
        fitting = CHUNK_BYTES // (self._feature_bytes * batch_size)
        self.chunk_size = min(len(storage.parameters), chunk_size or max(1, fitting))
        self._graphs: dict[int, tuple[bytes, TrainingGraph]] = {}

    # Callers may step the environment inside `torch.no_grad`.
    @torch.enable_grad()
    def train(self, training: Training) -> TrainReport:
        """Train members on some batches; see `Population.train`."""
        members = training.members
        losses, squares, hosts = [], [], []
        for start in range(0, len(members), self.chunk_size):
            part = training.of(slice(start, start + self.chunk_size))
            loss, chunk_squares, host = self._training_graph(start, part).train(part)
            losses.append(loss)
            squares.append(chunk_squares.flatten(1))
            hosts.append(host)
        # One copy of all results, because each copy makes the CPU wait for the device.
        # [loss, sum of the row, squared norms of host and seeds]: (m, 3 + slots * max_seed_tensors)
        parts = torch.cat(losses), self.storage.total(members), torch.cat(hosts)
        scalars = torch.stack(parts, dim=1)
        result = torch.cat([scalars, torch.cat(squares)], dim=1).cpu().numpy().astype(np.float64)
        shape = len(members), self.layout.host.num_slots, self.layout.max_seed_tensors
        norms = np.sqrt(result[:, 3:]).reshape(shape)
        is_finite = np.isfinite(result[:, 1])
        return TrainReport(result[:, 0], norms, np.sqrt(result[:, 2]), is_finite)

    @torch.inference_mode()
    def evaluate(
        self,
        members: IntArray,
        alpha: FloatArray,
        seeds: Seeds,
        images: ImageSet,
        exam: Exam | None = None,
    ) -> Evaluation:
        """Evaluate networks; see `Population.evaluate`."""
        # Number of correct images, and sum of the losses. (2, rows)
        total = torch.zeros(2, len(members), device=self.device, dtype=torch.float64)
        # Chunks of members, not of rows: rows of one member share their computation.
        distinct = np.unique(members)
        count: int | torch.Tensor = len(images)
        if exam is not None:
            count = torch.from_numpy(exam.num_images(members)).to(self.device)
        for start in range(0, len(distinct), self.chunk_size):
            part = distinct[start : start + self.chunk_size]
            rows = np.nonzero(np.isin(members, part))[0]
            graph = EvaluationGraph(self.storage, members[rows], alpha[rows], seeds)
            own = torch.from_numpy(rows).to(self.device)
            # Evaluate in slices of images that fit the cache, and sum over them.
            most = len(images) if exam is None else int(exam.num_images(part).max())
            per_image = self._feature_bytes * len(part)
            step = max(1, min(most, EVALUATION_BYTES // per_image))
            for first in range(0, most, step):
                last = min(first + step, most)
                # Labels have the shape (rows, slice) of logits (rows, slice, classes).
                if exam is None:
                    pixels = images.normalized(first, last)
                    labels = images.labels[first:last].expand(len(rows), -1)
                else:
                    indices, own_labels = (array[part, first:last].T[None] for array in exam)
                    (batch,), _ = images.batches(Draw(indices, own_labels))
                    # (slice, h, w, m * channels) -> (slice, m * channels, h, w)
                    pixels = batch.permute(0, 3, 1, 2)
                    labels = torch.from_numpy(exam.labels[members[rows], first:last])
                    labels = labels.to(self.device)
                with in_precision(self.precision, self.device):
                    logits = graph.forward(pixels)
                hits = (logits.argmax(2) == labels).sum(1, dtype=torch.float64)
                loss = cross_entropy(logits, labels).sum(1, dtype=torch.float64)
                total.index_add_(1, own, torch.stack([hits, loss]))
        accuracy, mean_loss = (total / count).cpu().numpy()
        return Evaluation(accuracy, mean_loss)

    def _training_graph(self, position: int, training: Training) -> TrainingGraph:
        """Return the graph of the chunk at a position, rebuilt if its composition changed."""
        members, seeds = training.members, training.seeds
        parts = seeds.beta > 0, seeds.blueprint, seeds.blend, seeds.is_isolated, seeds.is_frozen
        key = b"".join(a.tobytes() for a in (members, *(part[members] for part in parts)))
        known = self._graphs.get(position)
        if known is None or known[0] != key:
            graph = TrainingGraph(self.storage, members, seeds, self.settings, self.precision)
            self._graphs[position] = known = (key, graph)
        return known[1]
