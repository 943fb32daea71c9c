"""One page on some runs that can be sent to a colleague: it needs no network and no server."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import subfleet
from subfleet.core.errors import InputError
from subfleet.dashboards import charts, charts_clients
from subfleet.dashboards import report_tables as tables
from subfleet.dashboards.comparison import (
    AXES,
    Group,
    best_metric,
    common_target,
    data_sets,
    grouped,
    repeated,
)
from subfleet.dashboards.drawing import Picture
from subfleet.dashboards.read_runs import ReadRun, read_runs
from subfleet.dashboards.report_tables import Sheet
from subfleet.platform.files import write_atomic

MOST = 6  # groups of which pictures of their own are drawn
Say = Callable[[str], None]


@dataclass(frozen=True)
class Section:
    """A part of the page: tables and pictures under a heading."""

    name: str
    title: str
    text: str = ""
    sheets: list[Sheet] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.pictures and not any(sheet.rows for sheet in self.sheets)


def report(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    metric: str | None = None,
    target: float | None = None,
    title: str | None = None,
    say: Say = lambda text: None,
) -> Path:
    """Writes one self-contained HTML file on the runs in some folders and returns its path.

    Args:
        paths: Run folders, or folders that hold runs.
        out: The file, replaced if it is there.
        metric: Which accuracy the target is of; by default the first that a run has of
            `comparison.ACCURACIES`.
        target: The accuracy, 0–1, to which costs are compared; by default the highest whole per
            cent that all runs reach.
        title: Of the page.
        say: Hears, in a line each, what is being done.

    Raises:
        InputError: A folder holds no run, `out` cannot be written, no run has the metric, or the
            target is not between 0 and 1.
        RunFailed: The disk is full.
    """
    out = _checked(Path(out))
    say(f"reading {len(paths)} folder{'s' if len(paths) > 1 else ''} ...")
    runs = read_runs(paths)
    metric = _metric(runs, metric)
    if target is not None and not 0 < target <= 1:
        raise InputError(f"--target {target:g}: is not between 0 and 1; give e.g. 0.6")
    say(f"drawing {len(runs)} run{'s' if len(runs) > 1 else ''} ...")
    page = page_of(runs, metric=metric, target=target, title=title, say=say)
    try:
        # Names of folders may be no text at all.
        write_atomic(out, page.encode(errors="replace"))
    except OSError as error:
        raise InputError(
            f"-o {out}: cannot be written ({error.strerror}); give another file"
        ) from error
    return out


def _checked(out: Path) -> Path:
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"-o {out}: does not end in .html; give e.g. -o report.html")
    if not out.absolute().parent.is_dir():
        raise InputError(f"-o {out}: {out.parent} is no folder; make it, or give another file")
    return out


def _metric(runs: Sequence[ReadRun], wanted: str | None) -> str | None:
    if wanted is None or any(run.series(wanted) for run in runs):
        return wanted or best_metric(runs)
    known = sorted({key for run in runs for record in run.records for key in record})
    numbers = [key for key in known if any(run.series(key) for run in runs)]
    raise InputError(f"--metric {wanted}: no run has it; known: {', '.join(numbers) or 'none'}")


def page_of(
    runs: Sequence[ReadRun],
    *,
    metric: str | None,
    target: float | None = None,
    title: str | None = None,
    say: Say = lambda text: None,
) -> str:
    """The page as HTML; whatever comes from the runs is escaped."""
    import jinja2

    groups, sections = grouped(runs), []
    for part in _sections(groups, runs, metric, target):
        if not part.empty:
            sections.append(part)
            say(f"drawn: {part.title}")
    source = (resources.files("subfleet.dashboards") / "report.html").read_text()
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        title=title or _title(groups),
        runs=runs,
        groups=groups,
        flags=list(_flags(runs, groups)),
        sections=sections,
        version=subfleet.__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _title(groups: Sequence[Group]) -> str:
    names = ", ".join(group.label for group in groups[:3])
    return f"Runs of {names}" + (f" and {len(groups) - 3} more" if len(groups) > 3 else "")


def _flags(runs: Sequence[ReadRun], groups: Sequence[Group]) -> Iterator[str]:
    """What a reader has to know before comparing."""
    data = data_sets(runs)
    if len(data) > 1:
        yield (
            f"These runs train on different data ({'; '.join(data)}): their accuracies cannot be "
            "compared."
        )
    for group in groups:
        for seed, labels in repeated(group).items():
            yield f"{group.label}: seed {seed} comes {len(labels)} times ({', '.join(labels)})."
    common = {key for run in runs for key in charts.NAMES if run.series(key)}
    for run in runs:
        for note in run.notes:
            yield f"{run.label}: {note}."
        lacks = [charts.NAMES[key] for key in charts.NAMES if key in common and not run.series(key)]
        if lacks and run.records:
            yield f"{run.label}: has no {', '.join(lacks)}, which other runs have."


def _sections(
    groups: Sequence[Group], runs: Sequence[ReadRun], metric: str | None, target: float | None
) -> Iterator[Section]:
    yield Section("results", "Results", _MEANS, [tables.summary_sheet(groups)])
    yield Section("accuracy", "Accuracy and cost", pictures=list(_curves(groups, metric)))
    chosen = False
    if metric is not None and metric.startswith("acc"):
        chosen = target is None
        target = common_target(runs, metric) if chosen else target
    else:
        target = None  # what is better below is not reached
    if metric is not None and target is not None:
        yield Section(
            "target",
            f"To {charts.NAMES.get(metric, metric)} {target:g}",
            "Means over the runs that get there." + (_CHOSEN if chosen else ""),
            [tables.target_sheet(groups, metric, target)],
            _some(charts.target_bars(groups, metric, target)),
        )
    yield Section(
        "fairness",
        "Fairness",
        "Of clients' own networks on their own test parts, before merging, in the last round "
        "that tested them.",
        [tables.fairness_sheet(groups)],
        _some(
            charts_clients.distribution(groups),
            charts.fairness_bars(groups),
            charts.tier_bars(groups),
        ),
    )
    shown = groups[:MOST]
    left = f" The first {MOST} of {len(groups)} groups." if len(groups) > MOST else ""
    networks = [draw(g) for g in shown for draw in _NETWORKS]
    yield Section("networks", "Networks", _OF_FIRST + left, pictures=_some(*networks))
    yield Section("data", "Data", pictures=_some(*map(charts_clients.skew, _by_data(runs))))
    yield Section(
        "rounds",
        "Rounds",
        "Of each group's first run that has it, the round that left out the most clients." + left,
        pictures=_some(charts.phase_bars(groups), *map(charts_clients.timeline, shown)),
    )
    sheets = [tables.runs_sheet(groups), tables.settings_sheet(groups)]
    sheets.append(tables.environment_sheet(runs))
    yield Section("runs", "Runs and what they differ in", sheets=sheets)


_MEANS = (
    "Mean ± sample standard deviation over the runs of a group, which differ in their seed alone: "
    "the last known value of a metric, and costs of all rounds so far."
)
_CHOSEN = " No target was given: it is the highest whole per cent that all finished runs reach."
_OF_FIRST = "Of each group's first run that has it."
_NETWORKS = (charts_clients.architectures, charts_clients.coverage)


def _curves(groups: Sequence[Group], metric: str | None) -> Iterator[Picture]:
    keys = [key for key in charts.NAMES if key.startswith("acc")]
    if metric is not None and metric not in charts.NAMES:
        keys.append(metric)
    drawn = [charts.curves(groups, key, "rounds") for key in (*keys, "loss_train", "loss_global")]
    if metric is not None:
        drawn += [charts.curves(groups, metric, axis) for axis in AXES if axis != "rounds"]
    yield from _some(*drawn)


def _some(*pictures: Picture | None) -> list[Picture]:
    return [picture for picture in pictures if picture is not None]


def _by_data(runs: Sequence[ReadRun]) -> list[ReadRun]:
    """The first run of each partition of data, `MOST` at most."""
    first: dict[str, ReadRun] = {}
    for run in runs:
        facts: Any = run.environment.get("data") or {}
        first.setdefault(repr((facts.get("name"), run.config.get("data"))), run)
    return list(first.values())[:MOST]
