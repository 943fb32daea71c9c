"""Words of the command lines that the papers' scripts share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def jobs(text: str) -> int:
    """A number of cells at a time."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 up")
    return int(text)


def minutes(text: str) -> float:
    """A limit of time."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0; give e.g. 90")
    return value


def tried(
    arguments: argparse.ArgumentParser, text: str, rows: Sequence[str]
) -> tuple[str, list[str]]:
    """ROW:KEY=VALUE,... as the row and its words."""
    row, _, words = text.partition(":")
    if row not in rows or "=" not in words:
        arguments.error(f"--try {text}: not of the form ROW:KEY=VALUE, such as {rows[0]}:key=0.01")
    return row, words.split(",")


def chosen(
    arguments: argparse.ArgumentParser, option: str, given: str | None, known: Sequence[str]
) -> list[str] | None:
    """The names given with commas between, each of which must be known."""
    if given is None:
        return None
    names = given.split(",")
    if wrong := [one for one in names if one not in known]:
        arguments.error(f"{option}: {wrong[0]!r} is none of {', '.join(known)}")
    return names
