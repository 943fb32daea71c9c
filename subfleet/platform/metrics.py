"""What a run writes down: a line a round, a row per client and round, a summary.

The columns and their units are in `columns.py`. A resume calls `truncate` of
both logs with the round of its checkpoint; every round is then there once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from subfleet.core.errors import InputError
from subfleet.platform.columns import CLIENTS_SCHEMA
from subfleet.platform.files import disk_guard, json_bytes, sync_folder, write_atomic

RoundRecord = dict[str, Any]  # the keys of METRICS_COLUMNS, where they apply


class Observer(Protocol):
    """Watches a run; the coordinator calls it, from one thread.

    It may also have `on_note(text)`, which hears in a line each what the engine chose for
    a variant, and when that changes: memory ran out, say. And it may have
    `on_progress(done, total, doing)`, which hears how far the round that goes on has come, as
    bundles come in: clients that are trained ("train") or evaluated ("evaluate"), variants whose
    ways were tried out ("try"). It may be told often, and from 0 on again. With Ray it may have
    `on_hosts(alive, in_flight)`, which hears every few seconds, and with each bundle, how many
    hosts answer and how many bundles they have at hand. And
    `on_clients(round, columns)` hears, before `on_round`, what `clients/` holds of the round:
    equally long arrays by column name, without `round` itself.

    `info`: rounds (of the whole run), start (rounds already done, 0 unless
    resumed), phases (a `Stretch` of name, first and last round for each, in order),
    config (the experiment, a nested dict), run_folder, algorithm,
    warnings (sentences that whoever started the run should read).
    """

    def on_start(self, info: dict[str, Any]) -> None:
        """Before the first round of this process."""
        ...

    def on_round(self, record: RoundRecord, coverage: dict[str, np.ndarray]) -> None:
        """After a round; coverage[group] is int[C_group], clients that trained each unit."""
        ...

    def on_end(self, summary: dict[str, Any]) -> None:
        """After the last round, or when the run stops: `summary["finished"]` says which."""
        ...


def tell(observers: Iterable[Observer], text: str) -> None:
    """A note for those of the observers that take notes."""
    for observer in observers:
        hear = getattr(observer, "on_note", None)
        if hear is not None:
            hear(text)


def tell_progress(observers: Iterable[Observer], done: int, total: int, doing: str) -> None:
    """How far the round has come, for those of the observers that follow it."""
    for observer in observers:
        hear = getattr(observer, "on_progress", None)
        if hear is not None:
            hear(done, total, doing)


def tell_hosts(observers: Iterable[Observer], alive: int, in_flight: int) -> None:
    """How the hosts are, for those of the observers that look after them."""
    for observer in observers:
        hear = getattr(observer, "on_hosts", None)
        if hear is not None:
            hear(alive, in_flight)


def tell_clients(
    observers: Iterable[Observer], round: int, columns: Mapping[str, np.ndarray]
) -> None:
    """The rows of a round's clients, for those of the observers that look at single clients."""
    for observer in observers:
        hear = getattr(observer, "on_clients", None)
        if hear is not None:
            hear(round, columns)


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, in order of `round`.

    Opening drops a last line that a crash cut short. Raises `InputError` for a
    file damaged elsewhere and `RunFailed` on a full disk, with the file as it was.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._rounds = [record["round"] for record in self._repair()]
        self._handle = self._open()

    def _open(self) -> int:
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def _repair(self) -> list[RoundRecord]:
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().splitlines(keepends=True)
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no end of line")
                record = json.loads(line)
                int(record["round"])
            except (ValueError, KeyError, TypeError) as error:
                if number < len(lines):
                    raise InputError(
                        f"{self.path}: line {number} of {len(lines)} is damaged ({error}); "
                        "restore the file, or start again with another --out"
                    ) from error
                write_atomic(self.path, b"".join(lines[:-1]))
                break
            records.append(record)
        return records

    @property
    def last_round(self) -> int:
        """The last round written, 0 before the first."""
        return self._rounds[-1] if self._rounds else 0

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one round and make it durable; NaN and infinities become null."""
        assert record["round"] > self.last_round, f"round {record['round']} is there already"
        line = json_bytes(record)
        size = os.fstat(self._handle).st_size
        with disk_guard(self.path, len(line)):
            try:
                written = 0
                while written < len(line):  # a nearly full disk takes a part, then refuses
                    written += os.write(self._handle, line[written:])
                os.fsync(self._handle)
            except BaseException:
                os.ftruncate(self._handle, size)
                raise
        self._rounds.append(record["round"])

    def truncate(self, after_round: int) -> None:
        """Drop every line beyond `after_round`."""
        records = self.read()
        kept = [record for record in records if record["round"] <= after_round]
        if len(kept) == len(records):
            return
        os.close(self._handle)
        write_atomic(self.path, b"".join(map(json_bytes, kept)))
        self._rounds = [record["round"] for record in kept]
        self._handle = self._open()

    def read(self) -> list[RoundRecord]:
        """All rounds, in order."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    def close(self) -> None:
        """Close the file; every line is on disk already."""
        os.close(self._handle)


_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")


class ClientsLog:
    """`clients/`: Parquet parts of a span of rounds each, a row per client and round.

    Rows wait in memory until `flush`, which must come before the checkpoint of
    the same round: what a checkpoint has seen is then always on disk.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tables: list[pa.Table] = []
        self._span: list[int] = []

    def add(self, round: int, columns: Mapping[str, Any]) -> None:
        """Note the rows of one round: equally long arrays by column name.

        `round` is filled in, a column left out is null; an unknown one raises
        `InputError`.
        """
        unknown = sorted(set(columns) - set(CLIENTS_SCHEMA.names))
        if unknown:
            raise InputError(
                f"client columns {unknown}: unknown; known: {', '.join(CLIENTS_SCHEMA.names)}"
            )
        assert not self._span or round > self._span[-1], f"round {round} is there already"
        num_rows = len(next(iter(columns.values()))) if columns else 0
        arrays = []
        for field in CLIENTS_SCHEMA:
            if field.name == "round":
                arrays.append(pa.array(np.full(num_rows, round), field.type))
            elif field.name in columns:
                arrays.append(_column(columns[field.name], field.type))
            else:
                arrays.append(pa.nulls(num_rows, field.type))
        self._tables.append(pa.Table.from_arrays(arrays, schema=CLIENTS_SCHEMA))
        self._span.append(round)

    def flush(self) -> Path | None:
        """Write the waiting rows as one part and return its path; None when there are none."""
        if not self._tables:
            return None
        path = self._write(self._span[0], self._span[-1], pa.concat_tables(self._tables))
        self._tables, self._span = [], []
        return path

    def _write(self, first: int, last: int, table: pa.Table) -> Path:
        path = self.folder / f"part-{first:06d}-{last:06d}.parquet"
        buffer = pa.BufferOutputStream()
        # One dictionary for each column: parts then read back without re-encoding.
        pq.write_table(table.unify_dictionaries(), buffer, compression="zstd")
        write_atomic(path, buffer.getvalue().to_pybytes())
        return path

    def _parts(self) -> list[tuple[int, int, Path]]:
        found = ((_PART.fullmatch(path.name), path) for path in self.folder.iterdir())
        return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)

    def truncate(self, after_round: int) -> None:
        """Drop every row beyond `after_round`, waiting ones too; safe to repeat when cut short."""
        self._tables, self._span = [], []
        for first, last, path in self._parts():
            if last <= after_round:
                continue
            if first <= after_round:
                table = pq.read_table(path)
                keep = table.filter(pa.array(table["round"].to_numpy() <= after_round))
                self._write(first, after_round, keep)
            path.unlink()
        sync_folder(self.folder)

    def read(self) -> pa.Table:
        """All rows written so far, in order of round."""
        tables = [pq.read_table(path, schema=CLIENTS_SCHEMA) for _, _, path in self._parts()]
        return pa.concat_tables(tables) if tables else CLIENTS_SCHEMA.empty_table()


def _column(values: Any, type: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not isinstance(values, pa.Array):
        # A NaN is a value that does not apply, and those are null.
        values = pa.array(values.tolist() if _is_text(values) else values, from_pandas=True)
    return values.dictionary_encode() if values.type == pa.string() else values.cast(type)


def _is_text(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype.kind in "UO"


# Summed over the rounds as total_<key>; of the others the last value says all.
_COSTS = ("bytes_up", "bytes_down", "bytes_map", "flops", "sim_seconds", "energy_j")
_TOTALS = (*_COSTS, "retries", "out_of_memory", "dropped", "late")
_BEST = {"acc_global": max, "acc_local": max, "acc_own": max, "loss_global": min}


def summarise(
    records: Sequence[RoundRecord],
    *,
    seed: int,
    finished: bool,
    params_mean: float,
    flops_mean: float,
    params_sha256: str,
) -> dict[str, Any]:
    """The content of `summary.json`.

    The last known value of each key of `metrics.jsonl` under its own name,
    `best_<key>` with `best_<key>_round`, `total_<key>` of costs, and the
    arguments. `params_mean` and `flops_mean` are of the sub-networks (FLOPs for
    one sample), averaged over the clients of the last round.

    >>> rounds = [{"round": 1, "acc_global": 0.5, "bytes_up": 3}, {"round": 2, "bytes_up": 4}]
    >>> s = summarise(
    ...     rounds, seed=1, finished=True, params_mean=9.0, flops_mean=2.0, params_sha256="ab"
    ... )
    >>> s["rounds"], s["acc_global"], s["best_acc_global_round"], s["total_bytes_up"]
    (2, 0.5, 1, 7)
    """
    summary: dict[str, Any] = {
        "rounds": records[-1]["round"] if records else 0,
        "seed": seed,
        "finished": finished,
        "params_mean": params_mean,
        "flops_mean": flops_mean,
        "params_sha256": params_sha256,
    }
    for record in records:
        known = {key: value for key, value in record.items() if _known(value)}
        summary.update((key, value) for key, value in known.items() if key != "round")
        for key, better in _BEST.items():
            best = summary.get(f"best_{key}")
            if key in known and (best is None or better(best, known[key]) != best):
                summary[f"best_{key}"] = known[key]
                summary[f"best_{key}_round"] = record["round"]
        for key in _TOTALS:
            if key in known:
                summary[f"total_{key}"] = summary.get(f"total_{key}", 0) + known[key]
    return summary


def _known(value: Any) -> bool:
    return value is not None and value == value


def params_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """One digest of all parameters: sorted names, dtypes, shapes, little-endian bytes.

    >>> a = params_sha256({"w": torch.zeros(2), "b": torch.ones(1)})
    >>> a == params_sha256({"b": torch.ones(1), "w": torch.zeros(2)})
    True
    >>> a == params_sha256({"b": torch.ones(1), "w": torch.zeros(2, 1)})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        head = json.dumps([name, str(value.dtype).removeprefix("torch."), list(value.shape)])
        digest.update(head.encode() + b"\n")
        digest.update(_little_endian(value))
    return digest.hexdigest()


def _little_endian(value: torch.Tensor) -> bytes:
    # Through bytes, since NumPy has no bfloat16; a big-endian machine swaps each element.
    raw = value.reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(_swapped(raw, value.element_size())).tobytes()


def _swapped(raw: np.ndarray, size: int) -> np.ndarray:
    return raw if np.little_endian else raw.reshape(-1, size)[:, ::-1]


def read_metrics(path: str | os.PathLike) -> Iterable[RoundRecord]:
    """The whole lines of a `metrics.jsonl`, also of a run that is going on; writes nothing."""
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)
