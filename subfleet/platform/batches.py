"""Which rows a client sees in which step: a function of (stream, seed, round, client).

Loop and vmap ask here, so that the way of computing never changes the data order.
"""

from __future__ import annotations

import numpy as np

from subfleet.core import seeds
from subfleet.core.program import Stream


def _passes(
    stream: Stream, rows: np.ndarray, count: int, first: int, seed: int, round: int, client: int
) -> list[np.ndarray]:
    """Row numbers of `count` passes over `rows`, from pass `first` on."""
    if stream.spans_rounds:
        # A pass may begin in one round and end in the next: key each by its own number.
        return [
            seeds.generator(seed, f"pass {number}", client=client).permutation(rows)
            for number in range(first, first + count)
        ]
    generator = seeds.generator(
        seed, "batches", round=round if stream.redraw == "round" else 0, client=client
    )
    return [generator.permutation(rows) for _ in range(count)]


def _rows(stream: Stream, num_samples: int, seed: int, round: int, client: int) -> np.ndarray:
    """The rows of the part that this stream may use."""
    if stream.skip == 0.0 and stream.take == 1.0:
        return np.arange(num_samples)
    # One draw shared by all streams of a client, so that skip/take parts are disjoint.
    draw = seeds.generator(
        seed, "parts", round=round if stream.redraw == "round" else 0, client=client
    ).permutation(num_samples)
    first, last = stream.bounds(num_samples)
    return draw[first:last]


def steps(
    stream: Stream,
    num_samples: int,
    *,
    seed: int,
    round: int,
    client: int,
    min_batch: int = 1,
) -> list[np.ndarray]:
    """Row numbers of each step, in order: int64 arrays of at most `stream.batch` rows.

    Batches of fewer than `min_batch` rows are left out (BatchNorm needs two).

    >>> [len(rows) for rows in steps(Stream(batch=20, epochs=2), 50, seed=1, round=1, client=3)]
    [20, 20, 10, 20, 20, 10]
    """
    if num_samples == 0:
        return []
    rows = _rows(stream, num_samples, seed, round, client)
    size = len(rows) if stream.batch is None else min(stream.batch, len(rows))
    per_pass = -(-len(rows) // size)
    wanted = stream.num_steps(num_samples)
    start = (round - 1) * wanted if stream.spans_rounds else 0
    first_pass = start // per_pass
    passes = _passes(
        stream, rows, -(-(start + wanted) // per_pass) - first_pass, first_pass, seed, round, client
    )
    cut = [order[i : i + size] for order in passes for i in range(0, len(order), size)]
    offset = start - first_pass * per_pass
    return [batch for batch in cut[offset : offset + wanted] if len(batch) >= min_batch]


def count(stream: Stream, num_samples: int, *, round: int, min_batch: int = 1) -> tuple[int, int]:
    """How many batches `steps` gives and how many rows these hold, without drawing any.

    >>> count(Stream(batch=20, epochs=2), 50, round=1)
    (6, 100)
    """
    rows = stream.rows(num_samples)
    if rows == 0:
        return 0, 0
    size = rows if stream.batch is None else min(stream.batch, rows)
    per_pass, rest = -(-rows // size), rows % size or size
    wanted = stream.num_steps(num_samples)
    first = (round - 1) * wanted if stream.spans_rounds else 0
    short = (first + wanted) // per_pass - first // per_pass  # last batches of passes
    full = wanted - short
    found = ((full, size), (short, rest))
    return (
        sum(many for many, each in found if each >= min_batch),
        sum(many * each for many, each in found if each >= min_batch),
    )


def padded(schedules: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The steps of K clients as one array, for clients side by side.

    Returns row numbers int64 [K, S, B], 0 where padded, and weights float32
    [K, S, B], 1 for real rows. S is the largest number of steps, B of rows.

    >>> rows, weights = padded([[np.array([1, 2]), np.array([0])], [np.array([3])]])
    >>> rows.shape, weights.sum(axis=2).tolist()
    ((2, 2, 2), [[2.0, 1.0], [1.0, 0.0]])
    """
    most = max((len(schedule) for schedule in schedules), default=0)
    sizes = np.zeros((len(schedules), most), np.int64)
    for k, schedule in enumerate(schedules):
        sizes[k, : len(schedule)] = [len(batch) for batch in schedule]
    real = np.arange(sizes.max(initial=0)) < sizes[:, :, None]
    rows = np.zeros(real.shape, np.int64)
    if real.any():
        rows[real] = np.concatenate([batch for schedule in schedules for batch in schedule])
    return rows, real.astype(np.float32)
