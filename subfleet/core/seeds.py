"""All randomness, derived from (seed, round, client, purpose) and nothing else.

Outside a training step, `generator` gives a NumPy generator that is the same
whatever host asks for it. Inside a step that may be mapped over clients,
compiled or moved to a GPU, `uniform` hashes a counter in integer arithmetic, so
that loop, vmap and CUDA see the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor

_MASK = 0xFFFFFFFF


def _words(seed: int, round: int, client: int, purpose: str) -> np.ndarray:
    text = f"{seed}/{round}/{client}/{purpose}".encode()
    return np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), dtype=np.uint64)


class _Key(ISeedSequence):
    """Hands Philox its key. Given `key=` instead, it would ask the system for entropy first."""

    def __init__(self, words: np.ndarray):
        self._words = words

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        """Philox asks for two words of 64 bits."""
        assert n_words == 2 and dtype is np.uint64
        return self._words


def generator(seed: int, purpose: str, *, round: int = 0, client: int = -1) -> np.random.Generator:
    """A generator for one purpose; equal arguments give equal streams anywhere.

    >>> a = generator(7, "batches", round=3, client=12).random()
    >>> a == generator(7, "batches", round=3, client=12).random()
    True
    >>> a == generator(7, "batches", round=4, client=12).random()
    False
    """
    key: Any = _Key(_words(seed, round, client, purpose))
    return np.random.Generator(np.random.Philox(key))


def key(seed: int, purpose: str, *, round: int = 0, client: int = -1) -> int:
    """A 31-bit key for `uniform`."""
    return int(_words(seed, round, client, purpose)[0] & 0x7FFFFFFF)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (the `lowbias32` constants), held in int64 lanes."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    # The second constant exceeds 31 bits; the product stays below 2^63 since x < 2^32 / 2.
    x = ((x & 0xFFFF) * 0x846CA68B + ((((x >> 16) * 0x846CA68B) & _MASK) << 16)) & _MASK
    return x ^ (x >> 16)


def uniform(key: Tensor, shape: tuple[int, ...], *, salt: int = 0) -> Tensor:
    """Numbers in (0, 1), float32, from a key alone.

    `key` is an int64 scalar tensor and may be batched by `torch.func.vmap`; the
    draw is a pure function of (key, salt, position), 23 bits each, never 0 or 1.

    >>> k = torch.tensor(5)
    >>> torch.equal(uniform(k, (3,)), uniform(k, (3,)))
    True
    """
    count = 1
    for extent in shape:
        count *= extent
    position = torch.arange(count, dtype=torch.int64, device=key.device)
    start = _mix((key & 0x7FFFFFFF) ^ (salt * 0x9E3779B1 & 0x7FFFFFFF))
    bits = _mix((position * 0x9E3779B1 + start) & _MASK)
    return ((bits >> 9).to(torch.float32) + 0.5).mul(2.0**-23).reshape(shape)
