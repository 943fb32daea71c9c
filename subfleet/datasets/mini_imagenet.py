"""mini-ImageNet: 100 classes of ImageNet, 600 images each, as lists with images or as caches.

Source: Vinyals et al., "Matching Networks for One Shot Learning" (2016), in the
split of Ravi and Larochelle, "Optimization as a Model for Few-Shot Learning"
(2017): 64, 16 and 20 classes in train.csv, val.csv and test.csv. A cache
mini-imagenet-cache-<part>.pkl holds {"image_data": uint8 [n, 84, 84, 3],
"class_dict": {class: [indices]}}.
"""

from __future__ import annotations

import codecs
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from subfleet.core.errors import InputError
from subfleet.core.scaling import SIGNED
from subfleet.datasets.archives import Folder, is_inside
from subfleet.datasets.images import (
    PER_SHARD,
    checked_size,
    pool_rows,
    read_images,
    resize,
)
from subfleet.datasets.pickles import BadPickle, load_pickle, map_file
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard

PARTS = ("train", "val", "test")
# The two headers in use: which column is the file, which the class.
_HEADERS: dict[tuple[str, ...], tuple[int, int]] = {
    ("filename", "label"): (0, 1),
    ("class_name", "image_name"): (1, 0),
}
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class MiniImagenet:
    """mini-ImageNet for federated classification: the classes of all lists, pooled.

    `source`: the folder with train.csv, val.csv and test.csv (columns
    filename,label or class_name,image_name) and images/, or with the three caches.
    Its lists part classes, not images, so no class has a test part of its own: all
    rows are in the train pool. `parts` chooses lists; labels are places among their
    classes, sorted; a list or cache that is left out as damaged brings none. Images
    are resized to `size`. The set has no clients of its own.
    """

    size: int = 84
    parts: tuple[str, ...] = PARTS

    def __post_init__(self) -> None:
        checked_size(self.size)
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise InputError(f"data.parts = {self.parts!r} must be some of {', '.join(PARTS)}")

    @property
    def name(self) -> str:
        """See `Reader`."""
        return "mini_imagenet"

    def shards(self, source: Path) -> list[Shard]:
        """About 1,000 rows each of one list or cache; one for a damaged file, which tells of it."""
        contents = _look(self._files(source))
        images = _image_folder(source)
        if next(iter(contents)).suffix == ".csv" and images is None:
            raise InputError(
                f"{source} has the lists {', '.join(f.name for f in contents)} but no folder "
                "images/ with what they list; put the images of mini-ImageNet there"
            )
        classes = _classes(contents)
        shards = []
        for file, found in contents.items():
            if found.fault:
                shards.append(Shard(f"{file.stem}/0", file, False, (found.fault,)))
            for start in range(0, found.rows, PER_SHARD):
                items, files = (start, classes), _folders(file, images, found.classes)
                shards.append(Shard(f"{file.stem}/{start}", file, False, items, files))
        return shards

    def layout(self, source: Path) -> Layout:
        """See `Reader`."""
        classes = _classes(_look(self._files(source)))
        shape = (3, self.size, self.size)
        return Layout(len(classes), shape, scale=SIGNED, natural=False, spread=True)

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """The shard's rows.

        Faults: "cut file", "forbidden pickle", "wrong columns" leave a list or cache
        out, and its classes; each of a row: "wrong columns", "missing image",
        "unreadable image" of a list, "duplicate image" of a cache, "unknown label".
        """
        if isinstance(shard.items[0], _Fault):
            return faults.found(*shard.items[0])
        start, classes = shard.items
        labels = {name: label for label, name in enumerate(classes)}
        try:
            if shard.path.suffix == ".csv":
                images = _image_folder(shard.path.parent)
                assert images is not None  # `shards` has looked
                items = _listed(shard.path, start, images, labels, faults)
                yield from read_images(Folder(images), images, items, self.size, False, faults)
            else:
                yield from self._cached(shard.path, start, labels, faults)
        except _Damaged as error:  # since `shards` looked
            faults.found(*error.fault)

    def _files(self, source: Path) -> list[Path]:
        """The caches or, where there are none, the lists of the chosen parts."""
        chosen = [part for part in PARTS if part in self.parts]
        missing: list[str] = []
        for pattern in ("mini-imagenet-cache-{}.pkl", "{}.csv"):
            files = [source / pattern.format(part) for part in chosen]
            if all(file.is_file() for file in files):
                return files
            missing += [file.name for file in files if not file.is_file()]
        raise InputError(
            f"{source} lacks {', '.join(missing)}; give a folder with all caches or all lists "
            f"of data.parts = {self.parts!r}, or choose fewer parts"
        )

    def _cached(
        self, file: Path, start: int, labels: dict[str, int], faults: Faults
    ) -> Iterator[ClientRows]:
        pixels, classes = _cache(file)
        stop = min(start + PER_SHARD, len(pixels))
        y = np.full(len(pixels), -1)
        again = np.zeros(len(pixels), bool)
        for name, rows in classes.items():
            rows = np.unique(rows)
            again[rows[y[rows] >= 0]] = True
            y[rows] = labels[name]
        for row in np.flatnonzero(again[start:stop]) + start:
            named = " and ".join(repr(name) for name, rows in classes.items() if row in rows)
            faults.found(
                "duplicate image",
                f"{file}, image {row} is in the classes {named} of 'class_dict'; "
                "it must be in one: correct it",
            )
        for row in np.flatnonzero(y[start:stop] < 0) + start:
            faults.found(
                "unknown label", f"{file}, image {row} is in no class of 'class_dict'; correct it"
            )
        good = np.flatnonzero((y[start:stop] >= 0) & ~again[start:stop]) + start
        if len(good):
            x = np.stack([resize(pixels[row], self.size) for row in good])
            yield pool_rows(x, y[good], False)


# --- files ---------------------------------------------------------------------------------------


class _Fault(NamedTuple):
    """What `Faults.found` takes."""

    kind: str
    message: str


class _Damaged(Exception):
    """A list or cache of which nothing can be used."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.fault = _Fault(kind, message)


class _Contents(NamedTuple):
    """A list's or cache's rows and classes; neither where it is damaged."""

    rows: int
    classes: frozenset[str]
    fault: _Fault | None = None


def _look(files: list[Path]) -> dict[Path, _Contents]:
    return {file: _contents(file) for file in files}


def _contents(file: Path) -> _Contents:
    try:
        if file.suffix == ".pkl":
            pixels, indices = _cache(file)
            return _Contents(len(pixels), frozenset(indices))
        rows = [row for _, row in _rows(file)]
    except _Damaged as error:
        return _Contents(0, frozenset(), error.fault)
    named = {row[1] for row in rows if len(row) == 2 and _WNID.fullmatch(row[1])}
    return _Contents(len(rows), frozenset(named))


def _classes(contents: dict[Path, _Contents]) -> tuple[str, ...]:
    """All classes of the sound files, sorted; InputError where there is none."""
    names = frozenset[str]().union(*(found.classes for found in contents.values()))
    if not names:
        for found in contents.values():
            if found.fault:
                raise InputError(found.fault.message)
        folder = next(iter(contents)).parent
        raise InputError(f"{folder}: the lists name no class; fetch them again")
    return tuple(sorted(names))


def _folders(file: Path, images: Path | None, classes: frozenset[str]) -> tuple[Path, ...]:
    """The folders that a list's images lie in; none for a cache."""
    if file.suffix != ".csv" or images is None:
        return ()
    nested = [images / name for name in sorted(classes)]
    return (images, *(folder for folder in nested if folder.is_dir()))


# --- lists ---------------------------------------------------------------------------------------


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a list with their lines' numbers from 1, (file, class) columns first.

    A line is a row, and a comma parts columns: no name has a quote, so that an open
    one spoils its own line alone. A line that is no UTF-8 is one column.
    """
    try:
        with file.open("rb") as stream:
            header = tuple(_columns(next(stream, b"").removeprefix(codecs.BOM_UTF8)))
            if header not in _HEADERS:
                known = " or ".join(",".join(names) for names in _HEADERS)
                raise _Damaged(
                    "wrong columns",
                    f"{file}, line 1 is {','.join(header)[:60]!r}, not {known}; "
                    "give the lists of Ravi and Larochelle",
                )
            image, label = _HEADERS[header]
            for number, line in enumerate(stream, start=2):
                row = _columns(line)
                yield number, [row[image], row[label]] if len(row) == 2 else row
    except OSError as error:
        message = f"{file} cannot be read ({error}); check its permissions"
        raise _Damaged("cut file", message) from None


def _columns(line: bytes) -> list[str]:
    try:
        return line.rstrip(b"\r\n").decode().split(",")
    except UnicodeDecodeError:
        return [line.decode("latin-1")]


def _listed(
    file: Path, start: int, images: Path, labels: dict[str, int], faults: Faults
) -> Iterator[tuple[str, int]]:
    """(name below `images`, label) of `PER_SHARD` rows of a list."""
    for line, row in itertools.islice(_rows(file), start, start + PER_SHARD):
        where = f"{file}, line {line}"
        if len(row) != 2 or not is_inside(row[0]):
            faults.found(
                "wrong columns",
                f"{where} is {','.join(row)[:60]!r}, not an image's name and its class, "
                "in UTF-8; correct it",
            )
        elif row[1] not in labels:
            faults.found(
                "unknown label",
                f"{where}: {row[1][:40]!r} is no class of ImageNet (n and 8 digits); correct it",
            )
        else:
            flat, nested = row[0], f"{row[1]}/{row[0]}"
            is_nested = not (images / flat).is_file() and (images / nested).is_file()
            yield (nested if is_nested else flat), labels[row[1]]


def _image_folder(source: Path) -> Path | None:
    """Where the images of lists in `source` are; `imagenet_names/` has them beside it."""
    for folder in (source / "images", source.parent / "images"):
        if folder.is_dir():
            return folder
    return None


# --- caches --------------------------------------------------------------------------------------


def _cache(file: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A cache's pixels uint8 [n, height, width, 3], mapped from the file, and its classes' rows."""
    try:
        data = load_pickle(map_file(file), file)
    except BadPickle as error:
        raise _Damaged(error.kind, str(error)) from None
    except OSError as error:
        message = f"{file} cannot be read ({error}); check its permissions"
        raise _Damaged("cut file", message) from None
    pixels, classes = (
        (data.get("image_data"), data.get("class_dict")) if isinstance(data, dict) else (None, None)
    )
    if not isinstance(pixels, np.ndarray) or not isinstance(classes, dict):
        raise _Damaged(
            "wrong columns",
            f"{file} has no array 'image_data' or no 'class_dict'; give mini-ImageNet's caches",
        )
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise _Damaged(
            "wrong columns",
            f"{file}: 'image_data' is {pixels.dtype} {list(pixels.shape)}, "
            "not uint8 [n, 84, 84, 3]; give mini-ImageNet's caches",
        )
    return pixels, {
        _class_name(name, file): _indices(rows, name, len(pixels), file)
        for name, rows in classes.items()
    }


def _class_name(name: Any, file: Path) -> str:
    if isinstance(name, bytes):
        name = name.decode("latin1")
    if not isinstance(name, str):
        message = f"{file}: class {name!r:.40} of 'class_dict' is no string; correct it"
        raise _Damaged("wrong columns", message)
    return name


def _indices(rows: Any, name: Any, count: int, file: Path) -> np.ndarray:
    found = np.asarray(rows if isinstance(rows, (list, tuple, np.ndarray)) else [None])
    if found.size == 0:
        return np.empty(0, np.int64)
    if found.ndim != 1 or found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= count:
        raise _Damaged(
            "wrong columns",
            f"{file}: the indices of class {name!r} are not whole numbers in 0..{count - 1}; "
            "fetch the file again",
        )
    return found.astype(np.int64)
