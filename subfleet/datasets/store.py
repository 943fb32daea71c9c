"""Clients on disk: Arrow columns and a table of offsets, mapped into memory, never copied.

A store is a folder of
  rows.arrow     columns x (fixed-size list), y (int64), group (int32: the number
                 within the client of the first row with the same x), from_test
                 (uint8: the publisher's own part), client after client
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
from typing import Any

import numpy as np
import pyarrow as pa

from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.scaling import Scaling
from subfleet.datasets.federation import Block, checked_ids, checked_part, offsets_of
from subfleet.datasets.memory import count_labels
from subfleet.datasets.split import (
    CODES,
    Parts,
    check_shares,
    leaf_split,
    seeded_split,
    temporal_split,
)

VERSION = 2
SPLITS = ("seeded", "leaf", "temporal")


class Store:
    """A prepared data set: a `Federation` and a `Pool` that pickles as its arguments.

    split="seeded": `test_share` of each client's rows test, drawn from the seed.
    split="leaf": the publisher's own parts; a test row that repeats a train row of
    its client trains, and a client with one part only is split as "seeded" does.
    Either way rows of a client with equal x are on one side. split="temporal": a
    client's last rows test, and the manifest's `overlap` rows before them are in no
    part. `val_share` of a client's rows validate. `path` must be visible on each
    host. InputError: no store there, or a damaged one.
    """

    def __init__(
        self,
        path: str | Path,
        seed: int = 0,
        split: str = "seeded",
        *,
        test_share: float = 0.2,
        val_share: float = 0.0,
    ) -> None:
        if split not in SPLITS:
            raise InputError(f"split={split!r} is unknown; {did_you_mean(split, SPLITS)}")
        check_shares(test_share, val_share)
        self.path, self.seed, self.split = Path(path), seed, split
        self.test_share, self.val_share = test_share, val_share
        self.manifest = read_manifest(self.path)
        self.name: str = self.manifest["name"]
        self.num_clients: int = self.manifest["clients"]
        self.num_classes: int = self.manifest["num_classes"]
        self.input_shape: tuple[int, ...] = tuple(self.manifest["input_shape"])
        self.scale = Scaling(*self.manifest["scale"])
        self.num_rows: int = self.manifest["rows"]
        self.vocabulary: int = self.manifest.get("vocabulary", 0)  # of tokens; 0 for what is none

    @property
    def fingerprint(self) -> str:
        """A digest (sha256, hexadecimal) of the clients and their rows, wherever they came from."""
        text = json.dumps(self.manifest["files"], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    stored = True
    """Rows lie on disk, and can be streamed from there."""

    def __reduce__(self) -> tuple:
        shares = {"test_share": self.test_share, "val_share": self.val_share}
        return functools.partial(Store, **shares), (str(self.path), self.seed, self.split)

    @functools.cached_property
    def client_names(self) -> list[str]:
        """The clients' names in the source, in the order of their numbers."""
        return json.loads((self.path / "clients.json").read_text())

    @functools.cached_property
    def embedding(self) -> np.ndarray | None:
        """A vector for each token, float32 [vocabulary, size], where the data come with them."""
        file = self.path / "embedding.npy"
        return np.load(file, mmap_mode="r") if file.exists() else None

    @functools.cached_property
    def dropped(self) -> list[str]:
        """Names of the clients that were left out: they have one row or none."""
        return json.loads((self.path / "dropped.json").read_text())

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

    def labels(self) -> np.ndarray:
        """The label of every row, int64 [rows], clients in order."""
        return np.concatenate([y for _, y in self._columns])

    def from_test(self) -> np.ndarray:
        """Which rows came in the publisher's test part, bool [rows]."""
        return self._column("from_test").astype(bool)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The inputs of rows 0 .. num_rows - 1 by number, [n, *input_shape]."""
        return self._taken(np.asarray(numbers, dtype=np.int64), 0)

    def _column(self, name: str) -> np.ndarray:
        return np.concatenate([batch.column(name).to_numpy() for batch in self._batches])

    @functools.cached_property
    def _parts(self) -> Parts:
        shares = (self.test_share, self.val_share)
        if self.split == "temporal":
            codes = temporal_split(self._offsets, self.manifest.get("overlap", 0), *shares)
            return Parts(codes, self._offsets)
        group = self._column("group")
        if self.split == "seeded":
            return Parts(seeded_split(self.seed, self._offsets, group, *shares), self._offsets)
        from_test = self.from_test()
        if not from_test.any():
            raise InputError(
                f"split='leaf', but {self.path} has no test part; "
                "use split='seeded' or add LEAF's test files to the source"
            )
        codes = leaf_split(self.seed, self._offsets, group, from_test, *shares)
        return Parts(codes, self._offsets)

    @property
    def warnings(self) -> list[str]:
        """What preparing it met: files cut or missing, and how much was left out, in sentences."""
        found = self.manifest.get("found", {})
        left_out = [
            f"left out when prepared: {n} x {kind}" for kind, n in found.get("counts", {}).items()
        ]
        if self.dropped:
            rows = self.manifest.get("rows_dropped", "few")
            left_out.append(
                f"{len(self.dropped)} clients with one row or none, {rows} rows in all, "
                "are left out"
            )
        return [*found.get("warnings", []), *left_out]

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        """How the clients' rows are parted, as plain JSON; `warnings` are for the user."""
        facts = self._parts.report()
        lone, none = facts["clients_without_test"], facts["rows_in_no_part"]
        warnings = self.warnings
        if lone and self.test_share > 0:
            warnings.append(
                f"{lone} of {self.num_clients} clients have too few rows to test and only train"
            )
        if none:
            warnings.append(f"{none} rows are in no part: they overlap with those of the next part")
        return {"split": self.split, **facts, "warnings": warnings}

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The number of rows of each client in `part`, int64 [len(ids)]."""
        ids = checked_ids(ids, self.num_clients)
        if checked_part(part) == "all":  # needs no split
            return self._offsets[ids + 1] - self._offsets[ids]
        return self._parts.sizes(ids, part)

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """The number of rows of each client and class, int64 [len(ids), num_classes]."""
        if checked_part(part) == "all":
            return self._histogram[checked_ids(ids, self.num_clients)].astype(np.int64)
        numbers, offsets = self._numbers(ids, part)
        return count_labels(self._taken(numbers, 1), offsets, self.num_classes)

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The clients' rows in their stored order."""
        numbers, offsets = self._numbers(ids, part)
        return Block(self._taken(numbers, 0), self._taken(numbers, 1), offsets)

    def _numbers(self, ids: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the rows of the clients' part, and where each client starts in them."""
        ids = checked_ids(ids, self.num_clients)
        offsets = offsets_of(self.sizes(ids, part))
        numbers = _ranges(self._offsets[ids], self._offsets[ids + 1])
        if part != "all":
            numbers = numbers[self._parts.codes[numbers] == CODES[part]]
        return numbers, offsets

    def _taken(self, numbers: np.ndarray, column: int) -> np.ndarray:
        """Rows of column 0 (x) or 1 (y) by number."""
        like = self._columns[0][column]
        out = np.empty((len(numbers), *like.shape[1:]), dtype=like.dtype)
        # Batch by batch, and within one in the order of the file: pages are read once and ahead.
        order = None if (np.diff(numbers) >= 0).all() else np.argsort(numbers, kind="stable")
        sorted_numbers = numbers if order is None else numbers[order]
        edges = np.searchsorted(sorted_numbers, self._batch_starts)
        for batch in np.flatnonzero(np.diff(edges)):
            here = slice(edges[batch], edges[batch + 1])
            source, rows = self._columns[batch][column], sorted_numbers[here]
            rows = rows - self._batch_starts[batch]
            if order is None:
                np.take(source, rows, axis=0, out=out[here], mode="clip")  # "raise" copies twice
            else:
                out[order[here]] = source[rows]
        return out


def _ranges(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The numbers from each `first` up to its `last`, end to end.

    >>> _ranges(np.array([3, 7, 0]), np.array([5, 7, 2])).tolist()
    [3, 4, 0, 1]
    """
    sizes = last - first
    return np.repeat(first - offsets_of(sizes)[:-1], sizes) + np.arange(sizes.sum())


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
