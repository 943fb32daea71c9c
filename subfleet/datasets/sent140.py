"""Sentiment140: a client is a Twitter user, a row a tweet, the label whether it is positive.

Source: Go, Bhayani, Huang, "Twitter Sentiment Classification using Distant
Supervision" (2009); as federated data Caldas et al., "LEAF: A Benchmark for
Federated Settings" (2018). The publisher's files are CSV in Latin-1 without a
header: polarity (0, 2 neutral, 4), id, date, query, user, text. LEAF's JSON has
rows [id, date, query, user, text, part] for x, and 0 or 1 for y.
"""

from __future__ import annotations

import csv
import functools
import itertools
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from subfleet.core.errors import InputError
from subfleet.datasets import leaf
from subfleet.datasets.federation import checked_number
from subfleet.datasets.glove import (
    PADDING,
    SPECIAL,
    UNKNOWN,
    embedding,
    read_glove,
    read_tokens,
)
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard

NUM_CLASSES = 2
POLARITIES = {"0": 0, "4": 1}
NEUTRAL = "2"
_COLUMNS, _USER, _TEXT = 6, 4, 5  # of a CSV row
_JSON_TEXT = 4
_SHARD_BYTES = 16 << 20
_TOKEN = re.compile(r"[\w']+|[.,!?;]")


@dataclass(frozen=True)
class Sent140:
    """Positive or negative, by Twitter user.

    `source` is LEAF's JSON, else a CSV file or a folder with some, itself or under
    raw_data/; of those, files with "test" in their name are the test part. x is
    [seq_len] token ids, int16 or, for a large vocabulary, int32: 0 is padding, 1 is
    unknown. With `glove`, a file of `subfleet.datasets.glove`, the other ids are 2 +
    the token's line there; without, they are hashed to 2..vocabulary - 1. Longer
    tweets are cut; one without tokens counts as one unknown token. Neutral tweets
    are left out and counted. Faults: rows with the wrong number of columns,
    polarities other than 0, 2 and 4, rows without a user.
    """

    seq_len: int = 25
    glove: str = ""
    vocabulary: int = 10_000

    def __post_init__(self) -> None:
        checked_number("data.seq_len", self.seq_len, 1, 10_000, whole=True)
        checked_number("data.vocabulary", self.vocabulary, SPECIAL + 1, 2**31, whole=True)
        if self.glove:
            # Shards are read in processes with another working folder.
            path = str(Path(self.glove).expanduser().absolute())
            object.__setattr__(self, "glove", path)

    @property
    def name(self) -> str:
        """The name in `subfleet.datasets.SETS`."""
        return "sent140"

    def shards(self, source: Path) -> list[Shard]:
        """The JSON files; else pieces of the CSV files, of some 16 MB."""
        found = leaf.find_shards(source)
        if not found:
            found = [shard for file in _csv_files(source) for shard in _pieces(file)]
        if not found:
            raise InputError(
                f"data folder {str(source)!r} has no .csv, .json or .json.gz file, nor has its "
                "raw_data/; give the publisher's CSV or LEAF's JSON"
            )
        return found

    def embedding(self) -> np.ndarray | None:
        """The word vectors of `glove`, float32 [vocabulary, size]; zeros for the first two."""
        return embedding(*read_glove(Path(self.glove))) if self.glove else None

    def layout(self, source: Path) -> Layout:
        """Token ids of two classes; in CSV a user's rows lie anywhere."""
        return Layout(
            NUM_CLASSES,
            (self.seq_len,),
            dtype=_dtype(self._size()),
            spread=not leaf.find_shards(source),
            vocabulary=self._size(),
        )

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """The users of a JSON file, or of a piece of a CSV."""
        if not shard.items:
            yield from self._read_json(shard, faults)
            return
        texts: dict[str, list[str]] = defaultdict(list)
        labels: dict[str, list[int]] = defaultdict(list)
        for user, text, label in _csv_rows(shard, faults):
            texts[user].append(text)
            labels[user].append(label)
        for user, own in texts.items():
            yield self._rows(user, own, np.array(labels[user], dtype=np.int64), shard)

    def _read_json(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        label = leaf.integer_below(NUM_CLASSES)
        for user in leaf.read_users(shard.path, faults):
            y, sound = leaf.labels_of(user, label, "0 or 1", faults)
            for number, row in enumerate(user.x):
                fits = isinstance(row, list) and len(row) > _JSON_TEXT
                if not fits or not isinstance(row[_JSON_TEXT], str):
                    sound[number] = False
                    faults.found(
                        "wrong columns",
                        f"{user.where}, sample {number} has x {str(row)[:60]!r}, not a list of "
                        "id, date, query, user, text, part; give LEAF's own file",
                    )
            own = [row[_JSON_TEXT] for row, good in zip(user.x, sound, strict=True) if good]
            if own:
                yield self._rows(user.name, own, y[sound], shard)

    def _rows(self, user: str, texts: list[str], y: np.ndarray, shard: Shard) -> ClientRows:
        x = np.full((len(texts), self.seq_len), PADDING, dtype=np.int32)
        for row, text in zip(x, texts, strict=True):
            ids = [self._id(token) for token in tokens_of(text)[: self.seq_len]] or [UNKNOWN]
            row[: len(ids)] = ids
        return ClientRows(user, x.astype(_dtype(self._size())), y, np.full(len(y), shard.from_test))

    def _size(self) -> int:
        """Token ids run from 0 to this, exclusive."""
        return SPECIAL + _tokens(self.glove)[1] if self.glove else self.vocabulary

    def _id(self, token: str) -> int:
        if self.glove:
            return _tokens(self.glove)[0].get(token, UNKNOWN)
        return _hashed(token, self.vocabulary)


def tokens_of(text: str) -> list[str]:
    """Words, and each of . , ! ? ; by itself, in lower case: LEAF's rule.

    >>> tokens_of("Well, I can't :) WAIT!!")
    ['well', ',', 'i', "can't", 'wait', '!', '!']
    """
    return _TOKEN.findall(text.lower())


@functools.lru_cache(maxsize=100_000)
def _hashed(token: str, vocabulary: int) -> int:
    return SPECIAL + zlib.crc32(token.encode("utf-8", "surrogatepass")) % (vocabulary - SPECIAL)


@functools.lru_cache(maxsize=1)
def _tokens(glove: str) -> tuple[dict[str, int], int]:
    """The id of each token of a GloVe file, of one that is there twice the first; its lines."""
    ids: dict[str, int] = {}
    tokens = read_tokens(glove)
    for number, token in enumerate(tokens, start=SPECIAL):
        ids.setdefault(token, number)
    return ids, len(tokens)


def _dtype(vocabulary: int) -> str:
    return "int16" if vocabulary <= 2**15 else "int32"


def _csv_files(source: Path) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix == ".csv" else []
    for folder in (source, source / "raw_data"):
        if found := sorted(folder.glob("*.csv")):
            return found
    return []


def _pieces(file: Path) -> list[Shard]:
    """Ranges of bytes; a line belongs to the range that it begins in."""
    size = file.stat().st_size
    number = max(math.ceil(size / _SHARD_BYTES), 1)
    cuts = [size * piece // number for piece in range(number + 1)]
    from_test = "test" in file.name
    return [
        Shard(f"{file.name} {piece} of {number}", file, from_test, items=(first, last))
        for piece, (first, last) in enumerate(itertools.pairwise(cuts))
    ]


def _csv_rows(shard: Shard, faults: Faults) -> Iterator[tuple[str, str, int]]:
    """(user, text, label) of the rows that begin in the shard's bytes.

    A line is a row: no field of this file holds a line's end, so that it can be cut
    anywhere, and an opened quote that is not closed spoils its own line alone.
    """
    first, lines = _lines(shard)
    before: int | None = None
    for number, line in enumerate(lines):
        row = _parsed(line)
        if len(row) == _COLUMNS and row[_USER] and row[0] in POLARITIES:
            yield row[_USER], row[_TEXT], POLARITIES[row[0]]
            continue
        if before is None:
            before = _lines_before(shard.path, first)
        where = f"{shard.path}, line {before + number + 1}"
        if len(row) != _COLUMNS:
            faults.found(
                "wrong columns",
                f"{where} has {len(row) or 'no whole'} columns, not {_COLUMNS} (polarity, id, "
                f"date, query, user, text): {line[:60]!r}; correct or remove it",
            )
        elif not row[_USER]:
            faults.found("empty user", f"{where} has no user in column 5; correct or remove it")
        elif row[0] == NEUTRAL:
            leaf.note(faults, "neutral", f"{where} is the first that is neither 0 nor 4")
        else:
            message = f"{where} has polarity {row[0]!r}, not 0, 2 or 4"
            faults.found("unknown label", f"{message}; correct or remove it")


def _parsed(line: str) -> list[str]:
    """The fields of one line; none where a quote is not closed, as where a file is cut."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error as error:
        if "end of data" in str(error):
            return []
    try:
        # A quote within a quoted field that is not doubled: what the field holds is still plain.
        return next(csv.reader([line]), [])
    except csv.Error:
        return []


def _lines(shard: Shard) -> tuple[int, list[str]]:
    """Where the shard's first line begins in the file, and its lines."""
    first, last = shard.items
    try:
        with shard.path.open("rb") as stream:
            if first:
                stream.seek(first - 1)
                stream.readline()
            begin = stream.tell()
            data = stream.read(max(last - begin, 0))
            if data and not data.endswith(b"\n"):
                data += stream.readline()
    except OSError as error:
        raise InputError(f"{shard.path} cannot be read ({error}); check its permissions") from None
    # Latin-1 has characters that splitlines would end a line at.
    lines = data.decode("latin-1").split("\n")
    return begin, [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _lines_before(file: Path, position: int) -> int:
    """How many lines end before a byte of the file; read only for a message."""
    count = 0
    with file.open("rb") as stream:
        while position > 0 and (chunk := stream.read(min(position, 1 << 20))):
            count += chunk.count(b"\n")
            position -= len(chunk)
    return count
