"""CIFAR-10 and CIFAR-100 in their "python version": pickled batches of 32 x 32 images.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images"
(2009). A batch is a dict with `data` uint8 [n, 3072], red plane, green, blue,
each row by row, and lists of labels. Read as published, in a folder or in the
.tar.gz, without unpickling anything but data (see `pickles`).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from subfleet.core.errors import InputError
from subfleet.core.scaling import SIGNED
from subfleet.datasets.archives import Unreadable, open_tree
from subfleet.datasets.images import pool_rows
from subfleet.datasets.pickles import BadPickle, load_pickle, map_file
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard

SHAPE = (3, 32, 32)
_WIDTH = 3 * 32 * 32
_LIMIT = 1 << 29  # bytes of a batch: CIFAR-100's train part has 1.6e8
_ROWS = 10_000  # at a time
_PIECE = _ROWS * 3200  # bytes of a file that are a shard: a row's pixels, label and file name


class Files(NamedTuple):
    """Where a set's batches lie, and their published MD5 sums, in order."""

    folder: str
    train: dict[str, str]
    test: dict[str, str]


# The sums that torchvision publishes, too; here so that a worker need not import it.
FILES_10 = Files(
    "cifar-10-batches-py",
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    {"test_batch": "40351d587109b95175f43aff81a1287e"},
)
FILES_100 = Files(
    "cifar-100-python",
    {"train": "16019d7e3df5f24257cddd939b257f8d"},
    {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
)


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10: 50,000 + 10,000 images, 10 classes, no clients of its own.

    `source`: the folder cifar-10-batches-py, its parent, or the .tar.gz. Missing
    batches and sums other than the published ones are warned of; with `check` a
    wrong sum is a fault.
    """

    check: bool = False

    @property
    def name(self) -> str:
        """See `Reader`."""
        return "cifar10"

    def shards(self, source: Path) -> list[Shard]:
        """One for each batch."""
        return _shards(source, FILES_10)

    def layout(self, source: Path) -> Layout:
        """See `Reader`."""
        return Layout(10, SHAPE, scale=SIGNED, natural=False, spread=True)

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """See `Reader` and `read_batch`."""
        return read_batch(shard, faults, FILES_10, "labels", 10, self.check)


@dataclass(frozen=True)
class Cifar100:
    """CIFAR-100: 50,000 + 10,000 images, 100 fine or 20 coarse classes, no clients of its own.

    `source`: the folder cifar-100-python, its parent, or the .tar.gz. Sums as for `Cifar10`.
    """

    coarse: bool = False
    check: bool = False

    @property
    def name(self) -> str:
        """See `Reader`."""
        return "cifar100"

    def shards(self, source: Path) -> list[Shard]:
        """Some for the train, one for the test part: 10,000 rows each; one each in an archive."""
        return _shards(source, FILES_100)

    def layout(self, source: Path) -> Layout:
        """See `Reader`."""
        classes = 20 if self.coarse else 100
        return Layout(classes, SHAPE, scale=SIGNED, natural=False, spread=True)

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """See `Reader` and `read_batch`."""
        key, classes = ("coarse_labels", 20) if self.coarse else ("fine_labels", 100)
        return read_batch(shard, faults, FILES_100, key, classes, self.check)


def _shards(source: Path, files: Files) -> list[Shard]:
    names = [*files.train, *files.test]
    path, found = _locate(source, files.folder, names)
    missing = [name for name in names if name not in found]
    if not found:
        raise InputError(
            f"{source} has no batch of {files.folder} ({', '.join(names)}); give the folder "
            f"{files.folder}, its parent, or the published .tar.gz"
        )
    if missing:
        warnings.warn(
            f"{path} lacks {', '.join(missing)}; the rest is read, which is not the whole data set",
            stacklevel=3,
        )
    if path.is_dir():
        return [piece for name in found for piece in _pieces(name, path / name, name in files.test)]
    return [Shard(name, path, name in files.test, (member,)) for name, member in found.items()]


def _pieces(name: str, file: Path, from_test: bool) -> list[Shard]:
    """A large batch in shards of equally many rows, (which, of how many): files can be mapped."""
    number = math.ceil(file.stat().st_size / _PIECE)
    if number < 2:
        return [Shard(name, file, from_test)]
    return [
        Shard(f"{name} {piece} of {number}", file, from_test, (piece, number))
        for piece in range(number)
    ]


def _locate(source: Path, folder: str, names: list[str]) -> tuple[Path, dict[str, str]]:
    """The folder or archive that has batches, and what they are called in it."""
    if source.is_file():
        inside = {name.rsplit("/", 1)[-1]: name for name in open_tree(source).names()}
        return source, {name: inside[name] for name in names if name in inside}
    for place in (source / folder, source):
        found = {name: name for name in names if (place / name).is_file()}
        if found:
            return place, found
    archive = source / f"{folder.removesuffix('-batches-py').removesuffix('-python')}-python.tar.gz"
    return _locate(archive, folder, names) if archive.is_file() else (source, {})


def read_batch(
    shard: Shard, faults: Faults, files: Files, key: str, classes: int, check: bool
) -> Iterator[ClientRows]:
    """A batch's or a piece's rows: x uint8 [n, 3, 32, 32], y from the list `key`.

    Faults: "cut file", "wrong sum", "forbidden pickle", "wrong columns", "wrong
    lengths" leave the batch out, and its first piece tells; "unknown label" a row.
    """
    member, piece, pieces = "", 0, 1
    if len(shard.items) == 1:
        (member,) = shard.items
    elif shard.items:
        piece, pieces = shard.items
    where = shard.path / member
    own = faults if piece == 0 else Faults(skip=True)
    try:
        data = open_tree(shard.path).read(member, _LIMIT) if member else _mapped(shard.path)
    except Unreadable as error:
        return own.found("cut file", f"{where} cannot be read ({error}); fetch it again")
    if piece == 0 or check:
        wrong = wrong_sum(data, (files.train | files.test)[where.name], where)
        if wrong and check:
            return own.found("wrong sum", f"{wrong} fetch it again, or leave data.check out")
        if wrong:
            told = f"{wrong} it is read nevertheless; data.check = true refuses"
            warnings.warn(told, stacklevel=2)
    try:
        batch = load_pickle(data, where)
    except BadPickle as error:
        return own.found(error.kind, str(error))
    checked = _columns(batch, key, where, own)
    if checked is None:
        return
    count = len(checked[1])
    first, last = count * piece // pieces, count * (piece + 1) // pieces
    x, y = (column[first:last] for column in checked)
    good = (y >= 0) & (y < classes)
    for row in np.flatnonzero(~good):
        faults.found(
            "unknown label",
            f"{where}, image {first + row}: label {y[row]} is not in 0..{classes - 1}; correct it",
        )
    if not good.all():
        x, y = x[good], y[good]
    for start in range(0, len(y), _ROWS):
        rows = slice(start, start + _ROWS)
        yield pool_rows(x[rows].reshape(-1, *SHAPE), y[rows], shard.from_test)


def _mapped(file: Path) -> bytes | mmap.mmap:
    try:
        if (size := file.stat().st_size) > _LIMIT:
            raise Unreadable(f"{size} bytes, more than {_LIMIT}")
        return map_file(file)
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from None


def _columns(
    batch: Any, key: str, where: Path, faults: Faults
) -> tuple[np.ndarray, np.ndarray] | None:
    """Images uint8 [n, 3072] and labels int64 [n] of a batch; None after a fault."""
    x, labels = (batch.get("data"), batch.get(key)) if isinstance(batch, dict) else (None, None)
    if x is None or labels is None:
        return faults.found(
            "wrong columns", f"{where} has no 'data' or no {key!r}; give the python version's files"
        )
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != _WIDTH:
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        return faults.found(
            "wrong columns", f"{where}: 'data' is {got}, not uint8 [n, {_WIDTH}]; fetch it again"
        )
    is_list = isinstance(labels, list) and all(type(label) is int for label in labels)
    if not is_list or (labels and not -(1 << 62) < min(labels) <= max(labels) < 1 << 62):
        return faults.found(
            "wrong columns", f"{where}: {key!r} is no list of whole numbers; fetch it again"
        )
    if len(labels) != len(x):
        return faults.found(
            "wrong lengths",
            f"{where} has {len(x)} images but {len(labels)} labels; they must be equally many",
        )
    return x, np.array(labels, dtype=np.int64)


def wrong_sum(data: bytes | mmap.mmap, published: str, where: Path) -> str:
    """The beginning of a message if the MD5 of `data` is not the published one, else ""."""
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found == published:
        return ""
    return f"{where}: its MD5 sum is {found}, not the published {published}: cut or changed;"
