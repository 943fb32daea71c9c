"""The split of a client's rows into a train and a test part."""

from __future__ import annotations

import numpy as np

from subfleet.datasets.draws import hashes, stream_key
from subfleet.datasets.federation import offsets_of, train_sizes


def seeded_split(seed: int, offsets: np.ndarray, group: np.ndarray | None = None) -> np.ndarray:
    """Which rows train, bool [rows]: about 80 % of each client's, drawn from the seed.

    `offsets` int64 [clients + 1] says where clients start. Rows of one client
    with equal `group` (int [rows], numbered within the client) are repeats of
    each other and stay together; without `group` every row stands alone. Of a
    client with two groups or more each part gets one at least; a client with one
    only trains. A group that lies across the cut goes where its middle is.

    >>> side = seeded_split(0, np.array([0, 10, 12]))
    >>> int(side[:10].sum()), int(side[10:].sum())
    (8, 1)
    """
    sizes = np.diff(offsets)
    rows = int(offsets[-1])
    client = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(rows) - np.repeat(offsets[:-1], sizes)
    group = within if group is None else np.asarray(group, dtype=np.int64)
    counter = (client.astype(np.uint64) << np.uint64(32)) | group.astype(np.uint64)
    draw = hashes(stream_key(seed, "train or test"), counter, 1)[:, 0]
    # Clients are in order already, so the draw alone orders rows within each.
    order = np.lexsort((group, draw, client))
    ordered = counter[order]
    new = np.ones(rows, dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(new)
    spans = np.diff(np.append(starts, rows))
    owner = client[order[starts]]
    first = starts - offsets[owner]
    last = first + spans
    # For a lone row at place p: 2p + 1 <= 2 * kept, that is p < kept.
    trains = first + last <= 2 * train_sizes(sizes)[owner]
    trains = (trains & (last < sizes[owner])) | (first == 0)
    side = np.empty(rows, dtype=bool)
    side[order] = np.repeat(trains, spans)
    return side


def leaf_split(
    seed: int, offsets: np.ndarray, group: np.ndarray, from_test: np.ndarray
) -> np.ndarray:
    """LEAF's own parts, bool [rows], with repeats on one side.

    A test row that repeats a train row of the same client trains. A client that
    is left without a train or a test part is split by `seeded_split` instead.
    """
    sizes = np.diff(offsets)
    client = np.repeat(np.arange(len(sizes)), sizes)
    # Groups are numbered by their first row, so this is a row number.
    leader = np.repeat(offsets[:-1], sizes) + group
    in_train = np.zeros(int(offsets[-1]), dtype=bool)
    in_train[leader[~from_test]] = True
    side = in_train[leader]
    count = np.bincount(client[side], minlength=len(sizes))
    partless = (count == 0) | (count == sizes)
    return np.where(partless[client], seeded_split(seed, offsets, group), side)


def side_sizes(side: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """How many rows of each client train, int64 [clients]."""
    before = offsets_of(side.astype(np.int64))
    return before[offsets[1:]] - before[offsets[:-1]]
