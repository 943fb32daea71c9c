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

import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.scaling import Scaling
from subfleet.datasets.federation import Block, checked_ids, checked_part, offsets_of
from subfleet.datasets.memory import count_labels
from subfleet.datasets.split import leaf_split, seeded_split, side_sizes

VERSION = 2
SPLITS = ("seeded", "leaf")


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
