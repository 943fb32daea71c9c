"""`traces/`: what the clients' programs wrote about their own work, a Parquet file a round.

A file is there only where a client of the round returned a trace. Its columns are `round`
and `client`, then those of the traces; rows are in order of client, then as returned.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from subfleet.core.errors import InputError
from subfleet.platform.files import sync_folder, write_atomic

Trace = Mapping[str, np.ndarray]

_KEYS = pa.schema([("round", pa.int32()), ("client", pa.int64())])
_FILE = re.compile(r"round-(\d+)\.parquet")


class TraceFiles:
    """The traces of a run in their folder, which comes with the first of them."""

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)

    def write(self, round: int, traces: Sequence[Mapping[int, Trace]]) -> None:
        """Write a round's traces, by client, in parts of any order; nothing where there are none.

        What a client's trace has no column for is null. Raises `InputError` where clients give a
        column values that do not go together.
        """
        by_client = {client: trace for part in traces for client, trace in part.items()}
        if not by_client:
            return
        path = self.folder / f"round-{round:06d}.parquet"
        tables = [_rows(round, client, by_client[client]) for client in sorted(by_client)]
        buffer = pa.BufferOutputStream()
        pq.write_table(_joined(tables, f"the traces of round {round}"), buffer, compression="zstd")
        if not self.folder.is_dir():
            self.folder.mkdir()
            sync_folder(self.folder.parent)
        write_atomic(path, buffer.getvalue().to_pybytes())

    def _files(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        found = ((_FILE.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match)

    def truncate(self, after_round: int) -> None:
        """Drop the files of all rounds beyond `after_round`."""
        beyond = [path for round, path in self._files() if round > after_round]
        for path in beyond:
            path.unlink()
        if beyond:
            sync_folder(self.folder)

    def read(self) -> pa.Table:
        """All rows, in order of (round, client, row); without rows where there are no files.

        Raises `InputError` where rounds give a column values that do not go together.
        """
        return _joined([pq.read_table(path) for _, path in self._files()], str(self.folder))


def _rows(round: int, client: int, trace: Trace) -> pa.Table:
    count = len(next(iter(trace.values())))
    keys = [np.full(count, round), np.full(count, client)]
    fixed = [pa.array(key, type) for key, type in zip(keys, _KEYS.types, strict=True)]
    told = [pa.array(column) for column in trace.values()]
    return pa.table([*fixed, *told], [*_KEYS.names, *trace])


def _joined(tables: Sequence[pa.Table], where: str) -> pa.Table:
    """The rows of all, with the columns of all; whole numbers give way to others."""
    try:
        return pa.concat_tables([_KEYS.empty_table(), *tables], promote_options="permissive")
    except pa.ArrowTypeError as error:
        kinds: dict[str, set[str]] = {}
        for table in tables:
            for field in table.schema:
                kinds.setdefault(field.name, set()).add(str(field.type))
        mixed = {name: sorted(types) for name, types in kinds.items() if len(types) > 1}
        said = "; ".join(f"column {name!r} is {' and '.join(t)}" for name, t in mixed.items())
        raise InputError(
            f"{where}: {said}; give each column numbers alone or strings alone in all clients and "
            "rounds, or read the files one by one"
        ) from error
