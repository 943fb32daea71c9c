"""Random numbers for whole arrays of clients at once, from a hash of counters.

`subfleet.core.seeds.generator` costs tens of microseconds to set up, too much
for each of a million clients. Here a key from it is hashed with the client's
number (SplitMix64: Steele, Lea, Flood, OOPSLA 2014), so a draw depends on
(seed, purpose, client, lane) alone, whoever is drawn beside it.
"""

from __future__ import annotations

import numpy as np

from subfleet.core.seeds import generator

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_key(seed: int, purpose: str) -> np.ndarray:
    """A 64-bit key, uint64 [1], for the functions below."""
    return generator(seed, purpose).integers(0, 2**64, size=1, dtype=np.uint64)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hashes(key: np.ndarray, counters: np.ndarray, lanes: int) -> np.ndarray:
    """64 random bits for each counter and lane, uint64 [len(counters), lanes].

    >>> k = stream_key(0, "example")
    >>> both = hashes(k, np.array([3, 9]), 2)
    >>> np.array_equal(both[1:], hashes(k, np.array([9]), 2))
    True
    """
    start = _mix(np.asarray(counters).astype(np.uint64) * _GOLDEN + key)
    lane = np.arange(1, lanes + 1, dtype=np.uint64) * _GOLDEN
    return _mix(start[:, None] + lane)


def uniforms(key: np.ndarray, counters: np.ndarray, lanes: int) -> np.ndarray:
    """Numbers in (0, 1), never 0 or 1, float64 [len(counters), lanes]."""
    return ((hashes(key, counters, lanes) >> np.uint64(12)) + 0.5) * 2.0**-52


def nearly_normal(uniform: np.ndarray) -> np.ndarray:
    """Mean 0, variance 1, within +-3.5, from four uniforms on the last axis.

    The sum of uniforms takes no logarithm, so it is the same bits on every CPU.
    """
    total = uniform[..., 0] + uniform[..., 1] + uniform[..., 2] + uniform[..., 3]
    return (total - 2.0) * np.sqrt(3.0)


def row_keys(clients: np.ndarray, offsets: np.ndarray, first: np.ndarray) -> np.ndarray:
    """A counter for each row: (client, number within the client), uint64 [rows].

    `first` is the number of each client's first row. A client may have 2^24 rows.
    """
    sizes = np.diff(offsets)
    number = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - first, sizes)
    return (np.repeat(clients, sizes).astype(np.uint64) << np.uint64(24)) | number.astype(np.uint64)
