"""What a rung of the stress ladder measured: where a round goes, and what gives out first.

A round is what lies between two lines of `metrics.jsonl`. Its parts:

    training on the hosts             sum of the clients' own seconds / hosts
    reading and summing on the hosts  what else the coordinator waits for: rows are read or
                                      drawn, sums added up, calls under way, hosts idle
    planning, merging on the coordinator, server step, metrics    the coordinator's own
    other                             between rounds: files, observers, choices of the engine

    overhead = round - training on the hosts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from subfleet.cluster.watch import RoundEnd
from subfleet.core.errors import InputError, RunFailed

TRAINING = "training on the hosts"
HOSTS = "reading and summing on the hosts"
PARTS = {
    "plan": "planning",
    "reduce": "merging on the coordinator",
    "server": "server step",
    "evaluate": "evaluation",
    "metrics": "metrics",
}
OTHER = "other"
STARTING = "starting up"
FULL = 0.8  # of a memory: from there on it is what gives out first
SPREAD = 100  # rounds over which the start-up is spread, to set it beside a round's parts
NEEDED = {"coordinator": "memory of the coordinator", "hosts": "memory of the hosts"}


@dataclass(frozen=True)
class Rung:
    """A step of the ladder."""

    cohort: int
    clients: int

    def __str__(self) -> str:
        return f"{self.clients:,} clients, cohort {self.cohort:,}"

    @property
    def impossible(self) -> str | None:
        """Why there is nothing to measure, or None."""
        if self.cohort <= self.clients:
            return None
        return f"a cohort of {self.cohort:,} cannot be drawn from {self.clients:,} clients"


@dataclass(frozen=True)
class Measured:
    """A rung's figures. Seconds, processor seconds and bytes are of one round, medians."""

    hosts: int
    rounds: int
    startup_s: float
    round_s: float
    overhead_s: float
    clients_per_s: float
    parts: dict[str, float]
    coordinator_cpu_s: float
    bytes_up: int
    bytes_down: int
    params_mean: float  # parameters of a client's network
    peaks: dict[str, int]  # bytes: coordinator, hosts, object_store, all
    room: dict[str, int]  # bytes there are: machine, object_store

    def to_json(self) -> dict[str, Any]:
        """All figures and what they say."""
        name, figure = bottleneck(self)
        return {**asdict(self), "bottleneck": name, "figure": figure}


def parse_counts(option: str, text: str) -> list[int]:
    """`1e2,1000` as whole numbers, rising; InputError names the option, value and bound.

    >>> parse_counts("--clients", "1e4, 100,1_000")
    [100, 1000, 10000]
    """
    found = set()
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not (1 <= value <= 1e9 and value == int(value)):
            raise InputError(
                f"{option} {text}: {part.strip()!r} is not a whole number from 1 to 1e9; "
                "write e.g. 1e2,1e4"
            )
        found.add(int(value))
    return sorted(found)


def parse_widths(text: str) -> list[float]:
    """`1.0,0.5` as widths of tiers with equal shares; InputError for others than (0, 1].

    >>> parse_widths("1.0,0.5,0.25")
    [1.0, 0.5, 0.25]
    """
    found: list[float] = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise InputError(
                f"--tiers {text}: {part.strip()!r} is not a width above 0 and up to 1; "
                "write e.g. 1.0,0.5,0.25"
            )
        if value in found:
            raise InputError(f"--tiers {text}: {part.strip()} is given twice; give each width once")
        found.append(value)
    return found


def parts_of(seconds: Mapping[str, float], wall_s: float, training_s: float) -> dict[str, float]:
    """The parts of a round of `wall_s` seconds, by name; they add up to it.

    `seconds` are those of its line of metrics, `training_s` what each host spent on clients.

    >>> found = parts_of({"plan": 0.25, "train": 2.0, "total": 2.25}, wall_s=2.5, training_s=1.5)
    >>> {name: value for name, value in found.items() if value}
    {'training on the hosts': 1.5, 'reading and summing on the hosts': 0.5, 'planning': 0.25, \
'other': 0.25}
    """
    found = {TRAINING: training_s, HOSTS: seconds.get("train", 0.0) - training_s}
    found |= {name: seconds.get(key, 0.0) for key, name in PARTS.items()}
    return found | {OTHER: wall_s - sum(found.values())}


def measured(
    records: Sequence[Mapping[str, Any]],
    client_rounds: np.ndarray,
    client_seconds: np.ndarray,
    ends: Sequence[RoundEnd],
    *,
    cohort: int,
    hosts: int,
    began_s: float,
    params_mean: float,
    peaks: Mapping[str, int],
    room: Mapping[str, int],
) -> Measured:
    """The figures of a run: of its rounds but the first and the last, which is evaluated.

    `client_rounds` and `client_seconds` have an entry for each client and round, `ends` one for
    each round; `began_s` is when the run began, on their clock. RunFailed if it ended early.
    """
    if len(records) < 3:
        raise RunFailed(
            f"the run ended after {len(records)} rounds, of which none counts: the first warms up "
            "and the last is evaluated; do not set run.max_seconds or run.target_accuracy"
        )
    counted = range(1, len(records) - 1)
    parts, cpu, walls = [], [], []
    for i in counted:
        record = records[i]
        walls.append(ends[i].at_s - ends[i - 1].at_s)
        cpu.append(ends[i].coordinator_cpu_s - ends[i - 1].coordinator_cpu_s)
        # Those who were late or failed did not train: they have no seconds.
        training = float(np.nansum(client_seconds[client_rounds == record["round"]])) / hosts
        parts.append(parts_of(record["seconds"], walls[-1], training))
    round_s = median(walls)
    return Measured(
        hosts=hosts,
        rounds=len(counted),
        startup_s=ends[0].at_s - began_s - records[0]["seconds"]["total"],
        round_s=round_s,
        overhead_s=median(w - p[TRAINING] for w, p in zip(walls, parts, strict=True)),
        clients_per_s=cohort / round_s,
        parts={name: median(part[name] for part in parts) for name in parts[0]},
        coordinator_cpu_s=sum(cpu) / len(cpu),  # ticks are coarse: a mean
        bytes_up=int(median(records[i]["bytes_up"] for i in counted)),
        bytes_down=int(median(records[i]["bytes_down"] for i in counted)),
        params_mean=params_mean,
        peaks=dict(peaks),
        room=dict(room),
    )


def bottleneck(found: Measured) -> tuple[str, str]:
    """What gives out first, and the figure that says so.

    A memory that is 80 % full; else the largest part of a round, the start-up spread over a
    hundred rounds among them.
    """
    machine, store = found.room["machine"], found.room.get("object_store", 0)
    if found.peaks["all"] >= FULL * machine:
        role = max(NEEDED, key=lambda role: found.peaks[role])
        full = found.peaks["all"] / machine
        return NEEDED[role], f"{full:.0%} of {machine / 1e9:.1f} GB in use"
    if store and found.peaks["object_store"] >= FULL * store:
        full = found.peaks["object_store"] / store
        return "object store", f"{full:.0%} of {store / 1e9:.1f} GB in use"
    parts = found.parts | {STARTING: found.startup_s / SPREAD}
    name = max(parts, key=lambda part: parts[part])
    if name == STARTING:
        rounds = SPREAD * found.round_s
        return name, f"{found.startup_s:.1f} s, where {SPREAD} rounds take {rounds:.1f} s"
    return name, f"{parts[name] / found.round_s:.0%} of a round's {found.round_s:.3g} s"
