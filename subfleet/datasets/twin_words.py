"""The words and sentences of the synthetic plays, and tables for spelling many at once.

A sentence is a row of slots; a slot's kind says from which list its word comes.
Entries carry the space before them, so that sentences are entries joined.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from subfleet.datasets.shakespeare import ALPHABET

# A few words of each kind, the commoner ones first. Names begin with every letter.
WORDS = {
    "noun": "lord king heart love night sword crown blood hand eye father queen grief honour grave "
    "friend tongue heaven storm ghost throne letter brother daughter sea ring fool soldier church "
    "wine horse mirror candle jewel zeal quarrel exile maze oxen",
    "verb": "love see know fear bring leave swear forget hear kill keep find curse praise follow "
    "break serve steal judge seek vex quench banish amaze reject waken mock",
    "adjective": "good sweet noble poor false old dear gentle cold black bloody proud foul royal "
    "quiet brave mad weary fair heavy jealous crazed vexed exiled humble",
    "determiner": "the my thy his a this our that your her no every some",
    "pronoun": "I thou he she we they you who",
    "helper": "shall will must doth may would did cannot hath can should dare",
    "preposition": "of to in with from for upon against before without beneath o'er",
    "exclamation": "O alas nay come hark why fie marry well peace pray 'tis",
    "reason": "for as since",
    "link": "and but for if when as yet though because till",
    "name": "Antonio Beatrice Cassius Diana Edgar Falstaff Gertrude Hamlet Iago Juliet Katharine "
    "Lear Macbeth Nerissa Othello Portia Quince Romeo Silvia Timon Ursula Viola Warwick Xanthe "
    "York Zephyr",
    "act": "1 2 3 4 5",
    "move": "Exit Enter Exeunt Dies Aside",
}
_AFTER_BRACKETS = {"reason", "move"}
_EVEN = {"name", "act"}  # no word of these is commoner than others
_MARKS = {
    "end": [".", "!", "?", ";", ":", "."],
    "comma": [","],
    "dash": [" -"],
    "open": [" ("],
    "close": [")"],
    "from": [" ["],
    "to": ["]"],
}
_SENTENCES = """
exclamation comma determiner adjective noun comma pronoun helper verb determiner noun end
pronoun helper verb determiner noun preposition determiner adjective noun end
determiner adjective noun helper verb pronoun comma link determiner noun helper verb end
link pronoun verb determiner noun comma determiner noun preposition noun helper verb pronoun end
name comma determiner noun helper verb determiner adjective noun end
determiner noun preposition name dash determiner adjective noun dash helper verb determiner noun end
pronoun verb name open reason pronoun helper verb determiner noun close comma preposition noun end
helper pronoun verb determiner noun preposition name comma determiner adjective adjective noun end
exclamation comma name comma verb pronoun preposition determiner noun end
verb determiner adjective noun comma link verb determiner noun preposition determiner noun end
adjective name comma pronoun helper verb preposition determiner adjective noun end
determiner noun comma determiner noun comma link determiner adjective noun preposition name end
from move name act to
""".strip().splitlines()


class Words(NamedTuple):
    """All entries, and the sentences over kinds of them, as arrays."""

    letters: np.ndarray  # int8: all entries' letters, one after another
    start: np.ndarray  # [2 * entries], int64: where an entry's letters start
    length: np.ndarray  # [2 * entries], int64; the second half has capitals
    kind: np.ndarray  # [entries], int64
    first: np.ndarray  # [kinds], int64: the first entry of each kind
    count: np.ndarray  # [kinds], int64
    even: np.ndarray  # [kinds], bool: no word of the kind is commoner than others
    sentences: np.ndarray  # [sentences, slots], int64: kinds, -1 for none
    shortest: int  # the fewest letters of a sentence


@functools.cache
def words() -> Words:
    """The tables, made once a process."""
    lists = {kind: [_spaced(kind, word) for word in text.split()] for kind, text in WORDS.items()}
    lists |= _MARKS
    kinds = list(lists)
    entries = [entry for kind in kinds for entry in lists[kind]]
    count = np.array([len(lists[kind]) for kind in kinds])
    spelled = entries + [_capital(entry) for entry in entries]
    length = np.array([len(entry) for entry in spelled])
    slots = [[kinds.index(kind) for kind in line.split()] for line in _SENTENCES]
    sentences = np.full((len(slots), max(map(len, slots))), -1)
    for row, line in zip(sentences, slots, strict=True):
        row[: len(line)] = line
    least = [min(map(len, lists[kind])) for kind in kinds]
    return Words(
        letters=np.array([ALPHABET.index(c) for c in "".join(spelled)], dtype=np.int8),
        start=np.cumsum(length) - length,
        length=length,
        kind=np.repeat(np.arange(len(kinds)), count),
        first=np.cumsum(count) - count,
        count=count,
        even=np.array([kind in _EVEN for kind in kinds]),
        sentences=sentences,
        shortest=min(sum(least[kind] for kind in line) for line in slots),
    )


def _spaced(kind: str, word: str) -> str:
    return word if kind in _AFTER_BRACKETS else f" {word}"


def _capital(entry: str) -> str:
    """The entry with its first letter large: " 'tis" becomes " 'Tis"."""
    at = next((i for i, c in enumerate(entry) if c.isalpha()), 0)
    return entry[:at] + entry[at : at + 1].upper() + entry[at + 1 :]


def spell(entries: np.ndarray) -> np.ndarray:
    """The letters of entries, one after another, int8."""
    table = words()
    length = table.length[entries]
    ends = np.cumsum(length)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - length, length)
    return table.letters[np.repeat(table.start[entries], length) + within]
