"""FEMNIST as LEAF writes it: JSON files of writers.

Source: Caldas et al., "LEAF: A Benchmark for Federated Settings" (2018). A file
holds {"users": [...], "num_samples": [...], "user_data": {user: {"x": [[784
floats]], "y": [ints]}}}; x is 28 x 28 row by row in [0, 1], 1 is paper; y is
0-9, A-Z, a-z.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from subfleet.core.errors import InputError
from subfleet.core.scaling import INK
from subfleet.datasets import leaf
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard
from subfleet.datasets.store import VERSION, Store, read_manifest
from subfleet.datasets.writing import write_store

NUM_CLASSES = 62
SHAPE = (1, 28, 28)
PIXELS = 784
Progress = Callable[[str, int, int], None]
_Parts = dict[str, list[tuple[np.ndarray, np.ndarray]]]  # user -> (x, y) of train, of test


@dataclass(frozen=True)
class Femnist:
    """Handwritten digits and letters by some 3,500 writers, as LEAF's preprocess.sh writes them.

    A shard is one JSON file. x is uint8 [1, 28, 28], 255 the paper; LEAF's pixels
    are multiples of 1/255, so that rounding loses nothing (others move by 1/510
    at most). Faults, besides `leaf.read_users`: labels that are no integers in
    0..61; images not of 784 pixels; pixels that are no number in [0, 1].
    """

    @property
    def name(self) -> str:
        """The name in `subfleet.datasets.SETS`."""
        return "femnist"

    def shards(self, source: Path) -> list[Shard]:
        """The JSON files; see `leaf.shards`."""
        return leaf.shards(source)

    def layout(self, source: Path) -> Layout:
        """Images of 62 classes, by writer."""
        del source  # All of LEAF's files look alike.
        return Layout(NUM_CLASSES, SHAPE, scale=INK)

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """The writers of one file."""
        label = leaf.integer_below(NUM_CLASSES)
        for user in leaf.read_users(shard.path, faults):
            bound = f"an integer in 0..{NUM_CLASSES - 1}"
            y, labelled = leaf.labels_of(user, label, bound, faults)
            x, whole = _images(user.x, user.where, faults)
            x, y = x[labelled[whole]], y[labelled & whole]
            if len(y):
                yield ClientRows(user.name, x, y, np.full(len(y), shard.from_test))


def _images(rows: list[Any], where: str, faults: Faults) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [whole images, 1, 28, 28], and which rows are whole images, bool [rows]."""
    problems = [_problem(row) for row in rows]
    if any(problems):
        for number, problem in enumerate(problems):
            if problem:
                faults.found("wrong image", f"{where}, sample {number}{problem}")
        rows = [row for row, problem in zip(rows, problems, strict=True) if not problem]
    x = np.array(rows, dtype=np.float64).reshape(-1, PIXELS)
    whole = np.array([not problem for problem in problems], dtype=bool)
    return np.rint(x * 255).astype(np.uint8).reshape(-1, *SHAPE), whole


def _problem(row: Any) -> str:
    """What keeps a row from being 784 numbers, or ""."""
    if not isinstance(row, list) or len(row) != PIXELS:
        size = len(row) if isinstance(row, list) else "no"
        return f" has {size} pixels, not {PIXELS} (28 x 28); give images of that size"
    if not set(map(type, row)) <= {float, int}:
        number = next(n for n, pixel in enumerate(row) if type(pixel) not in (float, int))
        return f" has a pixel that is no number ({row[number]!r} at {number}); correct it"
    # Written so that NaN, which compares false, is found too.
    if not all(0 <= pixel <= 1 for pixel in set(row)):
        number = next(n for n, pixel in enumerate(row) if not 0 <= pixel <= 1)
        return (
            f", pixel {number} is {row[number]}, outside [0, 1]; "
            "scale the pixels or leave the sample out"
        )
    return ""


def open_femnist(
    source: str | Path,
    cache: str | Path | None = None,
    seed: int = 0,
    split: str = "seeded",
    progress: Progress | None = None,
) -> Store:
    """LEAF's FEMNIST from a folder: with `train/` and `test/`, or of JSON files, plain or gz.

    A user's train and test samples are joined; `split` (see `Store`) parts them
    again. In a folder of files those with "_test" in their name are the test
    part. The first call reads the JSON (about a minute a million samples) into a
    store in `cache`, by default $SUBFLEET_CACHE or ~/.cache/subfleet; later calls
    take milliseconds, as long as no file's name, size or time changed.
    `progress` is called with (what, done, total). InputError: see `Femnist`.
    """
    source = Path(source).expanduser()
    files = Femnist().shards(source)
    print_ = fingerprint(source, files)
    path = cache_folder(cache) / f"femnist-{print_[:20]}"
    try:
        read_manifest(path)
    except InputError:
        _prepare(path, source, files, print_, progress)
    return Store(path, seed, split)


def cache_folder(cache: str | Path | None = None) -> Path:
    """Where prepared data are kept: `cache`, else $SUBFLEET_CACHE, else ~/.cache/subfleet."""
    chosen = cache or os.environ.get("SUBFLEET_CACHE") or Path.home() / ".cache" / "subfleet"
    return Path(chosen).expanduser().absolute()


def fingerprint(source: Path, files: list[Shard]) -> str:
    """A hash of the folder and of its files' names, sizes and times."""
    facts: list[Any] = [VERSION, str(source.resolve())]
    for file in files:
        stat = file.path.stat()
        facts.append([str(file.path), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _prepare(
    path: Path,
    source: Path,
    files: list[Shard],
    print_: str,
    progress: Progress | None,
) -> None:
    users: _Parts = {}
    parts: dict[str, dict[bool, Path]] = {}
    for number, file in enumerate(files):
        if progress:
            progress("read", number, len(files))
        is_test = file.from_test
        for name, x, y, _ in Femnist().read(file, Faults()):
            seen = parts.setdefault(name, {})
            if is_test in seen:
                raise InputError(
                    f"user {name!r} is in {seen[is_test]} and again in {file.path}, both of the "
                    f"{'test' if is_test else 'train'} part; a user may be once in each part: "
                    "remove one"
                )
            seen[is_test] = file.path
            empty = (np.empty((0, *SHAPE), np.uint8), np.empty(0, np.int64))
            users.setdefault(name, [empty, empty])[int(is_test)] = (x, y)
    if progress:
        progress("read", len(files), len(files))
    if not users:
        raise InputError(f"{source} has no users in its {len(files)} files; give LEAF's output")
    facts = {"folder": str(source.resolve()), "files": len(files), "fingerprint": print_}
    write_store(
        path,
        _joined(users, progress),
        name="femnist",
        layout=Femnist().layout(source),
        source=facts,
    )


def _joined(users: _Parts, progress: Progress | None) -> Iterator[ClientRows]:
    for number, name in enumerate(sorted(users)):
        (x_train, y_train), (x_test, y_test) = users[name]
        from_test = np.repeat([False, True], [len(y_train), len(y_test)])
        x, y = np.concatenate([x_train, x_test]), np.concatenate([y_train, y_test])
        yield ClientRows(name, x, y, from_test)
        if progress:
            progress("write", number + 1, len(users))
