"""What a run says of its engine: a line for each choice that is new, a few at most."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from textwrap import shorten

from subfleet.platform.record import Choice

MOST_LINES = 5


def engine_notes(before: Sequence[Choice], new: Sequence[Choice]) -> list[str]:
    """Lines on the entries `new` at the end of a record that held `before`.

    Of variants that appear after the first ones nothing is said: an algorithm may draw
    others in every round.

    >>> first = [Choice("(8,)", "cpu", "vmap", 16, reason="1.2 ms a client's step; loop 3.1")]
    >>> engine_notes([], first)
    ["engine: (8,) vmap of 16, 1.2 ms a client's step; loop 3.1"]
    >>> less = Choice("(8,)", "cpu", "vmap", 8, from_round=3, reason="out of memory")
    >>> engine_notes(first, [less, Choice("(4,)", "cpu", "loop", from_round=3)])
    ['engine: (8,) vmap of 8 from round 3 on, out of memory']
    >>> engine_notes([], [Choice(f"({n},)", "cpu", "loop") for n in range(9)])[-2:]
    ['engine: (4,) loop', 'engine: and 4 more in engine.json']
    """
    known = {choice.variant for choice in before}
    told = [choice for choice in new if not known or choice.variant in known]
    lines = [_line(choice, known) for choice in told[:MOST_LINES]]
    if len(told) > MOST_LINES:
        lines.append(f"engine: and {len(told) - MOST_LINES} more in engine.json")
    return lines


def _line(choice: Choice, known: Collection[str]) -> str:
    words = ["engine:"]
    if choice.variant != "()":  # the only one of a network without units
        words.append(shorten(choice.variant, 60, placeholder=" …"))
    words.append(choice.name)
    if choice.variant in known:
        words.append(f"from round {choice.from_round} on")
    line = " ".join(words)
    return f"{line}, {choice.reason}" if choice.reason else line
