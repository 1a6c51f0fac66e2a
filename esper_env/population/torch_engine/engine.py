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
from esper_env.population.interface import Evaluation, Seeds, SGDSettings, TrainReport
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
        settings: Optimiser settings.
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
    def train(
        self,
        members: IntArray,
        seeds: Seeds,
        images: ImageSet,
        draw: Draw,
        host_rate: FloatArray,
        seed_rate: FloatArray,
    ) -> TrainReport:
        """Train members on some batches; see `Population.train`."""
        losses, squares, graphs = [], [], []
        for start in range(0, len(members), self.chunk_size):
            part = slice(start, start + self.chunk_size)
            graph = self._training_graph(start, members[part], seeds)
            batches = images.batches(draw.of(part))
            loss, segment_squares = graph.train(seeds, *batches, host_rate[part], seed_rate[part])
            losses.append(loss)
            squares.append(segment_squares)
            graphs.append(graph)
        # One copy of all results, because each copy makes the CPU wait for the device.
        # [loss (m,), sum of the rows (m,), squared gradient norms (segments of all chunks,)]
        result = torch.cat([*losses, self.storage.total(members), *squares]).cpu().numpy()
        mean_loss, total, square = np.split(
            result.astype(np.float64), np.cumsum([len(members)] * 2)
        )
        # Scatter the norms to (member, slot, tensor). NaN marks tensors that do not exist, so a
        # gradient that is NaN is reported as infinite.
        num_slots = self.layout.host.num_slots
        norms = np.full(
            (len(self.storage.parameters), num_slots, self.layout.max_seed_tensors), np.nan
        )
        ends = np.cumsum([len(graph.sgd.lengths) for graph in graphs])[:-1]
        for graph, values in zip(graphs, np.split(np.sqrt(square), ends), strict=True):
            own = values[graph.seed_segments]
            norms[graph.segment_at] = np.where(np.isnan(own), np.inf, own)
        return TrainReport(mean_loss, norms[members], np.isfinite(total))

    @torch.inference_mode()
    def evaluate(
        self, members: IntArray, alpha: FloatArray, seeds: Seeds, images: ImageSet
    ) -> Evaluation:
        """Evaluate networks; see `Population.evaluate`."""
        correct, loss = [], []
        # Chunks of members, not of rows: rows of one member share their computation.
        distinct = np.unique(members)
        for start in range(0, len(distinct), self.chunk_size):
            part = distinct[start : start + self.chunk_size]
            rows = np.nonzero(np.isin(members, part))[0]
            graph = EvaluationGraph(self.storage, members[rows], alpha[rows], seeds)
            # Evaluate the split in slices of images that fit the cache, and sum over them.
            per_image = self._feature_bytes * len(part)
            step = max(1, min(len(images), EVALUATION_BYTES // per_image))
            chunk_correct = torch.zeros(len(rows), device=self.device)
            chunk_loss = torch.zeros(len(rows), device=self.device, dtype=torch.float64)
            for first in range(0, len(images), step):
                last = min(first + step, len(images))
                with in_precision(self.precision, self.device):
                    logits = graph.forward(images.normalised(first, last))
                # (slice,) -> (rows, slice), the shape of logits (rows, slice, classes)
                labels = images.labels[first:last].expand(len(rows), -1)
                chunk_correct += (logits.argmax(2) == labels).sum(1)
                chunk_loss += cross_entropy(logits, labels).sum(1, dtype=torch.float64)
            order = torch.from_numpy(rows)
            correct.append((order, chunk_correct))
            loss.append(chunk_loss)
        # One copy of all results, then from chunk order back to the order of `members`.
        stacked = torch.stack([torch.cat([c for _, c in correct]), torch.cat(loss)]).cpu()
        result = np.empty((2, len(members)))
        result[:, np.concatenate([order.numpy() for order, _ in correct])] = stacked.numpy()
        result /= len(images)
        return Evaluation(accuracy=result[0], loss=result[1])

    def _training_graph(self, position: int, members: IntArray, seeds: Seeds) -> TrainingGraph:
        """Return the graph of the chunk at a position, rebuilt if its composition changed."""
        here = [
            array[members]
            for array in (seeds.blueprint, seeds.blend, seeds.is_isolated, seeds.is_frozen)
        ]
        runs = seeds.beta[members] > 0
        key = b"".join(a.tobytes() for a in (members, *here, runs))
        known = self._graphs.get(position)
        if known is None or known[0] != key:
            graph = TrainingGraph(self.storage, members, seeds, self.settings, self.precision)
            self._graphs[position] = known = (key, graph)
        return known[1]
