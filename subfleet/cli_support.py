"""What the commands share: how errors end a command, and how tables are printed."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subfleet.core.errors import InputError, RunFailed
from subfleet.platform.signals import terminable

if TYPE_CHECKING:
    from rich.console import Console

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

STATUS_FAILED = 1
STATUS_BAD_INPUT = 2
STATUS_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_WIDE = 160  # columns of a file or a pipe, which need not wrap at 80
_READABLE = 32  # columns at which a text that wraps can still be read


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command end with the right status and one message on stderr.

    A SIGTERM unwinds it like Ctrl-C, and ends it with status 143.
    """

    @functools.wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            with terminable() as take_sigterm:
                take_sigterm()
                command(*args, **kwargs)
        except InputError as error:
            _end(f"error: {error}", STATUS_BAD_INPUT, kwargs.get("debug", False))
        except RunFailed as error:
            _end(f"run failed: {error}", STATUS_FAILED, kwargs.get("debug", False))
        except KeyboardInterrupt:
            _end("interrupted", STATUS_INTERRUPTED, kwargs.get("debug", False))
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer ends these itself
        except Exception as error:
            # Of the user's own algorithm, model or data set, or a defect of ours.
            _end(_unforeseen(error), STATUS_FAILED, kwargs.get("debug", False))

    return guarded


def loading(*, always: bool = False) -> None:
    """Say on stderr, before torch is imported, that this takes seconds.

    Commands that only show something say so on a terminal alone, unless `always`.
    """
    if "torch" not in sys.modules and (always or sys.stderr.isatty()):
        typer.echo("loading torch ...", err=True)


def _unforeseen(error: Exception) -> str:
    text = shorten(str(error), 300, placeholder=" …")
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"run failed: {what}; --debug shows where"


def _end(message: str, status: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    typer.echo(message, err=True)
    raise typer.Exit(status)


def stderr() -> Console:
    """The console of what is not a result: standard output is for those."""
    from rich.console import Console

    return Console(stderr=True)


def waiting(
    what: str, *, first_s: float | None = None
) -> AbstractContextManager[Callable[[str], None]]:
    """Says on stderr what the block does, where that takes more than two seconds."""
    from subfleet.dashboards.console import waiting as wait

    return wait(stderr(), what, first_s=first_s)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2))


def print_table(
    rows: Sequence[Mapping[str, Any]], *, title: str | None = None, hide: Sequence[str] = ()
) -> None:
    """Rows as a table; numbers are set to the right, with thousands separated.

    Columns of `hide` are left out, in this order, where there is no room for them, and a
    line says so. A terminal has its width; elsewhere COLUMNS counts, if set.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    console = _console()
    rows, hidden = fitted(rows, console.width, hide)
    breaks = "\n" if _needed(rows) > console.width else " "
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    first = rows[0] if rows else {}
    for i, (key, value) in enumerate(first.items()):
        is_number = isinstance(value, int | float)
        justify = "right" if is_number else "left"
        # A number or a name that wraps is unreadable; other texts may.
        header = key.replace("_", breaks if is_number else " ")
        fixed = is_number or i == 0
        # What is cut off, of a path say, cannot be had back; what is folded can.
        overflow = "ellipsis" if fixed else "fold"
        table.add_column(header, justify=justify, no_wrap=fixed, overflow=overflow)
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row.values()))
    console.print(table)
    if hidden:
        typer.echo(f"hidden: {', '.join(hidden)} (a wider terminal, or --json)")


def _console() -> Console:
    from rich.console import Console

    console = Console()
    if console.is_terminal or os.environ.get("COLUMNS", "").isdigit():
        return console
    return Console(width=_WIDE)


def fitted(
    rows: Sequence[Mapping[str, Any]], columns: int, hide: Sequence[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows without what does not fit so many columns, and the headers left out.

    >>> fitted([{"layer": "conv1", "kind": "conv", "params": 10_000}], 18, ["kind", "params"])
    ([{'layer': 'conv1', 'params': 10000}], ['kind'])
    """
    kept, hidden = [dict(row) for row in rows], []
    for key in hide:
        if kept and _needed(kept) > columns:
            kept = [{name: cell for name, cell in row.items() if name != key} for row in kept]
            hidden.append(key.replace("_", " "))
    return kept, hidden


def _needed(rows: Sequence[Mapping[str, Any]]) -> int:
    """The columns at which a table is readable; texts that wrap need no more than some."""
    if not rows:
        return 0
    total = 0
    for i, (key, first) in enumerate(rows[0].items()):
        widest = max(len(key), *(len(_cell(row[key])) for row in rows))
        wraps = i > 0 and not isinstance(first, int | float)
        total += (min(widest, _READABLE) if wraps else widest) + 3  # and the space between
    return total


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
