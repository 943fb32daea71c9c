"""Clients' rows as Arrow tables, the form in which they travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from subfleet.datasets.federation import Block, Federation, offsets_of


class Upcoming(NamedTuple):
    """What a round will read: its cohort, in the order in which the rows shall lie."""

    ids: np.ndarray  # int64 [clients]
    parts: tuple[str, ...]


def to_table(data: Federation, ids: np.ndarray, part: str) -> pa.Table:
    """The rows of one part of clients, client after client: x, y and client (both int64).

    x is a fixed-size list, handed over as `data.block` made it, without a copy.
    """
    block = data.block(ids, part)
    width = int(np.prod(data.input_shape))
    flat = pa.array(np.ascontiguousarray(block.x).reshape(-1))
    return pa.table(
        {
            "x": pa.FixedSizeListArray.from_arrays(flat, width),
            "y": pa.array(block.y),
            "client": pa.array(np.repeat(ids, np.diff(block.offsets))),
        }
    )


def to_block(tables: Sequence[pa.Table], ids: np.ndarray, input_shape: tuple[int, ...]) -> Block:
    """The rows of `ids`, in their order, out of tables that hold each client in one piece.

    A client that no table has gets no rows. Where the clients lie side by side in
    one table, x and y are views of it; they may be read-only.
    """
    columns = [_arrays(table, input_shape) for table in tables]
    starts = offsets_of(np.array([len(client) for _, _, client in columns]))
    first, size = _spans(np.concatenate([client for _, _, client in columns]), ids)
    offsets = offsets_of(size)
    held = np.flatnonzero(size)
    which = np.searchsorted(starts, first[held], side="right") - 1
    low, high = first[held] - starts[which], first[held] + size[held] - starts[which]
    if len(held) and (which == which[0]).all() and np.array_equal(low[1:], high[:-1]):
        x, y, _ = columns[which[0]]
        return Block(x[low[0] : high[-1]], y[low[0] : high[-1]], offsets)
    pieces = [slice(a, b) for a, b in zip(low, high, strict=True)]
    found = [columns[w][:2] for w in which]
    x = [columns[0][0][:0], *(x[piece] for (x, _), piece in zip(found, pieces, strict=True))]
    y = [columns[0][1][:0], *(y[piece] for (_, y), piece in zip(found, pieces, strict=True))]
    return Block(np.concatenate(x), np.concatenate(y), offsets)


def _arrays(table: pa.Table, input_shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The x [rows, *input_shape], y and client of a table, as views where it is of one chunk."""
    chunked = [table.column(name) for name in ("x", "y", "client")]
    x, y, client = (c.chunk(0) if c.num_chunks == 1 else c.combine_chunks() for c in chunked)
    return x.flatten().to_numpy().reshape(-1, *input_shape), y.to_numpy(), client.to_numpy()


def _spans(client: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `ids` starts in `client`, and how many rows it has there, int64 both."""
    starts = np.flatnonzero(np.diff(client, prepend=-1))
    owner, sizes = client[starts], np.diff(np.append(starts, len(client)))
    order = np.argsort(owner)
    place = np.searchsorted(owner, ids, sorter=order)
    found = np.zeros(len(ids), bool)
    inside = place < len(owner)
    at = order[place[inside]]
    found[inside] = owner[at] == ids[inside]
    first, size = np.zeros(len(ids), np.int64), np.zeros(len(ids), np.int64)
    here = order[place[found]]
    first[found], size[found] = starts[here], sizes[here]
    return first, size
