"""What runs are compared by: mean and spread over seeds, costs to a target, fairness by tier."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from subfleet.dashboards.read_runs import ReadRun
from subfleet.dashboards.settings import settings
from subfleet.platform.measure import over_clients
from subfleet.platform.runfolder import flat
from subfleet.platform.sameness import NOT_OF_THE_RESULT

# Runs that differ in nothing else are of one experiment.
ALIKE = NOT_OF_THE_RESULT | {"run.seed"}
ACCURACIES = ("acc_global", "acc_own", "acc_local")


@dataclass(frozen=True)
class Group:
    """Runs of one experiment, which differ in their seed alone."""

    label: str
    runs: tuple[ReadRun, ...]

    @property
    def toml(self) -> str:
        """The experiment of the first run, as its folder has it; empty if that cannot be read."""
        try:
            return self.runs[0].folder.config.read_text(errors="replace")
        except OSError:
            return ""

    @cached_property
    def clients(self) -> list[Measured]:
        """The clients of each run's last round that tested them, of the runs that have one."""
        found = (last_measured(run) for run in self.runs)
        return [measured for measured in found if measured is not None]


class Measured(NamedTuple):
    """Clients' accuracy on their own test parts (0–1), and their tiers, in one round of a run."""

    run: ReadRun
    round: int
    client: np.ndarray
    tier: np.ndarray
    accuracy: np.ndarray


class Spread(NamedTuple):
    """Mean and sample standard deviation (0 of one value) over `count` runs."""

    mean: float
    sd: float
    count: int

    @property
    def known_sd(self) -> float | None:
        """None of one value, which tells nothing of a spread."""
        return self.sd if self.count > 1 else None


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample sd of what is known; None of nothing.

    >>> spread([1.0, 3.0]), spread([])
    (Spread(mean=2.0, sd=1.4142135623730951, count=2), None)
    """
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), sd, len(values))


def grouped(runs: Sequence[ReadRun]) -> list[Group]:
    """Runs by experiment, in order of the first of each; labels say what differs."""
    members: dict[str, list[ReadRun]] = {}
    for run in runs:
        table = {key: value for key, value in flat(run.config).items() if key not in ALIKE}
        # What cannot be read is nobody's equal.
        key = json.dumps(table, sort_keys=True, default=str) if table else str(run.folder)
        members.setdefault(key, []).append(run)
    labels = _labels(list(members.values()))
    pairs = zip(labels, members.values(), strict=True)
    return [Group(label, tuple(group)) for label, group in pairs]


LONGEST = 48  # characters of a label that is made of settings


def _labels(groups: Sequence[Sequence[ReadRun]]) -> list[str]:
    """By the settings that differ, if these are few, else by the first run's folder."""
    firsts = [group[0] for group in groups]
    folders = [
        group[0].label + (f" +{len(group) - 1}" if len(group) > 1 else "") for group in groups
    ]
    if len(groups) == 1:
        return [firsts[0].config.get("algorithm", {}).get("name", folders[0])]
    labels = []
    for varied, folder in zip(different([run.config for run in firsts]), folders, strict=True):
        label = ", ".join(_named(key, value) for key, value in varied.items())
        labels.append(label if 0 < len(label) <= LONGEST else folder)
    return folders if len(set(labels)) < len(labels) else labels


def _named(key: str, value: Any) -> str:
    """A setting in a label.

    >>> _named("algorithm.name", "fedpa"), _named("train.lr", 0.1)
    ('fedpa', 'lr=0.1')
    >>> _named("fleet.tiers.low.width", 0.5)
    'low.width=0.5'
    """
    if key == "algorithm.name":
        return str(value)
    parts = key.split(".")
    return f"{'.'.join(parts[2:] if parts[:2] == ['fleet', 'tiers'] else parts[-1:])}={value}"


def different(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings in which some tables differ, for each of them; those of `ALIKE` do not count.

    >>> different([{"a": {"x": 1, "y": 2}}, {"a": {"x": 1, "y": 3}}])
    [{'a.y': 2}, {'a.y': 3}]
    """
    flats = [dict(settings(config)) for config in configs]
    keys = [key for key in dict.fromkeys(itertools.chain(*flats)) if key not in ALIKE]
    varied = [k for k in keys if any(f.get(k) != flats[0].get(k) for f in flats)]
    return [{key: f[key] for key in varied if key in f} for f in flats]


# --- curves --------------------------------------------------------------------------------------


class Curve(NamedTuple):
    """A mean over runs, its sd, and over how many runs, at points of increasing x."""

    x: list[float]
    mean: list[float]
    sd: list[float]
    runs: list[int]


def _summed(*keys: str) -> Callable[[ReadRun], dict[int, float]]:
    """A cost added up from the first round on, by round; nothing where no round has it."""

    def total(run: ReadRun) -> dict[int, float]:
        series = [run.series(key) for key in keys]
        if not any(series):
            return {}
        rounds = [record["round"] for record in run.records]
        each = [sum(values.get(round, 0.0) for values in series) for round in rounds]
        return dict(zip(rounds, itertools.accumulate(each), strict=True))

    return total


class Axis(NamedTuple):
    """What a curve may be drawn against: its words, and a run's value in each round."""

    words: str
    at: Callable[[ReadRun], dict[int, float]]


AXES: dict[str, Axis] = {
    "rounds": Axis(
        "round", lambda run: {record["round"]: float(record["round"]) for record in run.records}
    ),
    "bytes": Axis("bytes sent, both ways", _summed("bytes_up", "bytes_down")),
    "flops": Axis("FLOPs of local training", _summed("flops")),
    "sim_time": Axis("simulated seconds", lambda run: run.series("sim_time")),
    "energy": Axis("simulated energy, J", _summed("energy_j")),
}


def curve(runs: Sequence[ReadRun], key: str, against: str = "rounds") -> Curve:
    """A metric against an axis, round by round over the runs that have got so far.

    Against a cost it ends where the first of the runs does: without it the mean cost of a round
    would jump.
    """
    values = [(y, x) for run in runs if (y := run.series(key)) and (x := AXES[against].at(run))]
    rounds = sorted(set().union(*(y for y, _ in values)))
    if against != "rounds" and values:
        shortest = min(max(y) for y, _ in values)
        rounds = [round for round in rounds if round <= shortest]
    points = []
    for round in rounds:
        both = [(x[round], y[round]) for y, x in values if round in y and round in x]
        if (over := spread([y for _, y in both])) is not None:
            points.append((statistics.fmean(x for x, _ in both), *over))
    columns = [list(column) for column in zip(*points, strict=True)] or [[], [], [], []]
    return Curve(*columns)


def best_metric(runs: Sequence[ReadRun]) -> str | None:
    """The first of `ACCURACIES` that a run has, None where none has any."""
    return next((key for key in ACCURACIES if any(run.series(key) for run in runs)), None)


# --- a target ------------------------------------------------------------------------------------


def common_target(runs: Sequence[ReadRun], key: str) -> float | None:
    """The highest whole per cent that every run with the metric reaches; None below 1 %.

    Runs that have not finished do not count where others have.
    """
    done = [run for run in runs if run.state == "finished"] or runs
    best = [max(values.values()) for run in done if (values := run.series(key))]
    return int(min(best) * 100 + 1e-9) / 100 or None if best else None


def reached(run: ReadRun, key: str, target: float) -> int | None:
    """The first round in which a metric is at least `target`; None if it never is."""
    return next((round for round, value in run.series(key).items() if value >= target), None)


def to_target(group: Group, key: str, target: float) -> dict[str, Any]:
    """How many runs of a group reach a target, and in the mean after what of each axis.

    `{"reached": 2, "of": 3, "rounds": Spread(...), "bytes": ...}`; an axis is absent where no
    run that reached the target has it.
    """
    firsts = [(run, reached(run, key, target)) for run in group.runs]
    there = [(run, round) for run, round in firsts if round is not None]
    found: dict[str, Any] = {"reached": len(there), "of": len(group.runs)}
    for name, axis in AXES.items():
        costs = [at[round] for run, round in there if round in (at := axis.at(run))]
        if costs:
            found[name] = spread(costs)
    return found


# --- clients -------------------------------------------------------------------------------------


def last_measured(run: ReadRun) -> Measured | None:
    """The last round whose clients were tested, and whose rows are on disk."""
    for round in reversed(run.series("acc_local")):
        table = run.clients(round)
        if {"acc_local", "tier", "client"} <= set(table.column_names) and table.num_rows:
            accuracy = table["acc_local"].to_numpy().astype(np.float64)
            known = ~np.isnan(accuracy)
            tier = np.array(table["tier"].to_pylist())[known]
            return Measured(run, round, table["client"].to_numpy()[known], tier, accuracy[known])
    return None


class Fairness(NamedTuple):
    """Of clients' accuracies: how many, mean, sample sd (NaN of one), mean of the worst tenth."""

    clients: int
    mean: float
    sd: float
    worst10: float


def fairness(accuracy: np.ndarray) -> Fairness:
    """Of at least one client; a tenth is at least one, too.

    >>> fairness(np.array([0.2, 0.6]))
    Fairness(clients=2, mean=0.4, sd=0.282842712474619, worst10=0.2)
    """
    found = over_clients("of", accuracy)
    sd = found["of_sd"] if len(accuracy) > 1 else math.nan
    return Fairness(len(accuracy), float(np.sort(accuracy).mean()), sd, found["of_worst10"])


ALL = "all clients"


def fairness_by_tier(group: Group) -> dict[str, dict[str, Spread]]:
    """The numbers of `Fairness`, each over the group's runs: `ALL` first, then by tier."""
    found: dict[str, list[Fairness]] = {ALL: []}
    for measured in group.clients:
        names = np.unique(measured.tier).tolist()
        if names:
            found[ALL].append(fairness(measured.accuracy))
        for name in names:
            mine = measured.accuracy[measured.tier == name]
            found.setdefault(name, []).append(fairness(mine))
    if len(found) == 2:  # of one tier, which is all
        found = {ALL: found[ALL]}
    return {
        tier: {
            key: over
            for key in Fairness._fields
            if (over := spread([getattr(r, key) for r in runs]))
        }
        for tier, runs in found.items()
        if runs
    }


# --- what else differs ---------------------------------------------------------------------------

_MACHINE = ("python", "system", "cpu", "cores", "memory_bytes", "gpu", "gpus")


def environments(runs: Sequence[ReadRun]) -> dict[str, list[Any]]:
    """By name of a version, a part of the machine or a fact of the data: its value for each run.

    Only what differs between the runs.
    """
    rows = []
    for run in runs:
        facts = {key: run.environment.get(key) for key in _MACHINE}
        facts |= flat({"packages": run.environment.get("packages") or {}})
        rows.append(facts | flat({"data": run.environment.get("data") or {}}))
    keys = dict.fromkeys(itertools.chain(*rows))
    columns = {key: [row.get(key) for row in rows] for key in keys}
    return {k: v for k, v in columns.items() if any(value != v[0] for value in v)}


def data_sets(runs: Sequence[ReadRun]) -> list[str]:
    """What the runs train on, each once, and what of `[data]` differs: `cifar10, 100 clients`."""
    found = []
    tables = different([{"data": run.config.get("data", {})} for run in runs])
    for run, table in zip(runs, tables, strict=True):
        facts = run.environment.get("data") or {}
        name = facts.get("name") or run.config.get("data", {}).get("name", "unknown data")
        clients = facts.get("clients")
        words = [str(name), *([f"{clients:,} clients"] if isinstance(clients, int) else [])]
        left = {"data.name", "data.clients"}
        words += [_named(key, value) for key, value in table.items() if key not in left]
        found.append(", ".join(words))
    return list(dict.fromkeys(found))


def repeated(group: Group) -> dict[int | None, list[str]]:
    """Seeds that more than one run of a group has, and which runs."""
    members: dict[int | None, list[str]] = {}
    for run in group.runs:
        members.setdefault(run.seed, []).append(run.label)
    return {seed: labels for seed, labels in members.items() if len(labels) > 1}
