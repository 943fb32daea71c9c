"""LEAF's JSON files, which FEMNIST, CelebA, Shakespeare and Sentiment140 share.

Source: Caldas et al., "LEAF: A Benchmark for Federated Settings" (2018). A file
holds {"users": [...], "num_samples": [...], "user_data": {user: {"x": [...],
"y": [...]}}}; what x and y are is the data set's affair. Files are decoded user
by user, so that memory holds one user and a few megabytes of text.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from subfleet.core.errors import InputError
from subfleet.datasets.reader import Faults, Shard

SUFFIXES = (".json", ".json.gz")
UNREADABLE = (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError)
"""What decoding a damaged file raises, besides OSError."""

_CUT = "the file is cut short or damaged: fetch or make it again"
_CHUNK = 8 << 20  # characters: several users, since the last one is decoded again


class User(NamedTuple):
    """One user of a LEAF file, as decoded: `x` and `y` are equally long and not empty."""

    name: str
    x: list[Any]
    y: list[Any]
    where: str  # "FILE: user 'NAME'", to begin a message with


def shards(source: Path) -> list[Shard]:
    """One shard for each JSON file of `source`, train files first, each part by name.

    `source` is a folder with train/ and test/, a folder of files, of which those
    with "_test" in their name are the test part, or one file. InputError where
    there is none.
    """
    if not source.exists():
        raise InputError(
            f"data folder {str(source)!r} does not exist; give the folder that holds LEAF's "
            "train/ and test/, e.g. --set data.source=/path/to/leaf/data/femnist/data"
        )
    found = find_shards(source)
    if not found:
        raise InputError(
            f"data folder {str(source)!r} has no .json or .json.gz file, nor train/ or test/ "
            "with one; give the folder that LEAF's preprocess.sh filled"
        )
    return found


def find_shards(source: Path) -> list[Shard]:
    """As `shards`, and empty where there is no JSON file."""
    if source.is_file():
        fits = source.name.endswith(SUFFIXES)
        return [Shard(source.name, source, _is_test(source))] if fits else []
    parts = [(f"{part}/", part == "test", _json_files(source / part)) for part in ("train", "test")]
    found = [Shard(head + file.name, file, test) for head, test, files in parts for file in files]
    return found or [Shard(f.name, f, _is_test(f)) for f in _json_files(source)]


def _is_test(file: Path) -> bool:
    return "_test" in file.name


def _json_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES))


def read_users(file: Path, faults: Faults) -> Iterator[User]:
    """The users of one LEAF file that are listed under "users", in the order of their data.

    Faults, with the file and the user: JSON cut short or of another shape (users
    before the cut are kept), a user listed twice, given twice or without data,
    an empty user, x and y of different lengths. `num_samples` is not looked at.
    """
    try:
        listed = _listed(file, faults)
        seen: set[str] = set()
        for key, name, rows in _members(file):
            if key != "user_data" or name not in listed:
                continue
            where = f"{file}: user {name!r}"
            if name in seen:
                faults.found("duplicate user", f"{where} is twice in 'user_data'; remove one")
                continue
            seen.add(name)
            if _sound(rows, where, faults):
                yield User(name, rows["x"], rows["y"], where)
    except _Damaged as error:
        faults.found("damaged file", str(error))
        return
    for name in sorted(listed - seen):
        faults.found(
            "user without data",
            f"{file}: user {name!r} is in 'users' but not in 'user_data'; the file is damaged",
        )


def _listed(file: Path, faults: Faults) -> set[str]:
    """The names under "users". LEAF writes them first, so this seldom reads further."""
    users, has_data = None, False
    for key, _, value in _members(file):
        has_data = has_data or key == "user_data"
        users = value if key == "users" else users
        if users is not None and (has_data or key == "user_data"):
            break
    if not isinstance(users, list) or not has_data:
        raise _Damaged(
            f"{file} lacks LEAF's 'users' (a list) or 'user_data' (an object); "
            "give files that LEAF's preprocess.sh wrote"
        )
    listed: set[str] = set()
    for name in users:
        if not isinstance(name, str):
            faults.found("wrong name", f"{file}: user {name!r} is no string; correct 'users'")
        elif name in listed:
            message = f"{file}: user {name!r} is listed twice in 'users'; remove one"
            faults.found("duplicate user", message)
        else:
            listed.add(name)
    return listed


def _sound(rows: Any, where: str, faults: Faults) -> bool:
    if not isinstance(rows, dict) or not all(isinstance(rows.get(k), list) for k in "xy"):
        faults.found("user without data", f"{where} has no lists 'x' and 'y'; the file is damaged")
    elif len(rows["x"]) != len(rows["y"]):
        faults.found(
            "unequal x and y",
            f"{where} has {len(rows['x'])} samples in x but {len(rows['y'])} labels in y; "
            "they must be equally many",
        )
    elif not rows["y"]:
        faults.found("empty user", f"{where} has no samples; it must have one at least: remove it")
    else:
        return True
    return False


def labels_of(
    user: User, label: Callable[[Any], int | None], bound: str, faults: Faults
) -> tuple[np.ndarray, np.ndarray]:
    """The user's labels, int64 [rows], and which are known, bool [rows].

    A y of which `label` makes None is a fault, and 0 among the labels; `bound` says
    in the message what a label has to be.
    """
    labels = [label(y) for y in user.y]
    for number, known in enumerate(labels):
        if known is None:
            faults.found(
                "unknown label",
                f"{user.where}, sample {number} has label {user.y[number]!r}, not {bound}; "
                "correct it or leave the sample out",
            )
    sound = np.array([known is not None for known in labels], dtype=bool)
    return np.array([known or 0 for known in labels], dtype=np.int64), sound


def integer_below(num_classes: int) -> Callable[[Any], int | None]:
    """A label as it stands in JSON: an integer in 0..num_classes - 1, and None for what is not.

    >>> [integer_below(2)(value) for value in (1, 2, True, "1")]
    [1, None, None, None]
    """
    return lambda y: y if type(y) is int and 0 <= y < num_classes else None


def note(faults: Faults, kind: str, message: str, number: int = 1) -> None:
    """Counts `number` rows that are left out by rule: they are no fault and never an error."""
    if number:
        faults.counts[kind] += number
        faults.examples.setdefault(kind, message)


class _Damaged(Exception):
    """A file that cannot be decoded any further; says why."""


def _members(file: Path) -> Iterator[tuple[str, str, Any]]:
    """(key, "", value) of the top object's members; of "user_data", (key, user, data) each.

    An empty "user_data" gives ("user_data", "", None) once.
    """
    text = _Text(file)
    try:
        if text.next() != "{":
            text.expect_object()
        for key in text.names():
            if key == "user_data" and text.next() == "{":
                empty = True
                for name in text.names():
                    empty = False
                    yield key, name, text.value()
                if empty:
                    yield key, "", None
            else:
                # "user_data" that is no object is as good as missing.
                yield "" if key == "user_data" else key, "", text.value()
        if text.next():
            raise text.cut("something follows the object", text.before + text.at)
    finally:
        text.stream.close()


class _Text:
    """JSON text, decoded value by value from as much of the file as that takes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.decoder = json.JSONDecoder()
        self.text, self.at, self.before, self.ended = "", 0, 0, False
        opened = gzip.open if file.suffix == ".gz" else open
        try:
            self.stream = io.TextIOWrapper(opened(file, "rb"), "utf-8-sig")  # type: ignore[arg-type]
        except OSError as error:
            raise self.unreadable(error) from None

    def unreadable(self, error: OSError) -> InputError:
        return InputError(f"{self.file} cannot be read ({error}); check its permissions")

    def cut(self, message: str, at: int) -> _Damaged:
        return _Damaged(f"{self.file} is no whole JSON ({message} at character {at}); {_CUT}")

    def more(self) -> bool:
        """Reads as much again as is held already; False at the end of the file."""
        if self.ended:
            return False
        self.before += self.at
        self.text, self.at = self.text[self.at :], 0
        try:
            chunk = self.stream.read(max(_CHUNK, len(self.text)))
        except UNREADABLE as error:
            raise _Damaged(f"{self.file} cannot be decoded ({error}); {_CUT}") from None
        except OSError as error:
            raise self.unreadable(error) from None
        self.text += chunk
        self.ended = not chunk
        return not self.ended

    def next(self) -> str:
        """The next character that is no white space, not consumed; "" at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def value(self) -> Any:
        """The next value, consumed."""
        self.next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # Half a value looks wrong, too: only the end of the file tells.
                position = self.before + error.pos
                if not self.more():
                    raise self.cut(error.msg, position) from None
            # Too deep, or an integer of thousands of digits, which Python does not convert.
            except (RecursionError, ValueError) as error:
                raise _Damaged(f"{self.file} cannot be decoded ({error}); {_CUT}") from None
            else:
                # A number may go on beyond what is read so far, by "e-1" say.
                size = end - self.at
                if end + 2 < len(self.text) or not self.more():
                    self.at += size
                    return value

    def names(self) -> Iterator[str]:
        """The names in the object that begins here; the caller consumes each one's value."""
        mark = "{"
        while True:
            self.at += len(mark)
            if mark == "{" and self.next() == "}":
                break
            if self.next() != '"':
                raise self.cut("a key is missing", self.before + self.at)
            key = self.value()
            if self.next() != ":":
                raise self.cut("a colon is missing", self.before + self.at)
            self.at += 1
            yield key
            mark = self.next()
            if mark == "}":
                break
            if mark != ",":
                raise self.cut("a comma is missing", self.before + self.at)
        self.at += 1

    def expect_object(self) -> None:
        """Raises what is wrong with a file that does not begin with an object."""
        kind = type(self.value()).__name__
        raise _Damaged(f"{self.file} holds a {kind}, not LEAF's object; {_CUT}")
