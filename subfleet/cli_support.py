"""What the commands share: how errors end a command, and how tables are printed."""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Annotated, Any

import typer

from subfleet.core.errors import InputError, RunFailed
from subfleet.platform.signals import terminable

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

STATUS_FAILED = 1
STATUS_BAD_INPUT = 2
STATUS_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


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


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=2))


def print_table(rows: Sequence[Mapping[str, Any]], *, title: str | None = None) -> None:
    """Rows as a table; numbers are set to the right, with thousands separated."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    first = rows[0] if rows else {}
    for i, (key, value) in enumerate(first.items()):
        is_number = isinstance(value, int | float)
        justify = "right" if is_number else "left"
        # A number or a name that wraps is unreadable; other texts may.
        table.add_column(key.replace("_", " "), justify=justify, no_wrap=is_number or i == 0)
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row.values()))
    console = Console()
    if not console.is_terminal:  # a file or a pipe need not wrap at 80 columns
        console = Console(width=160)
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
