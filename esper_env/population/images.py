"""Labelled images that stay on the device, and batches of them by index. No loader."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esper_env.config import BoolArray, IntArray

PADDING = 4
"""Width of the border that a shifted crop may reach into [pixels]."""


@dataclass(frozen=True)
class Draw:
    """Which images a few batches show to each member, and how they are changed."""

    indices: IntArray
    """Positions in the training split. (batches, batch_size, m)."""
    labels: IntArray
    """What each is said to show. (batches, batch_size, m)."""
    shifts: IntArray | None = None
    """See `shifted`; None crops nothing. (batches, batch_size, m, 2) [pixels]."""
    flips: BoolArray | None = None
    """Which are mirrored left to right; None mirrors nothing. (batches, batch_size, m)."""

    def of(self, members: slice | BoolArray) -> Draw:
        """Return the part of some members."""
        return Draw(
            self.indices[:, :, members],
            self.labels[:, :, members],
            None if self.shifts is None else self.shifts[:, :, members],
            None if self.flips is None else self.flips[:, :, members],
        )


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    Attributes:
        images: Raw pixels. (n, height, width, channels) uint8.
        labels: Classes. (n,) int64.
        mean: Per channel, subtracted. (channels,) float32 [raw pixel values].
        std: Per channel, divided by. (channels,) float32 [raw pixel values].
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def to(self, device: torch.device) -> ImageSet:
        """Copy to a device."""
        return ImageSet(*(t.to(device) for t in (self.images, self.labels, self.mean, self.std)))

    def normalised(self, start: int, stop: int) -> Tensor:
        """Return a range of images. (stop - start, channels, height, width) channels-last."""
        pixels = (self.images[start:stop].float() - self.mean) / self.std
        return pixels.permute(0, 3, 1, 2)

    def batches(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Gather batches for several members.

        Returns:
            Features (batches, batch_size, height, width, m * channels) float32, contiguous, and
            labels (batches, m, batch_size) int64.
        """
        device = self.images.device
        batches, size, m = draw.indices.shape
        _, height, width, channels = self.images.shape
        indices = torch.from_numpy(draw.indices.reshape(-1)).to(device)
        picked = self.images.index_select(0, indices)
        if draw.shifts is not None:
            shifts = torch.from_numpy(draw.shifts.reshape(-1, 2)).to(device)
            picked = shifted(picked, shifts)
        if draw.flips is not None:
            flips = torch.from_numpy(draw.flips.reshape(-1)).to(device)
            picked = torch.where(flips[:, None, None, None], picked.flip(2), picked)
        # (batches * size, m, height, width, channels) -> (batches * size, height, width, m, ...)
        picked = picked.view(batches * size, m, height, width, channels).permute(0, 2, 3, 1, 4)
        pixels = (picked.contiguous().float() - self.mean) / self.std
        labels = torch.from_numpy(draw.labels.transpose(0, 2, 1).copy()).to(device)
        return pixels.view(batches, size, height, width, m * channels), labels


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Pad images with zeros and crop them again, each at its own place.

    Args:
        images: (n, height, width, channels) uint8, contiguous.
        shifts: Where in the padded image the crop begins, less the padding. (n, 2) int64: rows and
            columns, from -PADDING to PADDING [pixels].

    Returns:
        (n, height, width, channels) uint8; pixel (y, x) is pixel (y, x) + shift of the image, or 0
        outside it.
    """
    n, height, width, channels = images.shape
    border = (0, 0, PADDING, PADDING, PADDING, PADDING)
    padded = F.pad(images, border)
    # A row of a crop is one run of bytes, so copy runs, not pixels: 15 times faster on a CPU.
    size = width * channels
    runs = padded.view(-1).as_strided((padded.numel() - size + 1, size), (1, 1))
    image = torch.arange(n, device=images.device)[:, None] * padded.shape[1]
    row = image + torch.arange(height, device=images.device) + shifts[:, :1] + PADDING
    start = (row * padded.shape[2] + shifts[:, 1:] + PADDING) * channels
    return runs.index_select(0, start.view(-1)).view(images.shape)
