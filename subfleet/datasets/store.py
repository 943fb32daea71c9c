"""Clients on disk: Arrow columns and a table of offsets, mapped into memory, never copied.

A store is a folder of
  rows.arrow     columns x (fixed-size list), y (int64), group (int32: the number
                 within the client of the first row with the same x), from_test
                 (uint8: LEAF's own part); a client's rows lie in one batch
  offsets.npy    int64 [clients + 1]
  labels.npy     label histogram [clients, classes], the smallest integer type
  clients.json   the clients' names
  manifest.json  version, counts, source, and each file's bytes and sha256
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from subfleet.core.errors import InputError, RunFailed, did_you_mean
from subfleet.core.scaling import Scaling
from subfleet.datasets.federation import Block, checked_ids, checked_part, offsets_of
from subfleet.datasets.memory import count_labels
from subfleet.datasets.split import leaf_split, seeded_split, side_sizes

VERSION = 2
SPLITS = ("seeded", "leaf")
_BATCH_BYTES = 64 << 20


class ClientRows(NamedTuple):
    """One client on its way into a store."""

    name: str
    x: np.ndarray  # [rows, *input_shape], uint8 or float32
    y: np.ndarray  # [rows], int64
    from_test: np.ndarray  # [rows], bool: the row came in LEAF's test part


class Store:
    """A prepared data set: a `Federation` that pickles as (path, seed, split).

    split="seeded": 80 % of each client's rows train, drawn from the seed.
    split="leaf": LEAF's own parts; a test row that repeats a train row of its
    client trains, and a client with one part only is split as "seeded" does.
    Either way rows of a client with equal x are on one side. `path` must be
    visible on each host. InputError: no store there, or a damaged one.
    """

    def __init__(self, path: str | Path, seed: int = 0, split: str = "seeded") -> None:
        if split not in SPLITS:
            raise InputError(f"split={split!r} is unknown; {did_you_mean(split, SPLITS)}")
        self.path, self.seed, self.split = Path(path), seed, split
        self.manifest = read_manifest(self.path)
        self.name: str = self.manifest["name"]
        self.num_clients: int = self.manifest["clients"]
        self.num_classes: int = self.manifest["num_classes"]
        self.input_shape: tuple[int, ...] = tuple(self.manifest["input_shape"])
        self.scale = Scaling(*self.manifest["scale"])
        self.num_rows: int = self.manifest["rows"]
        self.dropped: list[str] = self.manifest["dropped"]  # names of clients with one row or none

    @property
    def fingerprint(self) -> str:
        """A digest (sha256, hexadecimal) of the clients and their rows, wherever they came from."""
        text = json.dumps(self.manifest["files"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def __reduce__(self) -> tuple:
        return Store, (str(self.path), self.seed, self.split)

    @functools.cached_property
    def client_names(self) -> list[str]:
        """The clients' names in the source, in the order of their numbers."""
        return json.loads((self.path / "clients.json").read_text())

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return np.load(self.path / "offsets.npy")

    @functools.cached_property
    def _histogram(self) -> np.ndarray:
        return np.load(self.path / "labels.npy", mmap_mode="r")

    @functools.cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        reader = pa.ipc.open_file(pa.memory_map(str(self.path / "rows.arrow")))
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]

    @functools.cached_property
    def _columns(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(x, y) of each batch: views of the mapped file."""
        return [
            (
                batch.column("x").flatten().to_numpy().reshape(-1, *self.input_shape),
                batch.column("y").to_numpy(),
            )
            for batch in self._batches
        ]

    @functools.cached_property
    def _batch_starts(self) -> np.ndarray:
        return offsets_of(np.array([batch.num_rows for batch in self._batches]))

    @functools.cached_property
    def _train(self) -> np.ndarray:
        """Which rows train, bool [rows]."""
        group = np.concatenate([batch.column("group").to_numpy() for batch in self._batches])
        if self.split == "seeded":
            return seeded_split(self.seed, self._offsets, group)
        marks = [batch.column("from_test").to_numpy() for batch in self._batches]
        from_test = np.concatenate(marks).astype(bool)
        if not from_test.any():
            raise InputError(
                f"split='leaf', but {self.path} has no test part; "
                "use split='seeded' or add LEAF's test files to the source"
            )
        return leaf_split(self.seed, self._offsets, group, from_test)

    @functools.cached_property
    def _train_sizes(self) -> np.ndarray:
        return side_sizes(self._train, self._offsets)

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The number of rows of each client in `part`, int64 [len(ids)]."""
        ids = checked_ids(ids, self.num_clients)
        if checked_part(part) == "train":
            return self._train_sizes[ids]
        total = self._offsets[ids + 1] - self._offsets[ids]
        return total if part == "all" else total - self._train_sizes[ids]

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """The number of rows of each client and class, int64 [len(ids), num_classes]."""
        if checked_part(part) == "all":
            return self._histogram[checked_ids(ids, self.num_clients)].astype(np.int64)
        y, offsets = self._gathered(ids, part, 1)
        return count_labels(y, offsets, self.num_classes)

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The clients' rows in their stored order."""
        x, offsets = self._gathered(ids, part, 0)
        return Block(x, self._gathered(ids, part, 1)[0], offsets)

    def _gathered(self, ids: np.ndarray, part: str, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of column 0 (x) or 1 (y) of the clients' part, and their offsets."""
        ids = checked_ids(ids, self.num_clients)
        offsets = offsets_of(self.sizes(ids, part))
        like = self._columns[0][column]
        out = np.empty((int(offsets[-1]), *like.shape[1:]), dtype=like.dtype)
        batches = np.searchsorted(self._batch_starts, self._offsets[ids], side="right") - 1
        for i, (client, batch) in enumerate(zip(ids, batches, strict=True)):
            low, high = self._offsets[client], self._offsets[client + 1]
            start = self._batch_starts[batch]
            rows = self._columns[batch][column][low - start : high - start]
            if part != "all":
                rows = rows[self._train[low:high] == (part == "train")]
            out[offsets[i] : offsets[i + 1]] = rows
        return out, offsets


def read_manifest(path: Path) -> dict:
    """The manifest of the store at `path`; InputError when it is missing, old or cut short."""
    remedy = "prepare the data again, into a folder that every host sees"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except FileNotFoundError:
        raise InputError(f"{path} holds no prepared data (no manifest.json); {remedy}") from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}/manifest.json cannot be read ({error}); {remedy}") from None
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} has store version {manifest.get('version')}, needed is {VERSION}; {remedy}"
        )
    for name, facts in manifest["files"].items():
        size = (path / name).stat().st_size if (path / name).exists() else "no"
        if size != facts["bytes"]:
            raise InputError(f"{path / name} has {size} bytes, not {facts['bytes']}; {remedy}")
    return manifest


def write_store(
    path: str | Path,
    clients: Iterable[ClientRows],
    *,
    name: str,
    num_classes: int,
    input_shape: tuple[int, ...],
    scale: Scaling,
    source: dict,
) -> None:
    """Writes a store as a whole or not at all: into a folder beside `path`, then renamed.

    Clients are numbered in the order given; one with fewer than 2 rows is left out
    and named in the manifest under "dropped". InputError: no client is left, or
    the folder cannot be written. RunFailed: the disk is full.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        counts = _write_files(folder, clients, num_classes, input_shape)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(folder.iterdir())
        }
        manifest = {"version": VERSION, "name": name, **counts, "num_classes": num_classes}
        manifest |= {"input_shape": list(input_shape), "scale": list(scale)}
        manifest |= {"source": source, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in [*folder.iterdir(), folder]:
            _sync(file)
        _put_in_place(folder, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(
                f"the disk that holds {path.parent} is full; "
                "free some space or set SUBFLEET_CACHE to a folder elsewhere"
            ) from error
        raise InputError(
            f"{path} cannot be written ({error}); set SUBFLEET_CACHE to a folder that can"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_files(
    folder: Path, clients: Iterable[ClientRows], num_classes: int, input_shape: tuple[int, ...]
) -> dict:
    """Writes all files but the manifest; returns its counts."""
    names: list[str] = []
    dropped: list[str] = []
    sizes: list[int] = []
    histograms: list[np.ndarray] = []

    def kept() -> Iterator[ClientRows]:
        for client in clients:
            if len(client.y) < 2:
                dropped.append(client.name)
                continue
            names.append(client.name)
            sizes.append(len(client.y))
            histograms.append(np.bincount(client.y, minlength=num_classes))
            yield client

    _write_rows(folder / "rows.arrow", kept(), int(np.prod(input_shape)))
    if not names:
        raise InputError(
            f"none of the {len(dropped)} users has 2 samples, so none can be split; "
            "give users with more samples"
        )
    histogram = np.stack(histograms)
    smallest = np.min_scalar_type(int(histogram.max()))
    np.save(folder / "labels.npy", histogram.astype(smallest))
    np.save(folder / "offsets.npy", offsets_of(np.array(sizes)))
    (folder / "clients.json").write_text(json.dumps(names))
    return {"clients": len(names), "rows": sum(sizes), "dropped": dropped}


def _write_rows(file: Path, clients: Iterable[ClientRows], width: int) -> None:
    """Writes the Arrow file, in batches that end where a client does."""
    waiting: list[ClientRows] = []
    writer = None
    with pa.OSFile(str(file), "wb") as sink:

        def flush() -> None:
            nonlocal writer
            batch = _record_batch(waiting, width)
            if writer is None:
                writer = pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
            waiting.clear()

        held = 0
        for client in clients:
            waiting.append(client)
            held += client.x.nbytes
            if held >= _BATCH_BYTES:
                flush()
                held = 0
        if waiting:
            flush()
        if writer is not None:
            writer.close()


def _record_batch(clients: list[ClientRows], width: int) -> pa.RecordBatch:
    flat = pa.array(np.concatenate([client.x.reshape(-1) for client in clients]))
    columns = {
        "x": pa.FixedSizeListArray.from_arrays(flat, width),
        "y": pa.array(np.concatenate([client.y for client in clients]).astype(np.int64)),
        "group": pa.array(np.concatenate([repeats(client.x) for client in clients])),
        "from_test": pa.array(np.concatenate([c.from_test for c in clients]).astype(np.uint8)),
    }
    return pa.RecordBatch.from_pydict(columns)


def repeats(x: np.ndarray) -> np.ndarray:
    """For each row the number of the first row equal to it, int32 [rows].

    >>> repeats(np.array([[1, 2], [3, 4], [1, 2]], np.uint8))
    array([0, 1, 0], dtype=int32)
    """
    rows = np.ascontiguousarray(x).reshape(len(x), -1)
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return first[which].astype(np.int32)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(folder: Path, path: Path) -> None:
    """Renames `folder` to `path`; a sound store that another process put there first stays."""
    if path.exists():
        try:
            read_manifest(path)
        except InputError:
            shutil.rmtree(path)
        else:
            return
    try:
        folder.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Lost a race: what is there now must be whole, else this raises.
        read_manifest(path)
