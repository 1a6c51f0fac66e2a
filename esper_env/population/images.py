"""Labelled images that stay on the device, and batches of them by index. No loader."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def batches(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Gather batches for several members.

        Args:
            indices: Which image each member sees. (batches, batch_size, m) int64.

        Returns:
            Features (batches, batch_size, height, width, m * channels) float32, contiguous, and
            labels (batches, m, batch_size) int64.
        """
        batches, size, m = indices.shape
        _, height, width, channels = self.images.shape
        picked = self.images.index_select(0, indices.reshape(-1))
        # (batches * size, m, height, width, channels) -> (batches * size, height, width, m, ...)
        picked = picked.view(batches * size, m, height, width, channels).permute(0, 2, 3, 1, 4)
        pixels = (picked.contiguous().float() - self.mean) / self.std
        labels = self.labels[indices.permute(0, 2, 1)]
        return pixels.view(batches, size, height, width, m * channels), labels
