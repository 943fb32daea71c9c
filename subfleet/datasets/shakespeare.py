"""The complete works of Shakespeare: a client is a role, a row a window of its lines.

Source: Caldas et al., "LEAF: A Benchmark for Federated Settings" (2018), after
McMahan et al. (2017). The text is Project Gutenberg's eBook #100 of 1994, or
LEAF's JSON made of it (x a string of 80 characters, y the next one). LEAF's
rules give 36 plays, 1,129 roles and 4,226,158 windows of 80 characters.
"""

from __future__ import annotations

import gzip
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from subfleet.core.errors import InputError
from subfleet.datasets import leaf
from subfleet.datasets.federation import checked_number
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard

ALPHABET = "\n !\"&'(),-.0123456789:;>?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz}"
"""LEAF's 80 letters: a token is the number of its letter, 80 any other character."""

UNKNOWN = len(ALPHABET)
_SUFFIXES = (".txt", ".txt.gz")
_SHARD_BYTES = 48 << 20
_TOKENS = np.full(128, UNKNOWN, dtype=np.int8)
_TOKENS[[ord(letter) for letter in ALPHABET]] = np.arange(len(ALPHABET))

# Two spaces before a speaker and four before the lines that go on; the Comedy of Errors has none.
_SPEAKER, _GOES_ON = re.compile(r"  ([a-zA-Z][a-zA-Z ]*)\. (.*)"), re.compile(r"    (.*)")
_SPEAKER_COE, _GOES_ON_COE = re.compile(r"([a-zA-Z][a-zA-Z ]*)\. (.*)"), re.compile(r"(.*)")


@dataclass(frozen=True)
class Shakespeare:
    """The next character after `seq_len` others, by role of a play.

    `source` is the text (.txt, .txt.gz), a folder with it or with raw_data/, or
    LEAF's JSON. x is int8 [seq_len], tokens 0..80 of which 80 is any character
    outside `ALPHABET`; y is 0..79, and windows whose next character is outside are
    left out and counted. Faults, besides `leaf.read_users`: a text that cannot be
    decoded or has no plays; JSON windows that are no strings of `seq_len`, labels
    that are no single character.
    """

    seq_len: int = 80

    def __post_init__(self) -> None:
        checked_number("data.seq_len", self.seq_len, 1, 10_000, whole=True)

    @property
    def name(self) -> str:
        """The name in `subfleet.datasets.SETS`."""
        return "shakespeare"

    def shards(self, source: Path) -> list[Shard]:
        """The JSON files; else pieces of a text, each a share of the roles."""
        found = leaf.find_shards(source)
        if not found:
            found = [shard for file in _texts(source) for shard in self._pieces(file)]
        if not found:
            raise InputError(
                f"data folder {str(source)!r} has no .txt, .txt.gz, .json or .json.gz file; give "
                "the complete works as Project Gutenberg's eBook #100 of 1994, or LEAF's JSON"
            )
        return found

    def _pieces(self, file: Path) -> list[Shard]:
        """A window is `seq_len` times as large as its text, so a text makes several shards."""
        text_bytes = file.stat().st_size * (3 if file.suffix == ".gz" else 1)
        number = math.ceil(max(text_bytes, 1) * (self.seq_len + 8) / _SHARD_BYTES)
        return [
            Shard(f"{file.name} {piece} of {number}", file, items=(piece, number))
            for piece in range(number)
        ]

    def layout(self, source: Path) -> Layout:
        """Windows of `seq_len` tokens, 80 next characters."""
        del source  # Text and JSON give the same rows.
        return Layout(
            len(ALPHABET),
            (self.seq_len,),
            dtype="int8",
            overlap=self.seq_len - 1,
            vocabulary=len(ALPHABET) + 1,
        )

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """The roles of a JSON file, or of a piece of a text."""
        if not shard.items:
            yield from self._read_json(shard, faults)
            return
        piece, number = shard.items
        # Each piece parses the text, which takes a moment; one of them speaks for all.
        counting = faults if piece == 0 else Faults(skip=True)
        lines = _read_roles(shard.path, counting)
        short = 0
        for order, (role, spoken) in enumerate(lines.items()):
            if order % number == piece:
                tokens = tokens_of(window_text(spoken))
                short += len(tokens) <= self.seq_len
                yield from self._windows(role, tokens, shard, faults)
        what = f"{shard.path}: roles with no more than {self.seq_len} characters"
        leaf.note(faults, "role without a window", what, short)

    def _windows(
        self, role: str, tokens: np.ndarray, shard: Shard, faults: Faults
    ) -> Iterator[ClientRows]:
        if len(tokens) <= self.seq_len:
            return
        y = tokens[self.seq_len :].astype(np.int64)
        x = np.lib.stride_tricks.sliding_window_view(tokens, self.seq_len)[:-1]
        yield from _known(role, x, y, shard, faults)

    def _read_json(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        for user in leaf.read_users(shard.path, faults):
            y, sound = leaf.labels_of(user, _letter, "a single character", faults)
            for number, x in enumerate(user.x):
                if not isinstance(x, str) or len(x) != self.seq_len:
                    size = f"{len(x)} characters" if isinstance(x, str) else "no characters"
                    sound[number] = False
                    faults.found(
                        "wrong window",
                        f"{user.where}, sample {number} has {size} in x, not {self.seq_len}; "
                        "set data.seq_len to the file's or leave the sample out",
                    )
            text = "".join(x for x, good in zip(user.x, sound, strict=True) if good)
            tokens = tokens_of(text).reshape(-1, self.seq_len)
            yield from _known(user.name, tokens, y[sound], shard, faults)


def _known(
    role: str, x: np.ndarray, y: np.ndarray, shard: Shard, faults: Faults
) -> Iterator[ClientRows]:
    """The rows whose label is in the alphabet, if there are any."""
    known = y < UNKNOWN
    what = f"{shard.path}: role {role!r} has windows before a character that is no letter of LEAF's"
    leaf.note(faults, "label outside the alphabet", what, int((~known).sum()))
    if known.any():
        yield ClientRows(role, x[known], y[known], np.full(int(known.sum()), shard.from_test))


def _letter(y: object) -> int | None:
    return int(tokens_of(y)[0]) if isinstance(y, str) and len(y) == 1 else None


def tokens_of(text: str) -> np.ndarray:
    """The tokens of a text, int8 [characters].

    >>> tokens_of("Ay!é")
    array([25, 77,  2, 80], dtype=int8)
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return np.where(points < 128, _TOKENS[np.minimum(points, 127)], np.int8(UNKNOWN))


def window_text(lines: list[str]) -> str:
    r"""What windows are cut from: lines joined by spaces, runs of spaces made one.

    >>> window_text(["To be,  or not", "to be"])
    'To be, or not to be '
    """
    return re.sub("  +", " ", " ".join([*lines, ""]))


def _texts(source: Path) -> list[Path]:
    """The text files of `source`, else of its raw_data/."""
    if source.is_file():
        return [source] if source.name.endswith(_SUFFIXES) else []
    for folder in (source, source / "raw_data"):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        if found := [file for file in files if file.name.endswith(_SUFFIXES)]:
            return found
    return []


def _read_roles(file: Path, faults: Faults) -> dict[str, list[str]]:
    """Each role's lines; nothing where the text is a fault."""
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rb") as stream:
            text = stream.read().decode("utf-8-sig")
    except leaf.UNREADABLE as error:
        message = f"{file} cannot be decoded ({error}); the file is cut short or damaged"
        faults.found("damaged file", f"{message}: fetch it again")
        return {}
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); check its permissions") from None
    found = roles_of(plays_of(text))
    if not found:
        faults.found(
            "text without plays",
            f"{file} has no plays: a line with 'by William Shakespeare' below a title, then "
            "speakers indented by two spaces; give Project Gutenberg's eBook #100 of 1994",
        )
    return found


def plays_of(text: str) -> list[tuple[str, dict[str, list[str]]]]:
    """(title, {role: lines}) of each play, in order; poems have no roles and are left out."""
    plays: list[tuple[str, dict[str, list[str]]]] = []
    lines = text.splitlines()
    speaker, goes_on, errors = _SPEAKER, _GOES_ON, False
    role: str | None = None
    for number, line in enumerate(lines):
        if "by William Shakespeare" in line:
            role, title = None, _title_above(lines, number)
            errors = title == "THE COMEDY OF ERRORS"
            speaker = _SPEAKER_COE if errors else _SPEAKER
            goes_on = _GOES_ON_COE if errors else _GOES_ON
            plays.append((title, defaultdict(list)))
        elif not plays:
            continue
        elif match := speaker.match(line):
            # One role is written in several ways, such as SIR Toby and SIR TOBY.
            speaks = match[1].upper()
            role = None if errors and speaks.startswith("ACT ") else speaks
            if role:
                plays[-1][1][role].append(match[2])
        elif role and (match := goes_on.match(line)):
            if errors and match[1].startswith("<"):
                role = None
            else:
                plays[-1][1][role].append(match[1])
    return [play for play in plays if len(play[1]) > 1]


def _title_above(lines: list[str], number: int) -> str:
    """The title stands 2 to 7 lines above "by William Shakespeare"."""
    above = (lines[number - up].strip() for up in range(2, 8) if up <= number)
    return next((line for line in above if line), "")


def roles_of(plays: list[tuple[str, dict[str, list[str]]]]) -> dict[str, list[str]]:
    """The lines of each role with more than two, by LEAF's name: PLAY_ROLE."""
    found: dict[str, list[str]] = defaultdict(list)
    for title, roles in plays:
        for role, lines in roles.items():
            if len(lines) > 2:
                found[re.sub(r"\W+", "_", f"{title}_{role}".replace(" ", "_"))] += lines
    return dict(found)
