"""Golomb-Rice code of sparse vectors: gaps between non-zeros, their signs, their magnitudes.

The non-zeros of a random vector lie geometrically far apart, for which Golomb's is the
best code that spends whole bits on a gap. As in Sattler et al., "Robust and
Communication-Efficient Federated Learning from Non-i.i.d. Data", 2020 (Algorithms 3 and 4).

    k          uint32   number of non-zeros
    b*         uint8    bits of a gap's remainder
    mu         float32  the magnitude of all, or k magnitudes
    k words    of 1...1 0 (the quotient), b* bits (the remainder), 1 bit (1 is +, 0 is -)

All numbers are little-endian, bits fill bytes from the highest, and the last byte is
filled up with zeros. A vector without zeros needs no gaps: its words are the signs.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

from subfleet.core.errors import InputError

_HEAD = struct.Struct("<IB")  # k and b*
_GOLDEN = (1 + math.sqrt(5)) / 2


@dataclass(frozen=True, eq=False)
class Sparse:
    """A vector of `size` entries that is 0 but at `positions`, which increase.

    Its k non-zeros are `magnitude` with a sign: one magnitude for all, or one for each.
    """

    size: int
    positions: np.ndarray  # int64 [k]
    negative: np.ndarray  # bool [k]
    magnitude: np.ndarray  # float32 [1] or [k]

    def dense(self) -> np.ndarray:
        """The vector itself, float32 [size]."""
        vector = np.zeros(self.size, np.float32)
        vector[self.positions] = np.where(self.negative, -self.magnitude, self.magnitude)
        return vector


def rice_bits(p: float) -> int:
    """b*: the best number of remainder bits where a fraction p in (0, 1) is not zero.

    b* = max(0, 1 + floor(log2(ln(phi - 1) / ln(1 - p)))), phi the golden ratio.

    >>> [rice_bits(p) for p in (0.25, 0.1, 0.01, 1 / 400, 0.001)]
    [1, 3, 6, 8, 9]
    """
    return max(0, 1 + math.floor(math.log2(math.log(_GOLDEN - 1) / math.log1p(-p))))


def position_bits(p: float) -> float:
    """Bits that the place of a non-zero takes on average: b* + 1 / (1 - (1 - p)^(2^b*)).

    >>> round(position_bits(0.01), 3)
    8.108
    """
    bits = rice_bits(p)
    return bits + 1 / (1 - (1 - p) ** 2**bits)


def encode(sparse: Sparse) -> bytes:
    """The code of a vector: ceil(bits / 8) + 9 bytes with one magnitude for all."""
    k = len(sparse.positions)
    rice = rice_bits(k / sparse.size) if 0 < k < sparse.size else 0
    signs = ~sparse.negative
    bits = signs if k == sparse.size else _words(sparse.positions, signs, rice)
    magnitude = sparse.magnitude.astype("<f4").tobytes()
    return _HEAD.pack(k, rice) + magnitude + np.packbits(bits).tobytes()


def most_bytes(size: int, k: int, *, ternary: bool = True) -> int:
    """The length of the longest code of a vector of `size` entries, of which k are not zero.

    >>> most_bytes(1_000, 10)
    21
    """
    rice = rice_bits(k / size) if 0 < k < size else 0
    # The quotients together are at most that of all gaps, which hold the zeros before a non-zero.
    bits = k if k == size else k * (rice + 2) + ((size - k) >> rice)
    return _HEAD.size + 4 * (1 if ternary else k) + -(-bits // 8)


def decode(code: bytes, size: int, *, ternary: bool = True) -> Sparse:
    """The vector of `size` entries that a code holds; `ternary` where it has one magnitude.

    Raises `InputError` for bytes that are no such code.
    """
    try:
        k, rice = _HEAD.unpack_from(code)
        count = 1 if ternary else k
        magnitude = np.frombuffer(code, "<f4", count, _HEAD.size).astype(np.float32)
    except (struct.error, ValueError):
        raise _not_a_code(code, size) from None
    if k > size:
        raise _not_a_code(code, size)
    payload = np.frombuffer(code, np.uint8, offset=_HEAD.size + 4 * count)
    bits = np.unpackbits(payload)
    if k == size:
        positions, signs, end = np.arange(size), bits[:k], k
    else:
        positions, signs, end = _read_words(bits, k, rice)
    ordered = len(positions) == k and (np.diff(positions, append=size) > 0).all()
    if len(payload) != -(-end // 8) or not ordered:
        raise _not_a_code(code, size)
    return Sparse(size, positions, signs == 0, magnitude)


def _words(positions: np.ndarray, signs: np.ndarray, rice: int) -> np.ndarray:
    """The bits of all words, one after the other: uint8 of 0 and 1."""
    gaps = np.diff(positions, prepend=-1) - 1  # d - 1, d >= 1
    ends = np.cumsum((gaps >> rice) + rice + 2)  # where each word's last bit is, + 1
    bits = np.ones(ends[-1] if len(ends) else 0, np.uint8)
    bits[ends - rice - 2] = 0
    for i in range(rice):
        bits[ends - 2 - i] = (gaps >> i) & 1
    bits[ends - 1] = signs
    return bits


def _read_words(bits: np.ndarray, k: int, rice: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Positions and signs of k words, and the number of bits they take.

    Where the bits do not hold k words, the positions are too few or do not increase, or
    the number is larger than there are bits.
    """
    # A word's quotient ends at the first 0 of the word, and the next word begins rice + 2 bits
    # on. So each 0 names the 0 that would end the next quotient. Doubling the steps at once
    # finds all k of them in log2(k) passes.
    zeros = np.flatnonzero(bits == 0)
    before = np.cumsum(bits == 0)  # zeros up to and with each bit
    following = zeros + rice + 1
    jump = before[np.minimum(following, len(bits) - 1)] if len(zeros) else zeros
    jump = np.minimum(jump, len(zeros) - 1)
    order = np.zeros(min(1, k, len(zeros)), np.int64)
    while 0 < len(order) < k:
        order = np.concatenate([order, jump[order]])[:k]
        jump = jump[jump]
    ends = zeros[order]
    if not len(ends):
        return ends, ends, 0
    total = int(ends[-1]) + rice + 2
    if total > len(bits):
        return ends, ends, total
    starts = np.concatenate([[0], ends[:-1] + rice + 2])
    gaps = ends - starts
    for i in range(rice):
        gaps = (gaps << 1) | bits[ends + 1 + i]
    return np.cumsum(gaps + 1) - 1, bits[ends + rice + 1], total


def _not_a_code(code: bytes, size: int) -> InputError:
    return InputError(
        f"{len(code)} bytes are no code of {size} entries; decode a vector with the size and the "
        "kind of magnitudes that it was encoded with"
    )
