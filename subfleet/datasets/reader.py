"""What a reader is: a published data set, cut into shards that are parsed on their own.

A reader knows one data set's files and nothing of stores, Ray or training. It
lists shards cheaply and parses any one of them alone, so that many can be
parsed at once, and one again after a kill.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from subfleet.core.errors import InputError
from subfleet.core.scaling import AS_STORED, Scaling

TRAIN_POOL, TEST_POOL = "train", "test"
"""The client names under which a set without clients of its own yields its rows."""


class ClientRows(NamedTuple):
    """Rows of one client, on their way into a store."""

    name: str
    x: np.ndarray  # [rows, *input_shape]: uint8 or float32; tokens int8, int16 or int32
    y: np.ndarray  # [rows], int64
    from_test: np.ndarray  # [rows], bool: the row came in the publisher's test part


@dataclass(frozen=True)
class Layout:
    """What the rows of a data set look like.

    `natural`: clients come with the data (writers, roles, users); a set without
    them needs a partition. `spread`: a client's rows may come from several shards
    of one part; where they may not, a client met twice is a fault of the files.
    `overlap`: so many rows of a client after any one share inputs with it
    (windows of a text), and a temporal split leaves them out between its parts.
    `vocabulary`: tokens run from 0 to this, exclusive; 0 for what is not text.
    """

    num_classes: int
    input_shape: tuple[int, ...]
    dtype: str = "uint8"
    scale: Scaling = AS_STORED
    natural: bool = True
    spread: bool = False
    overlap: int = 0
    vocabulary: int = 0


@dataclass(frozen=True)
class Shard:
    """A piece of a data set that is parsed at a time: tens of megabytes at most.

    `name` is unique within the data set and the same each time the source is
    listed. `items` is what the reader needs besides: (file, label) pairs, a range.

    A prepared store is made anew when `path` or one of `files` changes its size or
    time, or `items` its repr: `files` are what else the rows depend on, lists of
    labels say. Of images in folders it holds the folders, not each image, so an
    image added, removed or replaced is noticed, and one overwritten in place is not.
    """

    name: str
    path: Path
    from_test: bool = False
    items: tuple[Any, ...] = ()
    files: tuple[Path, ...] = ()


@dataclass
class Faults:
    """Input that cannot be used: an error, or counted and left out where `skip` is set.

    >>> faults = Faults(skip=True)
    >>> faults.found("unknown label", "a.csv, line 3: polarity '7'; it must be 0, 2 or 4")
    >>> faults.counts
    Counter({'unknown label': 1})
    """

    skip: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def found(self, kind: str, message: str) -> None:
        """Raises InputError(message), or counts one more of `kind` and keeps the first message.

        `kind` is a few words without particulars ("unreadable image"); `message`
        names file and line or index, the value, the bound and the remedy.
        """
        if not self.skip:
            raise InputError(f"{message} (--skip-bad leaves it out and counts it)")
        self.counts[kind] += 1
        self.examples.setdefault(kind, message)

    def add(self, other: Faults) -> None:
        """Counts what another one counted, too."""
        self.counts.update(other.counts)
        self.examples = other.examples | self.examples


class Reader(Protocol):
    """A data set's files. A frozen dataclass whose fields are the set's own options."""

    @property
    def name(self) -> str:
        """The name in `subfleet.datasets.SETS`."""
        ...

    def shards(self, source: Path) -> list[Shard]:
        """What there is to parse, from names and sizes alone; InputError where nothing fits."""
        ...

    def layout(self, source: Path) -> Layout:
        """What the rows look like; may read small lists of classes."""
        ...

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """The shard's rows, in their order in the file, clients in the order they are met.

        Each client comes once, except where `Layout.spread`. Memory is bounded by
        the shard. What cannot be used goes to `faults.found`.
        """
        ...
