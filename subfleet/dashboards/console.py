"""Progress of a run on the terminal, and the table at its end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column, Table
from rich.text import Text

from subfleet.platform.clock import TimeLeft
from subfleet.platform.stretches import Stretch, name_at

SLOW_S = 2.0  # a round that lasts longer shows how far it has come
DOING = {
    "try": "{} variants tried out",
    "train": "{} clients",
    "evaluate": "evaluating {} clients",
}


def duration(seconds: float) -> str:
    """Seconds as a person reads them.

    >>> duration(5.2), duration(83), duration(7262)
    ('5s', '1m23s', '2h01m')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class LoggedWarnings:
    """An `Observer` for runs that nobody watches: logs the warnings, and other notes as info."""

    def on_start(self, info: dict[str, Any]) -> None:
        """Log `info["warnings"]`."""
        for warning in info.get("warnings", ()):
            logging.getLogger("subfleet").warning(warning)

    def on_note(self, text: str) -> None:
        """Log the note, which may be a warning."""
        level = logging.WARNING if text.startswith("warning: ") else logging.INFO
        logging.getLogger("subfleet").log(level, text.removeprefix("warning: "))

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        """Nothing to say."""

    def on_end(self, summary: dict[str, Any]) -> None:
        """Nothing to say."""

    def close(self) -> None:
        """Nothing to give back."""


class _Live(ProgressColumn):
    """A column of a bar that asks for its text whenever the bar is drawn."""

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True))
        self._now = text

    def render(self, task: Task) -> Text:
        """What is to be said now."""
        del task
        return Text(self._now())


class ConsoleProgress:
    """An `Observer`: a live line on a terminal, else one plain line every few seconds.

    Warnings come first, a line each. Where a run has several phases the line names the one
    that goes on; in a round that lasts for seconds it says what is done of how much: clients
    trained, or evaluated, or variants whose ways of computing were tried out.
    Writes to stderr unless given another console, so that stdout stays for results.
    Accuracy and loss are of the last round that had them.
    """

    def __init__(
        self, total_rounds: int, console: Console | None = None, *, interval_s: float = 5.0
    ) -> None:
        self._total = total_rounds
        self._console = console or Console(stderr=True)
        self._interval_s = interval_s
        self._phases: Sequence[Stretch] = ()
        self._several = False
        self._left = TimeLeft(())
        self._left_s: float | None = None
        self._done = 0
        self._round_s = 0.0  # when the round that goes on began
        self._within = ""  # what is done of how much of it
        self._last: dict[str, Any] = {}
        self._printed_s = -float("inf")
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def on_start(self, info: dict[str, Any]) -> None:
        """Show the warnings, then the bar, at `info["start"]` rounds done.

        It may be called again: a run whose coordinator was lost begins anew. Who joins a run
        that goes on gives the last of its records as `recent`, and in `since_s` how many seconds
        ago the newest was written.
        """
        if self._progress is not None:
            self._progress.stop()
        for warning in info.get("warnings", ()):
            self._plain(f"warning: {warning}")
        self._total = info.get("rounds", self._total)
        self._done, self._within = info.get("start", 0), ""
        self._phases = info.get("phases") or [Stretch("", 1, self._total)]
        self._several = len({phase.name for phase in self._phases}) > 1
        self._round_s = time.monotonic() - info.get("since_s", 0.0)
        self._catch_up(info.get("recent", ()))
        if self._console.is_terminal:
            self._progress = Progress(
                _Live(self._head),
                BarColumn(bar_width=None),
                _Live(self._text),
                console=self._console,
                transient=False,
            )
            self._task = self._progress.add_task("", total=self._total, completed=self._done)
            self._progress.start()

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        """Show the round; plain lines only every few seconds, and for the last round."""
        now = time.monotonic()
        self._remember(record)
        self._done, self._round_s, self._within = record["round"], now, ""
        self._left_s = self._left.update(name_at(self._phases, self._done), now)
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done)
        else:
            self._print(now, at_once=self._done == self._total)

    def on_progress(self, done: int, total: int, doing: str) -> None:
        """Show how far the round has come; by plain lines only where it outlasts their interval."""
        now = time.monotonic()
        self._within = DOING[doing].format(f"{done}/{total}")
        # Of the three it is training that a round's time goes by.
        share = {"try": 0.0, "train": done / max(1, total), "evaluate": 1.0}[doing]
        if now - self._round_s >= SLOW_S:
            phase = name_at(self._phases, self._done + 1)
            self._left_s = self._left.within(phase, share, now)
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done + share)
        elif now - self._round_s >= max(self._interval_s, SLOW_S):
            self._print(now)

    def on_note(self, text: str) -> None:
        """Show the note, above the bar where there is one."""
        self._plain(text)

    def on_end(self, summary: dict[str, Any]) -> None:
        """Leave the last state of the bar on the screen."""
        self.close()

    def close(self) -> None:
        """Give the terminal back; may be called twice, and must be after a failure."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _catch_up(self, recent: Sequence[Mapping[str, Any]]) -> None:
        """Take in rounds that were done before: their pace, and their last values."""
        seconds = [record["seconds"]["total"] for record in recent]
        now = self._round_s - sum(seconds)
        self._left, self._left_s = TimeLeft(self._phases, self._done - len(recent), now), None
        for record, lasted in zip(recent, seconds, strict=True):
            now += lasted
            self._remember(record)
            self._left_s = self._left.update(name_at(self._phases, record["round"]), now)
        if recent and not self._console.is_terminal:
            self._print(time.monotonic())

    def _remember(self, record: Mapping[str, Any]) -> None:
        # NaN is no loss, either: that of a round in which nothing was trained.
        known = {key: value for key, value in record.items() if value is not None}
        self._last |= {key: value for key, value in known.items() if value == value}

    def _print(self, now: float, *, at_once: bool = False) -> None:
        if at_once or now - self._printed_s >= self._interval_s:
            self._printed_s = now
            self._plain(f"{self._head()}  {self._text()}".rstrip())

    def _head(self) -> str:
        """The phase, where there are several, and the last round done, or the one that goes on."""
        within = self._within and time.monotonic() - self._round_s >= SLOW_S
        round = self._done + 1 if within else self._done
        parts = [name_at(self._phases, round)] if self._several else []
        parts.append(f"round {round}/{self._total}")
        if within:
            parts.append(self._within)
        return "  ".join(parts)

    def _text(self) -> str:
        parts = []
        for key, name, form in (
            ("acc_global", "acc", ".3f"),
            ("loss_train", "loss", ".3f"),
            ("clients_per_s", "clients/s", ".1f"),
        ):
            if key in self._last:
                parts.append(f"{name} {self._last[key]:{form}}")
        if "sim_time" in self._last:
            parts.append(f"sim {duration(self._last['sim_time'])}")
            lost = {key: self._last.get(key, 0) for key in ("late", "dropped")}
            parts += [f"{count} {key}" for key, count in lost.items() if count]
        if self._left_s is not None:
            parts.append(f"{duration(self._left_s)} left")
        return "  ".join(parts)

    def _plain(self, text: str) -> None:
        # Never wrapped: a log file has no width.
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)


@contextmanager
def waiting(
    console: Console, what: str, *, first_s: float | None = None, interval_s: float = 10.0
) -> Iterator[Callable[[str], None]]:
    """Says what the block does, and for how long, where that takes more than two seconds.

    Then again every `interval_s`. Yields a function that takes what is done from then on.
    """
    now = what
    over = threading.Event()

    def change(to: str) -> None:
        nonlocal now
        now = to

    def say() -> None:
        began, wait_s = time.monotonic(), SLOW_S if first_s is None else first_s
        while not over.wait(wait_s):
            wait_s = interval_s
            words = f"{now} ... {duration(time.monotonic() - began)}"
            console.print(words, soft_wrap=True, markup=False, highlight=False)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield change
    finally:
        over.set()
        thread.join()


class Preparation:
    """Says every few seconds how far the preparation of a data set has come.

    Short ones pass without a word.
    """

    def __init__(self, console: Console, *, interval_s: float = SLOW_S) -> None:
        self._console = console
        self._interval_s = interval_s
        self._said_s = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of `what` are over."""
        now = time.monotonic()
        if now - self._said_s >= self._interval_s:
            self._said_s = now
            self._console.print(
                f"preparing data: {what} {done}/{total}", markup=False, highlight=False
            )


def final_table(rows: Iterable[Mapping[str, Any]], title: str | None = None) -> Table:
    """One line a tier; a row has tier, clients, params, mflops and accuracy (0–1), or None."""
    table = Table(title=title, title_justify="left")
    table.add_column("tier")
    for heading in ("clients", "parameters", "MFLOPs", "accuracy"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            escape(str(row["tier"])),
            _cell(row.get("clients"), ",.0f"),
            _cell(row.get("params"), ",.0f"),
            _cell(row.get("mflops"), ",.2f"),
            _cell(row.get("accuracy"), ".3f"),
        )
    return table


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else format(value, form)


def simulated(summary: Mapping[str, Any]) -> str:
    """What a run took on its devices, in words; "" where they have no profile.

    >>> simulated({"total_sim_seconds": 7262.0, "total_late": 12, "total_dropped": 3})
    'simulated: 2h01m, 12 clients late, 3 dropped'
    >>> simulated({"total_sim_seconds": 9.0, "total_energy_j": 1234.5})
    'simulated: 9s, 0 clients late, 0 dropped, 1,234.5 J'
    """
    if "total_sim_seconds" not in summary:
        return ""
    late, dropped = summary.get("total_late", 0), summary.get("total_dropped", 0)
    words = f"{duration(summary['total_sim_seconds'])}, {late:,} clients late, {dropped:,} dropped"
    if "total_energy_j" in summary:
        words += f", {summary['total_energy_j']:,.1f} J"
    return f"simulated: {words}"


def print_end(
    rows: Iterable[Mapping[str, Any]],
    run_folder: object,
    console: Console | None = None,
    *,
    summary: Mapping[str, Any] | None = None,
) -> None:
    """The final table, then the run folder alone on the last line of stdout, never wrapped.

    With a `summary` a line between them says what the run took on the fleet's devices.
    """
    console = console or Console()
    console.print(final_table(rows))
    if words := simulated(summary or {}):
        console.print(words, soft_wrap=True, markup=False, highlight=False)
    console.print(str(run_folder), soft_wrap=True, markup=False, highlight=False)
