"""MNIST's four idx files, plain or gzipped.

Source: LeCun, Cortes and Burges. An idx file is a big-endian header (two zero
bytes, the type 8 for uint8, the number of dimensions, each dimension as uint32)
and the values.
"""

from __future__ import annotations

import gzip
import math
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from subfleet.core.errors import InputError
from subfleet.core.scaling import PIXELS
from subfleet.datasets.cifar import wrong_sum
from subfleet.datasets.images import pool_rows
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard

SHAPE = (1, 28, 28)
_LIMIT = 1 << 28

# MD5 sums of the unpacked files: gzip of the same bytes differs from one maker to the next.
SUMS = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}


@dataclass(frozen=True)
class Mnist:
    """MNIST: 60,000 + 10,000 images of 28 x 28, white on black, 10 classes, no clients of its own.

    `source`: a folder with the idx files, or with MNIST/raw or raw, as torchvision
    lays them. A missing part and sums other than the published ones are warned of;
    with `check` a wrong sum is a fault.
    """

    check: bool = False

    @property
    def name(self) -> str:
        """See `Reader`."""
        return "mnist"

    def shards(self, source: Path) -> list[Shard]:
        """One for the train, one for the test part."""
        for folder in (source, source / "MNIST" / "raw", source / "raw"):
            files = {name: _find(folder, name) for name in SUMS}
            if any(files.values()):
                break
        missing = [name for name, file in files.items() if file is None]
        parts = []
        for part, from_test in (("train", False), ("t10k", True)):
            images, labels = (file for name, file in files.items() if name.startswith(part))
            if images and labels:
                parts.append(Shard(part, images, from_test, (labels.name,), (labels,)))
        if not parts:
            raise InputError(
                f"{source} lacks MNIST's idx files ({', '.join(missing)}, or with .gz); "
                "give the folder that holds images and labels"
            )
        if missing:
            warnings.warn(
                f"{folder} lacks {', '.join(missing)}; the other part is read", stacklevel=2
            )
        return parts

    def layout(self, source: Path) -> Layout:
        """See `Reader`."""
        return Layout(10, SHAPE, scale=PIXELS, natural=False, spread=True)

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """A part's rows: x uint8 [n, 1, 28, 28].

        Faults: "cut file", "wrong columns", "wrong sum", "wrong lengths" leave the
        part out; "unknown label" a row.
        """
        (labels,) = shard.items
        x = self._values(shard.path, 3, faults)
        y = self._values(shard.path.with_name(labels), 1, faults)
        if x is None or y is None:
            return
        if x.shape[1:] != SHAPE[1:]:
            return faults.found(
                "wrong columns", f"{shard.path}: images of {x.shape[1:]}, not (28, 28) pixels"
            )
        if len(x) != len(y):
            return faults.found(
                "wrong lengths",
                f"{shard.path} has {len(x)} images, {labels} {len(y)} labels; "
                "they must be equally many",
            )
        for row in np.flatnonzero(y > 9):
            faults.found(
                "unknown label",
                f"{shard.path.with_name(labels)}, item {row}: label {y[row]} is not in 0..9; "
                "correct it",
            )
        good = y <= 9
        if not good.all():
            x, y = x[good], y[good]
        yield pool_rows(x.reshape(-1, *SHAPE), y, shard.from_test)

    def _values(self, file: Path, dims: int, faults: Faults) -> np.ndarray | None:
        """A file's values, uint8 in its own shape; None after a fault."""
        remedy = "it is cut short or damaged: fetch it again"
        opened = gzip.open if file.suffix == ".gz" else open
        try:
            with opened(file, "rb") as stream:
                data = stream.read(_LIMIT)
        except Exception as error:  # of the disk, of gzip, of zlib
            reason = str(error) or type(error).__name__
            return faults.found("cut file", f"{file} cannot be read ({reason}); {remedy}")
        wrong = wrong_sum(data, SUMS[_plain(file.name)], file)
        if wrong and self.check:
            return faults.found("wrong sum", f"{wrong} fetch it again, or leave data.check out")
        start = 4 + 4 * dims
        if len(data) < start:
            return faults.found("cut file", f"{file} has {len(data)} bytes; {remedy}")
        magic, *shape = struct.unpack(f">{1 + dims}I", data[:start])
        if magic != 0x800 + dims:
            return faults.found(
                "wrong columns",
                f"{file} begins with {magic:#010x}, not {0x800 + dims:#010x}: it is no idx file "
                f"of {dims} dimensions of uint8; give MNIST's own",
            )
        if len(data) - start != math.prod(shape):
            return faults.found(
                "cut file",
                f"{file} says {' x '.join(map(str, shape))} values and has {len(data) - start}; "
                + remedy,
            )
        if wrong:
            warnings.warn(
                f"{wrong} it is read nevertheless; data.check = true refuses", stacklevel=2
            )
        return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path | None:
    """The file of that name, plain or gz; some publishers write a dot before "idx"."""
    for spelled in (name, name.replace("-idx", ".idx")):
        for file in (folder / spelled, folder / f"{spelled}.gz"):
            if file.is_file():
                return file
    return None


def _plain(name: str) -> str:
    return name.removesuffix(".gz").replace(".idx", "-idx")
