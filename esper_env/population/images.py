"""Labeled images on the device, and batches gathered by index. There is no data loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from esper_env.config import BoolArray, IntArray

PADDING = 4
"""Width of the zero border around an image before it is cropped [pixels]."""


class Draw(NamedTuple):
    """Samples of some batches for each of m members, and their augmentation."""

    indices: IntArray
    """Indices into the split. (batches, batch_size, m) int64."""
    labels: IntArray
    """Labels, some of them wrong if there is noise. A member with fewer batches than others has
    labels of -1 in the last ones. (batches, batch_size, m) int64."""
    shifts: IntArray | None = None
    """Crop offsets as in `shifted`, None for no crops. (batches, batch_size, m, 2) [pixels]."""
    flips: BoolArray | None = None
    """Whether an image is mirrored left to right; None for no. (batches, batch_size, m)."""

    def of(self, members: slice | BoolArray) -> Draw:
        """Return the samples of some members. The mask is (m,) bool."""
        parts: list[Any] = [None if array is None else array[:, :, members] for array in self]
        return Draw(*parts)


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    Attributes:
        images: Raw pixels. (n, height, width, channels) uint8.
        labels: Classes. (n,) int64.
        mean: Mean of each channel over the training split. (channels,) float32 [pixel values].
        std: Standard deviation of each channel. (channels,) float32 [pixel values].
    """

    images: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def to(self, device: torch.device) -> ImageSet:
        """Return a copy on a device."""
        return ImageSet(*(t.to(device) for t in (self.images, self.labels, self.mean, self.std)))

    def normalized(self, start: int, stop: int) -> Tensor:
        """Return the normalized images from `start` to `stop`.

        Returns:
            (stop - start, channels, height, width) float32, channels-last in memory.
        """
        pixels = (self.images[start:stop].float() - self.mean) / self.std
        return pixels.permute(0, 3, 1, 2)

    def batches(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Gather and normalize batches of m members.

        Returns:
            Images (batches, batch_size, height, width, m * channels) float32, contiguous, and
            labels (batches, m, batch_size) int64.
        """
        device = self.images.device
        batches, size, m = draw.indices.shape
        _, height, width, channels = self.images.shape
        # Gather and augment as uint8, which moves a quarter of the bytes of float32.
        # (batches, size, m) -> (batches * size * m, height, width, channels)
        indices = torch.from_numpy(draw.indices.reshape(-1)).to(device)
        picked = self.images.index_select(0, indices)
        if draw.shifts is not None:
            shifts = torch.from_numpy(draw.shifts.reshape(-1, 2)).to(device)
            picked = shifted(picked, shifts)
        if draw.flips is not None:
            flips = torch.from_numpy(draw.flips.reshape(-1)).to(device)
            picked = torch.where(flips[:, None, None, None], picked.flip(2), picked)
        # (batches * size, m, height, width, channels)
        # -> (batches * size, height, width, m, channels): members become groups of channels
        picked = picked.view(batches * size, m, height, width, channels).permute(0, 2, 3, 1, 4)
        pixels = (picked.contiguous().float() - self.mean) / self.std
        labels = torch.from_numpy(draw.labels.transpose(0, 2, 1).copy()).to(device)
        return pixels.view(batches, size, height, width, m * channels), labels


def shifted(images: Tensor, shifts: Tensor) -> Tensor:
    """Pad images with zeros and crop each at its own offset.

    Args:
        images: Images. (n, height, width, channels) uint8, contiguous.
        shifts: Row and column offset of each crop, -PADDING to PADDING [pixels]. (n, 2) int64.

    Returns:
        Cropped images, whose pixel (y, x) is pixel (y, x) + shift of the image, or 0 outside of it.
        (n, height, width, channels) uint8.
    """
    n, height, width, channels = images.shape
    border = (0, 0, PADDING, PADDING, PADDING, PADDING)
    padded = F.pad(images, border)
    # Each row of a crop is one contiguous run of bytes. Copying runs instead of pixels is 15 times
    # faster on a CPU. `runs` is a view with one row for each byte at which a run can start.
    size = width * channels
    runs = padded.view(-1).as_strided((padded.numel() - size + 1, size), (1, 1))
    # First row of each padded image (n, 1), row of each run (n, height), first byte of each run.
    image = torch.arange(n, device=images.device)[:, None] * padded.shape[1]
    row = image + torch.arange(height, device=images.device) + shifts[:, :1] + PADDING
    start = (row * padded.shape[2] + shifts[:, 1:] + PADDING) * channels
    return runs.index_select(0, start.view(-1)).view(images.shape)
