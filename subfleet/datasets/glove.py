"""GloVe word vectors: text files of a token and its numbers a line.

Source: Pennington, Socher, Manning, "GloVe: Global Vectors for Word
Representation" (2014). Token ids in this package are 0 for padding, 1 for an
unknown token, and 2 + the token's line.
"""

from __future__ import annotations

import gzip
import math
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from subfleet.core.errors import InputError

PADDING, UNKNOWN, SPECIAL = 0, 1, 2
_BATCH = 1000  # lines decoded at a time
_NUMBER = re.compile(r"-?\d+\.\d+([eE][-+]?\d+)?")


def read_glove(path: str | Path) -> tuple[list[str], np.ndarray]:
    """The tokens in file order, and their vectors, float32 [tokens, dimensions].

    `path` is a text file, plain, .gz or .zip; of an archive with several files,
    `ARCHIVE.zip/FILE.txt` is one. InputError, with file and line: lines with too
    few or too many columns, what is no finite number, text that is not UTF-8, a
    file cut short. No line may be left out, since tokens are known by their line.
    """
    tokens: list[str] = []
    vectors: list[np.ndarray] = []
    for names, rests, dimensions, first in _batches(Path(path).expanduser()):
        tokens += names
        vectors.append(_numbers(Path(path), rests, dimensions, first))
    return tokens, np.concatenate(vectors)


def read_tokens(path: str | Path) -> list[str]:
    """The tokens alone, in file order; the numbers are counted but not decoded."""
    return [token for names, *_ in _batches(Path(path).expanduser()) for token in names]


def embedding(tokens: list[str], vectors: np.ndarray) -> np.ndarray:
    """A table by token id, float32 [2 + tokens, dimensions]: padding and unknown are zero.

    >>> embedding(["the"], np.ones((1, 2), np.float32)).tolist()
    [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]
    """
    if len(tokens) != len(vectors):
        raise InputError(f"{len(tokens)} tokens, but {len(vectors)} vectors; give one for each")
    return np.concatenate([np.zeros((SPECIAL, vectors.shape[1]), np.float32), vectors])


def _batches(path: Path) -> Iterator[tuple[list[str], list[str], int, int]]:
    """(tokens, the rest of their lines, dimensions, number of the first line), batch by batch."""
    with _opened(path) as stream:
        dimensions, first = 0, 1
        while lines := _some_lines(path, stream):
            if not dimensions:
                dimensions = _dimensions(path, lines[0])
            parts = [
                _parted(path, first + number, line, dimensions) for number, line in enumerate(lines)
            ]
            yield [token for token, _ in parts], [rest for _, rest in parts], dimensions, first
            first += len(lines)
    if first == 1:
        raise InputError(f"{path} is empty; give GloVe's text file")


def _some_lines(path: Path, stream: IO[bytes]) -> list[bytes]:
    # Bytes end at \n alone; some tokens hold other characters that text would end at.
    try:
        return list(islice(stream, _BATCH))
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        message = f"{path} cannot be decoded ({error}); it is cut short or damaged"
        raise InputError(f"{message}: fetch it again") from None


def _dimensions(path: Path, line: bytes) -> int:
    dimensions = len(line.split()) - 1
    if dimensions < 2:
        raise InputError(
            f"{path}, line 1 has {dimensions + 1} columns, not a token and its numbers; remove "
            "the line if it is word2vec's header, or give GloVe's text file"
        )
    return dimensions


def _parted(path: Path, number: int, line: bytes, dimensions: int) -> tuple[str, str]:
    """The token and the rest of a line. A token may hold spaces, so the numbers count."""
    where = f"{path}, line {number}"
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 ({error}); give GloVe's own file") from None
    columns = text.rsplit(" ", dimensions)
    token = columns[0]
    # A token's further word that looks like one of the numbers is a number too many.
    too_many = " " in token and _NUMBER.fullmatch(token.split(" ")[-1])
    if len(columns) <= dimensions or not token or too_many:
        count = len(text.split(" "))
        raise InputError(
            f"{where} has {count} columns, not a token and {dimensions} numbers as line 1 has; "
            "the file is cut short or damaged: fetch it again"
        )
    return token, text[len(token) + 1 :]


def _numbers(path: Path, rests: list[str], dimensions: int, first: int) -> np.ndarray:
    """float32 [lines, dimensions]; the slow way only to say which number is wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeprecationWarning)  # NumPy's word for text that is left
        try:
            flat = np.fromstring(" ".join(rests), dtype=np.float32, sep=" ")
        except (DeprecationWarning, ValueError):
            flat = np.empty(0, np.float32)
    if len(flat) == len(rests) * dimensions and np.isfinite(flat).all():
        return flat.reshape(len(rests), dimensions)
    for number, rest in enumerate(rests, start=first):
        for column, text in enumerate(rest.split(" "), start=2):
            if not _is_finite(text):
                raise InputError(
                    f"{path}, line {number}, column {column} is {text!r}, not a finite number; "
                    "the file is damaged: fetch it again"
                )
    raise InputError(f"{path}, lines {first} to {first + len(rests) - 1} cannot be decoded")


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(np.float32(text))
    except ValueError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The text of a file or of an archive's member, as bytes; never unpacked to disk."""
    archive, member = (path.parent, path.name) if path.parent.suffix == ".zip" else (path, "")
    try:
        if archive.suffix == ".zip" and archive.is_file():
            with zipfile.ZipFile(archive) as opened, opened.open(_member(opened, member)) as stream:
                yield stream
        elif path.suffix == ".gz":
            with gzip.open(path, "rb") as stream:
                yield stream  # type: ignore[misc]
        else:
            with path.open("rb") as stream:
                yield stream
    except zipfile.BadZipFile as error:
        message = f"{path} cannot be decoded ({error}); it is cut short or damaged"
        raise InputError(f"{message}: fetch it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); give GloVe's text file") from None


def _member(archive: zipfile.ZipFile, wanted: str) -> str:
    names = [name for name in archive.namelist() if name.endswith(".txt")]
    if wanted in names or (not wanted and len(names) == 1):
        return wanted or names[0]
    raise InputError(
        f"{archive.filename} holds {', '.join(names) or 'no .txt file'}; name one of its files, "
        f"e.g. {archive.filename}/{names[0] if names else 'glove.6B.300d.txt'}"
    )
