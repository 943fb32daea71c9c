"""FEMNIST as LEAF writes it: JSON files of writers, read once into a store.

Source: Caldas et al., "LEAF: A Benchmark for Federated Settings" (2018). A file
holds {"users": [...], "num_samples": [...], "user_data": {user: {"x": [[784
floats]], "y": [ints]}}}; x is 28 x 28 row by row in [0, 1], 1 is paper; y is
0-9, A-Z, a-z.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from subfleet.core.errors import InputError
from subfleet.core.scaling import INK
from subfleet.datasets.reader import ClientRows
from subfleet.datasets.store import VERSION, Store, read_manifest
from subfleet.datasets.writing import write_store

NUM_CLASSES = 62
SHAPE = (1, 28, 28)
PIXELS = 784
Progress = Callable[[str, int, int], None]
_Parts = dict[str, list[tuple[np.ndarray, np.ndarray]]]  # user -> (x, y) of train, of test


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
    `progress` is called with (what, done, total). InputError: see `read_users`.
    """
    source = Path(source).expanduser()
    files = find_files(source)
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


def find_files(source: Path) -> list[tuple[Path, bool]]:
    """The JSON files of `source` and whether each is of the test part, in order of their names."""
    if not source.exists():
        raise InputError(
            f"data folder {str(source)!r} does not exist; give the folder that holds LEAF's "
            "train/ and test/, e.g. --set data.source=/path/to/leaf/femnist/data"
        )
    if source.is_file():
        return [(source, False)]
    files = [(file, False) for file in _json_files(source / "train")]
    files += [(file, True) for file in _json_files(source / "test")]
    if not files:
        files = [(file, "_test" in file.name) for file in _json_files(source)]
    if not files:
        raise InputError(
            f"data folder {str(source)!r} has no .json or .json.gz file, nor train/ or test/ "
            "with one; give the folder that LEAF's preprocess.sh filled"
        )
    return files


def _json_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.name.endswith((".json", ".json.gz")))


def fingerprint(source: Path, files: list[tuple[Path, bool]]) -> str:
    """A hash of the folder and of its files' names, sizes and times."""
    facts: list[Any] = [VERSION, str(source.resolve())]
    for file, _ in files:
        stat = file.stat()
        facts.append([str(file), stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _prepare(
    path: Path,
    source: Path,
    files: list[tuple[Path, bool]],
    print_: str,
    progress: Progress | None,
) -> None:
    users: _Parts = {}
    parts: dict[str, dict[bool, Path]] = {}
    for number, (file, is_test) in enumerate(files):
        if progress:
            progress("read", number, len(files))
        for name, x, y in read_users(file):
            seen = parts.setdefault(name, {})
            if is_test in seen:
                raise InputError(
                    f"user {name!r} is in {seen[is_test]} and again in {file}, both of the "
                    f"{'test' if is_test else 'train'} part; a user may be once in each part: "
                    "remove one"
                )
            seen[is_test] = file
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
        num_classes=NUM_CLASSES,
        input_shape=SHAPE,
        scale=INK,
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


def read_users(file: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The users of one LEAF file: name, x uint8 [n, 1, 28, 28], y int64 [n].

    Only users listed under "users" are read. InputError, with the file and the
    user: JSON cut short or of another shape; a user listed twice or without data;
    x and y of different lengths; labels that are no integers in 0..61; images
    not of 784 pixels; pixels that are no number in [0, 1].
    """
    data = _load(file)
    users, user_data = data.get("users"), data.get("user_data")
    if not isinstance(users, list) or not isinstance(user_data, dict):
        raise InputError(
            f"{file} lacks LEAF's 'users' (a list) or 'user_data' (an object); "
            "give files that LEAF's preprocess.sh wrote"
        )
    listed: set[str] = set()
    for name in users:
        if not isinstance(name, str):
            raise InputError(f"{file}: user {name!r} is no string; correct 'users'")
        where = f"{file}: user {name!r}"
        if name in listed:
            raise InputError(f"{where} is listed twice in 'users'; remove one")
        listed.add(name)
        if name not in user_data:
            raise InputError(f"{where} is in 'users' but not in 'user_data'; the file is damaged")
        rows = user_data[name]
        if not isinstance(rows, dict) or not all(isinstance(rows.get(k), list) for k in "xy"):
            raise InputError(f"{where} has no lists 'x' and 'y'; the file is damaged")
        if len(rows["x"]) != len(rows["y"]):
            raise InputError(
                f"{where} has {len(rows['x'])} images in x but {len(rows['y'])} labels in y; "
                "they must be equally many"
            )
        yield name, _images(rows["x"], where), _labels(rows["y"], where)


def _load(file: Path) -> dict:
    opened = gzip.open if file.suffix == ".gz" else open
    remedy = "the file is cut short or damaged: fetch or make it again"
    try:
        with opened(file, "rb") as stream:
            data = json.load(stream)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file} is no whole JSON ({error.msg} at character {error.pos}); {remedy}"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file} cannot be decoded ({error}); {remedy}") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); check its permissions") from None
    if not isinstance(data, dict):
        raise InputError(f"{file} holds a {type(data).__name__}, not LEAF's object; {remedy}")
    return data


def _images(rows: list, where: str) -> np.ndarray:
    """uint8 [n, 1, 28, 28]: LEAF's pixels are multiples of 1/255, so rounding loses nothing.

    Other values move by 1/510 at most.
    """
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != PIXELS:
            size = len(row) if isinstance(row, list) else "no"
            raise InputError(
                f"{where}, sample {number} has {size} pixels, not {PIXELS} (28 x 28); "
                "give images of that size"
            )
    try:
        x = np.array(rows, dtype=np.float64).reshape(len(rows), PIXELS)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where} has a pixel that is no number ({error}); correct it") from None
    # Written so that NaN, which compares false, is found too.
    wrong = ~((x >= 0) & (x <= 1))
    if wrong.any():
        sample, pixel = np.argwhere(wrong)[0]
        raise InputError(
            f"{where}, sample {sample}, pixel {pixel} is {x[sample, pixel]}, outside [0, 1]; "
            "scale the pixels or leave the sample out"
        )
    return np.rint(x * 255).astype(np.uint8).reshape(-1, *SHAPE)


def _labels(labels: list, where: str) -> np.ndarray:
    """int64 [n] in 0..61."""
    for number, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < NUM_CLASSES:
            raise InputError(
                f"{where}, sample {number} has label {label!r}, "
                f"not an integer in 0..{NUM_CLASSES - 1}; correct it or leave the sample out"
            )
    return np.array(labels, dtype=np.int64)
