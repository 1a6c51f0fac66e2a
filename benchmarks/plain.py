"""Hosts with seeds as ordinary `torch.nn` networks, trained one after the other.

These networks are the reference for the population engine: tests compare results with them, and the
throughput benchmark compares speed. They share no forward code with `esper_env.population`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper_env.config import Blend
from esper_env.population.hosts import Host
from esper_env.population.population import Population


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: x * tanh(W2 silu(W1 pool(x)))."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel by a function of all pooled channels."""
        scale = torch.tanh(self.excite(F.silu(self.squeeze(x.mean((2, 3))))))
        return x * scale[:, :, None, None]


def build_branch(name: str, c: int) -> nn.Module:
    """Return the residual branch of a blueprint for `c` channels."""
    inner = max(2, c // 2)
    match name:
        case "norm":
            return nn.BatchNorm2d(c)
        case "attention":
            return SqueezeExcite(c, max(4, c // 4))
        case "conv_small":
            return nn.Conv2d(c, c, 1)
        case "bottleneck":
            return nn.Sequential(
                nn.Conv2d(c, inner, 1, bias=False),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.Conv2d(inner, inner, 3, padding=1, bias=False),
                nn.BatchNorm2d(inner),
                nn.ReLU(),
                nn.Conv2d(inner, c, 1),
            )
        case "depthwise":
            return nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1, groups=c, bias=False),
                nn.BatchNorm2d(c),
                nn.ReLU(),
                nn.Conv2d(c, c, 1),
            )
        case "conv_light":
            return nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1, bias=False),
                nn.BatchNorm2d(c),
                nn.ReLU(),
                nn.Conv2d(c, c, 1),
            )
        case "conv_heavy":
            return nn.Sequential(
                nn.Conv2d(c, 4 * c, 3, padding=1, bias=False),
                nn.BatchNorm2d(4 * c),
                nn.ReLU(),
                nn.Conv2d(4 * c, c, 3, padding=1),
            )
    raise ValueError(f"no plain network for blueprint {name!r}")


class PlainSeed(nn.Module):
    """Seed module in a slot; its output is defined in `docs/environment.md`, "Description"."""

    def __init__(self, name: str, channels: int, blend: int) -> None:
        super().__init__()
        self.branch = build_branch(name, channels)
        self.gate = nn.Linear(channels, 1) if blend == Blend.GATE else None
        self.blend = blend
        self.alpha = 0.0
        self.is_training_stage = True
        self.is_isolated = True

    def forward(self, h: Tensor) -> Tensor:
        """Mix the residual branch into the features."""
        x = h.detach() if self.is_isolated else h
        residual = self.branch(x)
        if self.blend == Blend.GATE:
            assert self.gate is not None
            residual = torch.sigmoid(self.gate(x.mean((2, 3))))[:, :, None, None] * residual
        elif self.blend == Blend.MULTIPLY:
            factor = h.detach() if self.is_training_stage else h
            residual = factor * torch.tanh(residual)
        if self.is_training_stage:
            return h + (residual - residual.detach())
        return h + self.alpha * residual


class PlainNetwork(nn.Module):
    """One host with its seeds.

    A narrow network copies the leading corner of a member's tensors.
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        blocks = []
        before = host.in_channels
        for channels in host.channels:
            conv = nn.Conv2d(
                before, channels, host.kernel_size, padding=host.kernel_size // 2, bias=False
            )
            blocks.append(nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()))
            before = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(before, host.num_classes)
        self.seeds = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of a batch. (batch, classes)."""
        for slot, block in enumerate(self.blocks):
            x = block(x)
            if str(slot) in self.seeds:
                x = self.seeds[str(slot)](x)
            x = F.max_pool2d(x, 2)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def modules_to_clip(self) -> list[list[nn.Parameter]]:
        """Return the parameters of the host, followed by those of each seed."""
        seeds = [list(seed.parameters()) for seed in self.seeds.values()]
        return [[*self.blocks.parameters(), *self.head.parameters()], *seeds]

    def optimizer(self, host_rate: float, seed_rate: float, decay: float) -> torch.optim.SGD:
        """Return SGD for the host and the seeds."""
        host, *seeds = self.modules_to_clip()
        groups = [{"params": host, "lr": host_rate, "weight_decay": decay}]
        groups += [{"params": seed, "lr": seed_rate, "weight_decay": 0.0} for seed in seeds]
        return torch.optim.SGD(groups, momentum=0.9, foreach=True)

    def add_seed(
        self, population: Population, member: int, slot: int, index: int, blend: int
    ) -> PlainSeed:
        """Copy a member's seed into a slot."""
        blueprint = population.layout.blueprints[index]
        seed = PlainSeed(blueprint.name, self.host.channels[slot], blend)
        parameters, buffers = population.layout.seed_columns(slot, index)
        _copy(population.storage.parameters[member], parameters, [*seed.parameters()])
        _copy(population.storage.buffers[member], buffers, _running(seed))
        self.seeds[str(slot)] = seed
        return seed

    def load_host(self, population: Population, member: int) -> None:
        """Copy the host of a member."""
        parameters, buffers = population.layout.host_columns()
        _copy(population.storage.parameters[member], parameters, self.modules_to_clip()[0])
        _copy(population.storage.buffers[member], buffers, _running(self.blocks))


def _running(module: nn.Module) -> list[Tensor]:
    return [b for b in module.buffers() if b.dtype == torch.float32]


def _copy(row: Tensor, columns: list, targets: list) -> None:  # type: ignore[type-arg]
    """Copy the tensors of a row into `targets`, in order."""
    with torch.no_grad():
        for column, target in zip(columns, targets, strict=False):
            spec = column.spec
            values = row[column.offset : column.offset + spec.size]
            corner = tuple(slice(n) for n in target.shape[-len(spec.shape) :])
            target.copy_(values.view(spec.shape)[corner].reshape(target.shape))


def train_batch(
    network: PlainNetwork, optimizer: torch.optim.SGD, images: Tensor, labels: Tensor, clip: float
) -> Tensor:
    """Train on one batch and return the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    for parameters in network.modules_to_clip():
        nn.utils.clip_grad_norm_(parameters, clip, foreach=True)
    optimizer.step()
    return loss.detach()
