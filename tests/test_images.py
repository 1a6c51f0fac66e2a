"""Batches by index, with crops and mirror images."""

from __future__ import annotations

import numpy as np
import torch

from esper_env.population.images import PADDING, Draw, ImageSet, shifted


def make_set(count: int = 30, size: int = 6, channels: int = 3) -> ImageSet:
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (count, size, size, channels), dtype=np.uint8)
    labels = rng.integers(0, 10, count)
    mean, std = torch.arange(3.0)[:channels] + 100, torch.arange(3.0)[:channels] + 50
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), mean, std)


def cropped(image: np.ndarray, dy: int, dx: int) -> np.ndarray:  # type: ignore[type-arg]
    """Pad with zeros and crop, pixel by pixel."""
    height, width, _ = image.shape
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y + dy < height and 0 <= x + dx < width:
                out[y, x] = image[y + dy, x + dx]
    return out


def test_every_shift_equals_padding_and_cropping_by_hand() -> None:
    """All 81 places, on a non-square image so that rows and columns cannot be mixed up."""
    rng = np.random.default_rng(1)
    places = [
        (dy, dx) for dy in range(-PADDING, PADDING + 1) for dx in range(-PADDING, PADDING + 1)
    ]
    images = rng.integers(1, 256, (len(places), 7, 10, 3), dtype=np.uint8)
    actual = shifted(torch.from_numpy(images), torch.tensor(places)).numpy()
    for image, result, (dy, dx) in zip(images, actual, places, strict=True):
        np.testing.assert_array_equal(result, cropped(image, dy, dx))


def test_batches_hold_the_drawn_images_shifted_then_mirrored_then_normalised() -> None:
    images = make_set()
    rng = np.random.default_rng(2)
    shape = (2, 5, 3)  # batches, batch_size, members
    draw = Draw(
        indices=rng.integers(0, len(images), shape),
        labels=rng.integers(0, 10, shape),
        shifts=rng.integers(-PADDING, PADDING + 1, (*shape, 2)),
        flips=rng.random(shape) < 0.5,
    )
    assert draw.shifts is not None
    assert draw.flips is not None
    pixels, labels = images.batches(draw)
    assert pixels.shape == (2, 5, 6, 6, 9)
    mean, std = images.mean.numpy(), images.std.numpy()
    for batch, k, member in np.ndindex(shape):
        image = images.images[draw.indices[batch, k, member]].numpy()
        expected = cropped(image, *draw.shifts[batch, k, member])
        if draw.flips[batch, k, member]:
            expected = expected[:, ::-1]
        actual = pixels[batch, k, :, :, 3 * member : 3 * member + 3].numpy()
        np.testing.assert_allclose(actual, (expected - mean) / std, atol=1e-6)
        assert labels[batch, member, k] == draw.labels[batch, k, member]
    part = draw.of(slice(1, 3))
    some, some_labels = images.batches(part)
    torch.testing.assert_close(some, pixels[..., 3:])
    torch.testing.assert_close(some_labels, labels[:, 1:])
