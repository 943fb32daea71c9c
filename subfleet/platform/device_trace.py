"""Traces of devices: a CSV or Parquet file with a row a client, or with rows to deal to clients.

Columns are called as the keys of `[fleet.device]` (`subfleet.core.device.KEYS`), one number a
row. `available` holds windows as text, "0-28800 79200-86400"; a row without any is of a client
that is never there. With a column `client` a row is that client's, else the seed deals them.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from subfleet.core.device import KEYS, Window, windows
from subfleet.core.errors import InputError, did_you_mean

COLUMNS = ("client", *KEYS, "available")


@dataclass(frozen=True, eq=False)
class Trace:
    """The columns of a trace file, R rows."""

    path: str
    sha256: str
    numbers: dict[str, np.ndarray]  # float64 [R] each
    windows: tuple[np.ndarray, np.ndarray] | None  # begins and lengths, float64 [R, W] both
    client: np.ndarray | None  # int64 [R], increasing; None where rows are dealt

    @property
    def rows(self) -> int:
        """R."""
        columns = [*self.numbers.values(), *(self.windows or ())[:1]]
        return len(columns[0])

    @classmethod
    def read(cls, path: str, period_s: float) -> Trace:
        """Reads a file whose windows repeat every `period_s` seconds.

        Raises `InputError` that names the file and where it can the row, the column, the value
        and the remedy.
        """
        file = Path(path).expanduser()
        try:
            raw = file.read_bytes()
            table = _parquet(file) if file.suffix == ".parquet" else _csv(file)
        except FileNotFoundError:
            raise InputError(f"trace {path}: no such file; give a CSV or Parquet file") from None
        except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowInvalid) as error:
            raise InputError(
                f"trace {path}: cannot be read as {file.suffix[1:] or 'CSV'} ({error}); give a CSV "
                "file with a header, or a .parquet file"
            ) from None
        _check_header(path, table)
        numbers = {n: table.numbers(path, n) for n in table.columns if n in KEYS}
        spans = table.columns.get("available")
        found = cls(
            path=path,
            sha256=hashlib.sha256(raw).hexdigest(),
            numbers=numbers,
            windows=None if spans is None else _windows(path, table, period_s),
            client=None,
        )
        return found._by_client(table) if "client" in table.columns else found

    def _by_client(self, table: _Table) -> Trace:
        ids = table.numbers(self.path, "client")
        order = np.argsort(ids, kind="stable")
        ids = ids[order].astype(np.int64)
        if len(twice := np.flatnonzero(np.diff(ids) == 0)):
            row = table.where(int(order[twice[0] + 1]))
            raise InputError(
                f"trace {self.path}: {row}: client = {ids[twice[0]]} has a row already; give each "
                "client one row"
            )
        return Trace(
            path=self.path,
            sha256=self.sha256,
            numbers={name: column[order] for name, column in self.numbers.items()},
            windows=None if self.windows is None else tuple(w[order] for w in self.windows),  # type: ignore[arg-type]
            client=ids,
        )

    def check_covers(self, ids: np.ndarray) -> None:
        """InputError unless all these clients have a row, where rows belong to clients."""
        if self.client is None:
            return
        missing = np.setdiff1d(ids, self.client)
        if len(missing):
            raise InputError(
                f"trace {self.path}: column client: {len(missing)} of {len(ids)} clients have no "
                f"row, client {missing[0]} first; add them, or remove the column, and the seed "
                "deals the rows to clients"
            )


@dataclass(frozen=True)
class _Table:
    """Columns of values as they lie in the file, and where there each row is."""

    columns: dict[str, list[Any]]
    places: Sequence[int]
    unit: str

    def where(self, index: int) -> str:
        """A row as people find it in the file."""
        return f"{self.unit} {self.places[index]}"

    def numbers(self, path: str, name: str) -> np.ndarray:
        """A column as float64, every value within its bounds."""
        out = np.empty(len(self.columns[name]))
        for i, value in enumerate(self.columns[name]):
            if wrong := _complaint(name, value):
                raise InputError(f"trace {path}: {self.where(i)}: {name} = {wrong}")
            out[i] = float(value)
        return out


def _complaint(name: str, value: Any) -> str:
    give = "the number of a client, from 0" if name == "client" else KEYS[name].give
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"{value!r} is no number; give {give}"
    if name == "client":
        whole = number.is_integer() and 0 <= number < 2**53
        return "" if whole else f"{value} is no whole number from 0; give {give}"
    return KEYS[name].complaint(number)


def _csv(file: Path) -> _Table:
    with open(file, newline="", encoding="utf-8-sig") as handle:
        reader = csv.reader(handle)
        header = [name.strip() for name in next(reader, [])]
        places, rows = [], []
        for row in reader:
            if len(row) not in (0, len(header)):
                raise csv.Error(
                    f"line {reader.line_num} has {len(row)} values, the header {len(header)}"
                )
            if row:
                places.append(reader.line_num)
                rows.append(row)
    columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    if len(columns) < len(header):
        raise csv.Error("two columns have one name")
    return _Table(columns, places, "line")


def _parquet(file: Path) -> _Table:
    table = pq.read_table(file)
    return _Table(table.to_pydict(), range(1, len(table) + 1), "row")


def _check_header(path: str, table: _Table) -> None:
    for name in table.columns:
        if name not in COLUMNS:
            raise InputError(
                f"trace {path}: column {name!r} is unknown; {did_you_mean(name, COLUMNS)}"
            )
    if not table.columns.keys() - {"client"}:
        raise InputError(f"trace {path}: has no column of {', '.join(COLUMNS[1:])}; give one")
    if not next(iter(table.columns.values())):
        raise InputError(f"trace {path}: has no rows; give one for each client, or some to deal")


def _windows(path: str, table: _Table, period_s: float) -> tuple[np.ndarray, np.ndarray]:
    found = [
        _row_of_windows(path, table.where(i), text, period_s)
        for i, text in enumerate(table.columns["available"])
    ]
    return padded(found)


def _row_of_windows(path: str, row: str, text: Any, period_s: float) -> Sequence[Window]:
    try:
        spans = list(_spans(text or ""))
        return windows(spans, period_s) if spans else ()
    except (InputError, ValueError) as error:
        raise InputError(
            f"trace {path}: {row}: available = {text!r}: {error}; give windows in seconds, such as "
            "'0-28800 79200-86400'"
        ) from None


def _spans(text: str) -> Iterator[list[float]]:
    for word in str(text).split():
        begin, dash, end = word.partition("-")
        if not dash:
            raise ValueError(f"{word!r} is no window")
        yield [float(begin), float(end)]


def padded(rows: Sequence[Sequence[Window]]) -> tuple[np.ndarray, np.ndarray]:
    """Begins and lengths of windows, [R, W] both; those that a row lacks have length 0."""
    most = max((len(row) for row in rows), default=0)
    out = np.zeros((2, len(rows), most))
    for i, row in enumerate(rows):
        for j, (begin, length) in enumerate(row):
            out[:, i, j] = begin, length
    return out[0], out[1]
