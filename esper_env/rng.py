"""Counter-based random streams: a number is a pure function of (key, counter).

All members of a population draw at once, without a generator object per member, and a member's
numbers do not depend on who else is in the batch. The only state is the key, so copying or saving
a stream needs nothing but that integer.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from esper_env.jit import shared

KeyArray = npt.NDArray[np.uint64]


class Stream(IntEnum):
    """What the streams of an episode are for."""

    HOST = 0
    DATA = 1
    SEED = 2
    NOISE = 3
    AUGMENT = 4
    INSTANCE = 5


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_11, _SHIFT_27, _SHIFT_30 = np.uint64(11), np.uint64(27), np.uint64(30)
_SHIFT_31, _ONE = np.uint64(31), np.uint64(1)


def make_key(key: npt.ArrayLike, *words: npt.ArrayLike) -> KeyArray:
    """Derive keys of sub-streams.

    Args:
        key: Parent keys or seeds. (n,) unsigned integers.
        words: What the sub-stream is for: numbers or arrays of numbers that broadcast to (n,).

    Returns:
        One key per parent and word. (n,) uint64; n is 1 if all are scalars.
    """
    result: KeyArray = mix(_as_keys(key))
    for word in words:
        result = child_key(result, _as_keys(word))
    return result


def uniform(key: KeyArray, count: int) -> npt.NDArray[np.float64]:
    """Draw the first `count` numbers of each stream, uniform in [0, 1).

    Args:
        key: One key per stream. (n,) uint64.
        count: Numbers per stream.

    Returns:
        (n, count) float64, in steps of 2**-53.
    """
    return uniform_at(key, np.arange(count))


def uniform_at(key: KeyArray, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Draw chosen numbers of each stream, uniform in [0, 1); `uniform` draws the first ones.

    Args:
        key: One key per stream. (n,) uint64.
        index: Positions in each stream, or in all of them. (n, count) or (count,).

    Returns:
        (n, count) float64, in steps of 2**-53.
    """
    numbers: npt.NDArray[np.float64] = number_at(key[:, None], index.astype(np.uint64))
    return numbers


@shared
def child_key(key: Any, word: Any) -> Any:
    """Derive a key from a mixed one, as `make_key` does for each word; uint64 arrays or numbers."""
    return mix(key + mix(word + _GOLDEN))


@shared
def number_at(key: Any, index: Any) -> Any:
    """Draw the number at a position of a stream; key and index uint64, arrays or numbers."""
    bits = mix(key + (index + _ONE) * _GOLDEN)
    return (bits >> _SHIFT_11) * 2.0**-53


@shared
def mix(z: Any) -> Any:
    """Finaliser of SplitMix64. Source: Steele, Lea, Flood (2014), figure 16, variant 13."""
    z = (z ^ (z >> _SHIFT_30)) * _MIX_1
    z = (z ^ (z >> _SHIFT_27)) * _MIX_2
    return z ^ (z >> _SHIFT_31)


def _as_keys(values: npt.ArrayLike) -> KeyArray:
    """Return at least one-dimensional uint64: arrays wrap around in silence, scalars warn."""
    return np.atleast_1d(np.asarray(values, dtype=np.uint64))
