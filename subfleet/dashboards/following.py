"""A run followed from outside, by what its folder tells; nothing is written there."""

from __future__ import annotations

import json
import os
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from subfleet.core.errors import InputError
from subfleet.dashboards.console import duration
from subfleet.platform.metrics import Observer, RoundRecord, tell
from subfleet.platform.runfolder import RunFolder
from subfleet.platform.stretches import Stretch, stretches

POLL_S = 0.5
RECENT = 20  # rounds by whose pace the time left is told when somebody joins
GRACE_S = 30.0  # in which another coordinator may take the place of one that died
START_S = 600.0  # which a run may take for its first round, where nothing else is known
SOON_S = 3.0  # of silence, in which nobody wonders yet
QUIET_S = 60.0  # after which a living run without a new round is spoken of
SEVERAL = 3  # of the longest rounds: without a new one for so long a run has stopped


class MetricsTail:
    """The whole lines of a growing `metrics.jsonl`, also where a resume cuts some of them."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.damaged = 0  # whole lines that are no record, and were passed over
        self.lines = 0  # all that were begun: records, damaged ones, and one that is cut short
        self._at = 0
        self._last = b""
        self._whole = 0

    def read(self) -> tuple[list[RoundRecord], bool]:
        """The records that came since, and whether they start anew with the first there is."""
        try:
            with open(self.path, "rb") as file:
                # A line holds wall-clock times: where the last one is as it was, all before it is.
                file.seek(self._at - len(self._last))
                anew = file.read(len(self._last)) != self._last
                if anew:
                    self._at, self._last, self.damaged, self._whole = 0, b"", 0, 0
                    file.seek(0)
                # What comes after the last end of a line is being written, or was cut short.
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            anew, self._at, self._last = self._at > 0, 0, b""
            self.lines = self._whole = 0
            return [], anew
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole:
            self._at, self._last = self._at + sum(map(len, whole)), whole[-1]
        self._whole += len(whole)
        self.lines = self._whole + len(lines) - len(whole)
        records = [record for line in whole if (record := _record(line)) is not None]
        self.damaged += len(whole) - len(records)
        return records, anew


def _record(line: bytes) -> RoundRecord | None:
    try:
        record = json.loads(line)
        return record if isinstance(record["round"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Ended:
    """How a run ended: with a summary, or it only seems to have stopped, and `why` says how."""

    rounds_done: int
    rounds: int
    summary: dict[str, Any] | None = None
    why: str = ""


class Following:
    """Tells an observer what a run's folder tells, as if it sat in the run's own process.

    It hears `on_start` when the following begins, and again where a resume repeats rounds, where
    a phase begins, or where the run is to last longer than it was; then `on_round` of rounds that
    are new, without their coverage. It hears `on_end` of a run with a summary.
    """

    def __init__(
        self, folder: RunFolder, observer: Observer, *, patience_s: float | None = None
    ) -> None:
        """`patience_s`: how long a run without a process here may be silent until it has stopped.

        InputError where `config.toml` cannot be read.
        """
        self.folder, self.observer = folder, observer
        self._patience_s = patience_s
        self._config_time = folder.config.stat().st_mtime_ns
        self._rounds = _rounds(folder)
        self._newest = _newest_time(folder)
        # How old it is by the clock that wrote it; from then on our own clock counts.
        self._sign_s = time.monotonic() - max(0.0, time.time() - self._newest / 1e9)
        self._was_busy = self._said = False
        self._tail = MetricsTail(folder.metrics)
        self._damaged = 0
        self.records: list[RoundRecord] = self._tail.read()[0]

    def follow(self) -> Ended:
        """Follows until the run has ended, or seems to have stopped."""
        self.begin()
        while (ended := self.look()) is None:
            time.sleep(POLL_S)
        if ended.summary is not None:
            self.observer.on_end(ended.summary)
        return ended

    def begin(self) -> None:
        """Tells how the run stands."""
        self._begin(len(self.records))
        if not self.records:
            tell([self.observer], "waiting for the first round ...")

    def look(self) -> Ended | None:
        """One look at the folder: tells what is new; how the run ended, once it has."""
        try:
            busy = self.folder.busy  # before its files: what it wrote until it let go is then seen
            self._read()
            newest = _newest_time(self.folder)
        except FileNotFoundError:
            return self._ended("its folder is gone, as of a run that fails in its first round")
        now = time.monotonic()
        if newest != self._newest:
            self._newest, self._sign_s, self._said = newest, now, False
        silent_s = now - self._sign_s
        if busy:
            self._was_busy = True
            if silent_s > max(QUIET_S, SEVERAL * self._longest_s()):
                self._say(f"no new round for {duration(silent_s)}; its process is alive")
            return None
        if (summary := self._summary()) is not None:
            return self._ended("", summary)
        patience_s = self._patience()
        if silent_s > patience_s:
            return self._ended(
                "no process on this machine runs in it, and it has not written anything for "
                f"{duration(silent_s)}"
            )
        if silent_s > SOON_S:
            self._say(
                "no process on this machine runs in it: it may run elsewhere, or have stopped; "
                f"waiting up to {duration(patience_s - silent_s)} for a sign of life"
            )
        return None

    def _read(self) -> None:
        """Takes in new lines, and a configuration that has changed."""
        new, anew = self._tail.read()
        time_now = self.folder.config.stat().st_mtime_ns
        longer, self._config_time = time_now != self._config_time, time_now
        if longer:
            self._rounds = _rounds(self.folder)
        if anew:
            self.records, new = new, []
            tell([self.observer], f"the run was taken up again after round {self._done}")
        if anew or longer:
            self._begin(len(self.records))
        for record in new:
            self.records.append(record)
            if len(self.records) == 1 or record.get("phase") != self.records[-2].get("phase"):
                self._begin(len(self.records) - 1)
            self.observer.on_round(record, {})
        if self._tail.damaged > self._damaged:
            tell([self.observer], f"{self.folder.metrics}: a damaged line is passed over")
        self._damaged = self._tail.damaged

    def _begin(self, known: int) -> None:
        """Tells how the run stands after its first `known` records."""
        total = max(self._rounds, self._done)
        recent = [one for one in self.records[:known] if "total" in (one.get("seconds") or {})]
        info = {
            "rounds": total,
            "start": self.records[known - 1]["round"] if known else 0,
            "phases": _phases(self.records, total),
            "recent": recent[-RECENT:],
            "since_s": self._since_s(),
            "run_folder": str(self.folder.path),
        }
        self.observer.on_start(info)

    @property
    def _done(self) -> int:
        return self.records[-1]["round"] if self.records else 0

    def _since_s(self) -> float:
        """How long ago the newest round was written."""
        try:
            return max(0.0, time.time() - self.folder.metrics.stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def _longest_s(self) -> float:
        """The longest of the last rounds; 0 before the first."""
        seconds = [(one.get("seconds") or {}).get("total", 0.0) for one in self.records[-RECENT:]]
        return max(seconds, default=0.0)

    def _patience(self) -> float:
        if self._patience_s is not None:
            return self._patience_s
        if self._was_busy:
            return GRACE_S
        return max(GRACE_S, SEVERAL * self._longest_s()) if self.records else START_S

    def _summary(self) -> dict[str, Any] | None:
        """The summary of the rounds that are there; that of a run that went on later is old."""
        summary = self.folder.read_summary()
        # A line is a round, also one that cannot be read.
        there = (self._done, self._tail.lines)
        return summary if summary is not None and summary["rounds"] in there else None

    def _ended(self, why: str, summary: dict[str, Any] | None = None) -> Ended:
        done = self._done if summary is None else summary["rounds"]
        return Ended(done, max(self._rounds, done), summary, why)

    def _say(self, text: str) -> None:
        """Once, until the run gives the next sign of life."""
        if not self._said:
            self._said = True
            tell([self.observer], text)


def _rounds(folder: RunFolder) -> int:
    """How many rounds a run is to have; InputError where its configuration does not say so."""
    try:
        return int(tomllib.loads(folder.config.read_text())["run"]["rounds"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder.config}: does not say how many rounds there are ({error!r}); it must be as "
            "`subfleet run` wrote it"
        ) from error


def _newest_time(folder: RunFolder) -> int:
    """When anything in the folder was last written, in nanoseconds since 1970."""
    newest = 0
    with os.scandir(folder.path) as items:
        for item in items:
            with suppress(FileNotFoundError):  # files are written under other names, then renamed
                newest = max(newest, item.stat(follow_symlinks=False).st_mtime_ns)
    return newest


def _phases(records: Sequence[RoundRecord], rounds: int) -> list[Stretch]:
    """The phases as far as they have come; what is left belongs to the last of them."""
    known = {record["round"]: record.get("phase") or "" for record in records}
    last = known[records[-1]["round"]] if records else ""
    return stretches(lambda round: known.get(round, last), rounds)


def rounds_table(records: Sequence[RoundRecord], most: int) -> Table:
    """The last rounds, a row each; a cell is empty where a round has no such value."""
    table = Table(title=f"the last {min(most, len(records))} rounds", title_justify="left")
    for heading in ("round", *(heading for heading, _, _ in _SHOWN), "s"):
        table.add_column(heading, justify="right")
    for record in records[-most:]:
        seconds = (record.get("seconds") or {}).get("total")
        table.add_row(
            str(record["round"]),
            *(_cell(record.get(key), form) for _, key, form in _SHOWN),
            _cell(seconds, ".2f"),
        )
    return table


_SHOWN = (
    ("acc", "acc_global", ".3f"),
    ("local", "acc_local", ".3f"),
    ("worst 10%", "acc_local_worst10", ".3f"),
    ("loss", "loss_train", ".3f"),
    ("clients", "clients", ",.0f"),
    ("clients/s", "clients_per_s", ".1f"),
)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
