"""The report's tables: numbers of groups and runs, and what they differ in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from subfleet.dashboards.comparison import (
    AXES,
    Group,
    Spread,
    different,
    environments,
    fairness_by_tier,
    spread,
    to_target,
)
from subfleet.dashboards.console import duration
from subfleet.dashboards.drawing import csv_address
from subfleet.dashboards.read_runs import ReadRun


@dataclass(frozen=True)
class Sheet:
    """A table of a page: `rows` as they are shown, `data` as numbers, for the CSV file."""

    name: str
    title: str
    rows: list[dict[str, str]]
    data: list[dict[str, Any]]

    @property
    def headings(self) -> list[str]:
        """The columns, in the order in which they first come."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    @property
    def csv(self) -> str:
        """The numbers, a CSV file as a data address."""
        return csv_address(self.data)


@dataclass(frozen=True)
class _Column:
    """A number of a run: its heading, where it comes from, and how it is written."""

    heading: str
    value: Callable[[ReadRun], float | None]
    form: Callable[[float], str]


def last(run: ReadRun, key: str) -> float | None:
    """The last known value of a number of `metrics.jsonl`."""
    return next(reversed(run.series(key).values()), None)


def total(run: ReadRun, *keys: str) -> float | None:
    """Some costs, summed over all rounds; None where no round has one of them."""
    values = [value for key in keys for value in run.series(key).values()]
    return sum(values) if values else None


def wall_seconds(run: ReadRun) -> float | None:
    """Wall-clock seconds of all rounds."""
    told = [(record.get("seconds") or {}).get("total") for record in run.records]
    known = [seconds for seconds in told if seconds is not None]
    return sum(known) if known else None


def _share(value: float) -> str:
    return f"{value:.3f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def amount(value: float) -> str:
    """Three digits with a prefix of the SI.

    >>> amount(1_234_000), amount(12.0), amount(0), amount(5e13), amount(999_600)
    ('1.23 M', '12', '0', '50 T', '1 M')
    """
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def _of(key: str) -> Callable[[ReadRun], float | None]:
    return lambda run: last(run, key)


_COLUMNS: tuple[_Column, ...] = (
    _Column("rounds", lambda run: float(run.rounds) if run.records else None, _count),
    _Column("global accuracy", _of("acc_global"), _share),
    _Column("own accuracy", _of("acc_own"), _share),
    _Column("own, worst tenth", _of("acc_own_worst10"), _share),
    _Column("local accuracy", _of("acc_local"), _share),
    _Column("worst tenth", _of("acc_local_worst10"), _share),
    _Column("sd over clients", _of("acc_local_sd"), _share),
    _Column("training loss", _of("loss_train"), _share),
    _Column("bytes", lambda run: total(run, "bytes_up", "bytes_down"), amount),
    _Column("FLOPs", lambda run: total(run, "flops"), amount),
    _Column("energy, J", lambda run: total(run, "energy_j"), amount),
    _Column("simulated time", _of("sim_time"), duration),
    _Column("wall-clock time", wall_seconds, duration),
)


def summary_sheet(groups: Sequence[Group]) -> Sheet:
    """A row a group: mean ± sample sd over its runs, of the last known values and of all costs."""
    rows, data = [], []
    for group in groups:
        open = sum(run.state != "finished" for run in group.runs)
        row = {
            "group": group.label,
            "runs": f"{len(group.runs)}" + (f" ({open} unfinished)" * bool(open)),
        }
        numbers: dict[str, Any] = {"group": group.label, "runs": len(group.runs)}
        for column in _COLUMNS:
            known = [value for run in group.runs if (value := column.value(run)) is not None]
            if (found := spread(known)) is not None:
                row[column.heading] = plus_minus(found, column.form)
                numbers |= {column.heading: found.mean, f"{column.heading} sd": found.known_sd}
        rows.append(row)
        data.append(numbers)
    return Sheet("summary", "Results", _even(rows), data)


def plus_minus(found: Spread, form: Callable[[float], str]) -> str:
    """Mean ± sd, the mean alone of a single run or of equal ones.

    >>> plus_minus(Spread(0.5, 0.25, 2), "{:.2f}".format), plus_minus(Spread(1, 0, 1), str)
    ('0.50 ± 0.25', '1')
    """
    if not found.sd:
        return form(found.mean)
    return f"{form(found.mean)} ± {form(found.sd)}"


def _even(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Every row with the columns of all, in one order."""
    order = ("group", "runs", *(column.heading for column in _COLUMNS))
    keys = [key for key in order if any(key in row for row in rows)]
    return [{key: row.get(key, "–") for key in keys} for row in rows]


_COST_FORMS: dict[str, Callable[[float], str]] = {
    "rounds": _count,
    "bytes": amount,
    "flops": amount,
    "sim_time": duration,
    "energy": amount,
}


def target_sheet(groups: Sequence[Group], key: str, target: float) -> Sheet:
    """A row a group: how many of its runs reach the target, and after what, in the mean."""
    rows, data = [], []
    for group in groups:
        costs = to_target(group, key, target)
        row = {"group": group.label, "reached by": f"{costs['reached']} of {costs['of']}"}
        numbers = {"group": group.label, "reached": costs["reached"], "of": costs["of"]}
        for name in AXES:
            if name in costs:
                row[_TARGET_HEADINGS[name]] = plus_minus(costs[name], _COST_FORMS[name])
                numbers |= {name: costs[name].mean, f"{name} sd": costs[name].known_sd}
        rows.append(row)
        data.append(numbers)
    return Sheet("costs-to-target", f"Costs to {target:g}", rows, data)


_TARGET_HEADINGS = {
    "rounds": "rounds",
    "bytes": "bytes",
    "flops": "FLOPs",
    "sim_time": "simulated time",
    "energy": "energy, J",
}


def fairness_sheet(groups: Sequence[Group]) -> Sheet:
    """A row a group and tier: clients, mean, worst tenth and sd of their local accuracy."""
    rows, data = [], []
    for group in groups:
        rounds = ", ".join(str(r) for r in dict.fromkeys(m.round for m in group.clients))
        for tier, found in fairness_by_tier(group).items():
            first = {"group": group.label, "tier": tier, "round": rounds}
            rows.append(
                first
                | {"clients": plus_minus(found["clients"], _count)}
                | {
                    heading: plus_minus(found[key], _share) if key in found else "–"
                    for key, heading in _FAIRNESS.items()
                }
            )
            numbers = {key: over.mean for key, over in found.items()}
            data.append(
                first | numbers | {f"{key} sd": over.known_sd for key, over in found.items()}
            )
    return Sheet("fairness", "Local accuracy by tier", rows, data)


_FAIRNESS = {"mean": "mean", "worst10": "worst tenth", "sd": "sd over clients"}


def runs_sheet(groups: Sequence[Group]) -> Sheet:
    """A row a run: where it is, what became of it, and what is odd about it."""
    rows = [
        {
            "run": run.label,
            "group": group.label,
            "seed": str(run.seed),
            "state": run.state,
            "rounds": f"{run.rounds} of {run.planned}",
            "notes": "; ".join(run.notes),
            "params_sha256": str(run.summary.get("params_sha256", ""))[:12],
        }
        for group in groups
        for run in group.runs
    ]
    return Sheet("runs", "Runs", rows, list(rows))


def settings_sheet(groups: Sequence[Group]) -> Sheet:
    """A row a setting in which the groups differ, a column a group."""
    found = different([group.runs[0].config for group in groups])
    keys = list(dict.fromkeys(key for settings in found for key in settings))
    columns = {key: [settings.get(key) for settings in found] for key in keys}
    labels = [group.label for group in groups]
    return _side_by_side("settings", "Settings that differ", labels, columns)


def environment_sheet(runs: Sequence[ReadRun]) -> Sheet:
    """A row a version or a fact of machine or data that differs, a column a run."""
    labels = [run.label for run in runs]
    return _side_by_side("environment", "Environments that differ", labels, environments(runs))


def _side_by_side(
    name: str, title: str, labels: Sequence[str], columns: Mapping[str, Sequence[Any]]
) -> Sheet:
    """A row a key; its first column has no heading, so that no label can be the same."""
    data = [{"": key} | dict(zip(labels, values, strict=True)) for key, values in columns.items()]
    rows = [{heading: _text(value) for heading, value in row.items()} for row in data]
    return Sheet(name, title, rows, data)


def _text(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
