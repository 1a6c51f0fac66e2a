"""Counter-based random streams: each number is a pure function of a key and a counter.

One call samples for all members of a population, without a generator object per member. Numbers of
a member do not depend on the other members in the batch. The key is the only state of a stream, so
copying or saving a stream means copying one integer.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_env.jit import shared

KeyArray = npt.NDArray[np.uint64]


class Stream(IntEnum):
    """Random streams of an episode."""

    HOST = 0
    """Initial weights of the host."""
    DATA = 1
    """Indices of training images."""
    SEED = 2
    """Initial weights of seeds."""
    NOISE = 3
    """Label noise."""
    AUGMENT = 4
    """Crops and mirror images."""
    INSTANCE = 5
    """Choice of the instance."""
    REGIME = 6
    """Kinds of problems of an episode, and when they change."""


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_11, _SHIFT_27, _SHIFT_30 = np.uint64(11), np.uint64(27), np.uint64(30)
_SHIFT_31, _ONE = np.uint64(31), np.uint64(1)


def make_key(key: npt.ArrayLike, *words: npt.ArrayLike) -> KeyArray:
    """Derive the keys of sub-streams.

    Args:
        key: Parent keys or seeds. (n,) unsigned integers.
        words: Identifiers of the sub-stream: integers or arrays of them that broadcast to (n,).

    Returns:
        One key per parent. (n,) uint64; n is 1 if all arguments are scalars.
    """
    result: KeyArray = mix(_as_keys(key))
    for word in words:
        result = child_key(result, _as_keys(word))
    return result


def uniform(key: KeyArray, count: int) -> npt.NDArray[np.float64]:
    """Return the first `count` numbers of each stream, uniform in [0, 1).

    Args:
        key: One key per stream. (n,) uint64.
        count: Numbers per stream.

    Returns:
        Multiples of 2**-53. (n, count) float64.
    """
    return uniform_at(key, np.arange(count))


def uniform_at(key: KeyArray, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the numbers at given positions of each stream, uniform in [0, 1).

    Args:
        key: One key per stream. (n,) uint64.
        index: Positions in each stream, or the same in all streams. (n, count) or (count,).

    Returns:
        Multiples of 2**-53. (n, count) float64.
    """
    numbers: npt.NDArray[np.float64] = number_at(key[:, None], index.astype(np.uint64))
    return numbers


@shared
def child_key(key: Any, word: Any) -> Any:
    """Derive a key from a mixed key, as `make_key` does for a word. Arrays or scalars, uint64."""
    return mix(key + mix(word + _GOLDEN))


@shared
def number_at(key: Any, index: Any) -> Any:
    """Return the number at a position of a stream, in [0, 1). Arrays or scalars, uint64."""
    bits = mix(key + (index + _ONE) * _GOLDEN)
    return (bits >> _SHIFT_11) * 2.0**-53


@shared
def mix(z: Any) -> Any:
    """Apply the finalizer of SplitMix64. Source: Steele et al. (2014), figure 16, variant 13."""
    z = (z ^ (z >> _SHIFT_30)) * _MIX_1
    z = (z ^ (z >> _SHIFT_27)) * _MIX_2
    return z ^ (z >> _SHIFT_31)


def _as_keys(values: npt.ArrayLike) -> KeyArray:
    """Convert to a uint64 array of at least one dimension: NumPy warns of overflow in scalars."""
    return np.atleast_1d(np.asarray(values, dtype=np.uint64))
