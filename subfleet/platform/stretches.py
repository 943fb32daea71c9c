"""The phases of a run as stretches of rounds, for whoever watches it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Stretch(NamedTuple):
    """Rounds `first` to `last` belong to the phase `name`."""

    name: str
    first: int
    last: int


def stretches(name_of: Callable[[int], str], rounds: int) -> list[Stretch]:
    """The phases of rounds 1 to `rounds`, in order; one that comes back is there again.

    >>> stretches(lambda round: "search" if round == 3 else "train", 5)[:2]
    [Stretch(name='train', first=1, last=2), Stretch(name='search', first=3, last=3)]
    """
    found: list[Stretch] = []
    name, first = "", 0
    for round in range(1, rounds + 1):
        if (here := name_of(round)) != name or not first:
            if first:
                found.append(Stretch(name, first, round - 1))
            name, first = here, round
    return [*found, Stretch(name, first, rounds)] if first else found


def name_at(phases: Sequence[Stretch], round: int) -> str:
    """The phase of a round; of one beyond the ends the nearest, and "" where there are none.

    >>> phases = [Stretch("search", 1, 1), Stretch("train", 2, 5)]
    >>> [name_at(phases, round) for round in (1, 2, 5, 6)]
    ['search', 'train', 'train', 'train']
    """
    if not phases:
        return ""
    return phases[max(0, bisect_right(phases, round, key=lambda one: one.first) - 1)].name
