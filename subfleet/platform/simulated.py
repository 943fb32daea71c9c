"""Simulated time: who of a round's clients arrives, before anybody trains.

A client's time follows from what it is planned to receive, compute and send, by its own
device. So who is late, and who fails, is a function of (experiment, seed, round, plan): those
are not trained, only charged for what they did until then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from subfleet.core.algorithm import Phase, RoundPlan
from subfleet.core.program import ClientProgram, ClientTask, RunProgram, StepProgram
from subfleet.core.supernet import SuperNetwork
from subfleet.datasets.federation import Federation
from subfleet.platform import batches
from subfleet.platform.bundles import flops, kept_units
from subfleet.platform.devices import Devices
from subfleet.platform.job import Job
from subfleet.platform.measure import sent

LATE, FAILED, UNAVAILABLE = "late", "failed", "unavailable"
DROPPED = (FAILED, UNAVAILABLE)


class Ends(NamedTuple):
    """How a round ends for each of C clients, and when, in seconds from its start."""

    seconds: float
    until: np.ndarray  # float64 [C]: arrived, failed, left, or given up
    status: np.ndarray  # str [C]: "ok" where it counts


def ends(
    takes: np.ndarray,
    fails: np.ndarray,
    leaves: np.ndarray,
    wanted: int,
    deadline: float | None = None,
) -> Ends:
    """The first `wanted` clients to arrive by the deadline count; the round ends with them.

    `takes`, `fails` and `leaves` [C] are seconds from the start: to the end of a client's
    work, to its failure, to the end of its window. Where fewer can arrive, the round ends when
    nobody is left to wait for, at the deadline at last. Of equals the first counts.

    >>> inf = np.full(3, np.inf)
    >>> found = ends(np.array([4.0, 1.0, 9.0]), inf, inf, wanted=3, deadline=5.0)
    >>> found.seconds, found.status.tolist()
    (5.0, ['ok', 'ok', 'late'])
    """
    last = np.inf if deadline is None else deadline
    lost = np.minimum(fails, leaves)
    # A failure is before the end, also of work that takes no time.
    comes = (takes < fails) & (takes <= leaves)
    arrives = np.where(comes, takes, np.inf)
    order = np.argsort(arrives, kind="stable")[:wanted]
    counted = order[comes[order] & (arrives[order] <= last)]
    known = np.minimum(takes, lost)  # from here on nobody waits for it
    if len(counted) < len(order):
        seconds = min(last, float(known.max(initial=0.0)))
    else:
        seconds = float(arrives[counted].max(initial=0.0))
    status = np.full(len(takes), LATE, "<U11")
    gone = ~comes & (lost <= seconds)
    status[gone] = np.where(fails <= leaves, FAILED, UNAVAILABLE)[gone]
    status[counted] = "ok"
    return Ends(seconds, np.minimum(known, seconds), status)


@dataclass(frozen=True)
class Planned:
    """What a round's clients are to do, in order of its tasks, [C] each."""

    steps: np.ndarray
    flops: np.ndarray
    bytes_down: np.ndarray
    bytes_up: np.ndarray  # at most

    @classmethod
    def of(
        cls,
        net: SuperNetwork,
        federation: Federation,
        program: ClientProgram,
        plan: RoundPlan,
        round: int,
    ) -> Planned:
        """The costs of a plan."""
        messages = sent(net, plan)
        work = _work(net, federation, program, plan.tasks, round)
        maps = {task.map.key: task.map for task in plan.tasks}
        macs = {key: net.cost(map).macs for key, map in maps.items()}
        return cls(
            steps=np.array([steps for steps, _ in work], np.int64),
            flops=np.array(
                [
                    flops(program, macs[task.map.key], rows)
                    for task, (_, rows) in zip(plan.tasks, work, strict=True)
                ]
            ),
            bytes_down=np.array([each.down for each in messages], np.int64),
            bytes_up=np.array([each.up for each in messages], np.int64),
        )


def _work(
    net: SuperNetwork,
    federation: Federation,
    program: ClientProgram,
    tasks: Sequence[ClientTask],
    round: int,
) -> list[tuple[int, int]]:
    """Steps and rows of each task; a search is charged for one look at its rows."""
    if isinstance(program, RunProgram):
        return [(0, task.num_samples) for task in tasks]
    streams = program.streams.values() if isinstance(program, StepProgram) else [program.stream]
    stream = next(iter(streams))  # the first sets the number of steps
    sizes = federation.sizes(np.array([task.client for task in tasks]), stream.part)
    least = 2 if net.statistics else 1
    return [
        batches.count(
            stream if task.steps is None else replace(stream, steps=task.steps),
            size,
            round=round,
            min_batch=least,
        )
        for task, size in zip(tasks, sizes.tolist(), strict=True)
    ]


class Outcome:
    """A round in simulated time: who arrives, and what the others are charged."""

    def __init__(
        self,
        devices: Devices,
        plan: RoundPlan,
        planned: Planned,
        round: int,
        *,
        time: float,
        wait: float = 0.0,
        wanted: int,
        deadline: float | None = None,
    ):
        """A round that begins `wait` seconds after `time`, the end of the one before.

        `wanted`, `deadline`: as `ends` has them.
        """
        self.tasks, self.planned, self.time, self.wait = plan.tasks, planned, time, wait
        self._ids = np.array([task.client for task in plan.tasks], np.int64)
        self._tiers = np.array([task.tier for task in plan.tasks], np.int64)
        self._devices = devices
        self._latency = self._number("latency_s")
        self._down = planned.bytes_down / self._number("down_bytes_per_s")
        self._compute = planned.flops / self._number("flops_per_s")
        self._up = planned.bytes_up / self._number("up_bytes_per_s")
        self.takes = self._latency + self._down + self._compute + self._up
        share = devices.failures(self._ids, self._tiers, round)
        fails = np.full(len(share), np.inf)
        np.multiply(share, self.takes, out=fails, where=np.isfinite(share))
        opens, stays = devices.presence(self._ids, self._tiers, time)
        # Nobody waits beyond the first who comes: who is there has come just now, or long ago.
        leaves = np.where(opens <= wait, stays, 0.0)
        self.ends = ends(self.takes, fails, leaves, wanted, deadline)

    def _number(self, name: str) -> np.ndarray:
        return self._devices.numbers(self._ids, self._tiers, name)

    @property
    def seconds(self) -> float:
        """From the end of the round before to the end of this one."""
        return self.wait + self.ends.seconds

    def nobody(self, deadline: float | None) -> str | None:
        """In words, that no client arrived, and why; None where one did."""
        clients, fastest = len(self.takes), float(self.takes.min())
        if (self.ends.status == "ok").any():
            return None
        if deadline is not None and fastest > deadline:
            return (
                f"none of {clients} clients arrived by run.deadline = {deadline:g}, and the model "
                f"stays as it was: the fastest needs {fastest:.3g} simulated seconds; set a later "
                "run.deadline, or give clients less to do"
            )
        lost = int(np.isin(self.ends.status, DROPPED).sum())
        return (
            f"none of {clients} clients arrived, and the model stays as it was: {lost} failed or "
            f"left, {clients - lost} were late; look at failure_rate, available and run.deadline"
        )

    def arriving(self, plan: RoundPlan) -> RoundPlan:
        """The plan of those alone who count."""
        ok = self.ends.status == "ok"
        return replace(plan, tasks=[t for t, there in zip(plan.tasks, ok, strict=True) if there])

    def charged(self, net: SuperNetwork) -> dict[str, np.ndarray]:
        """The table of those who do not, as a host returns it of those who train."""
        out = np.flatnonzero(self.ends.status != "ok")
        until = self.ends.until
        computed = _share(until - self._latency - self._down, self._compute)[out]
        sent = _share(until - self._latency - self._down - self._compute, self._up)[out]
        tasks = [self.tasks[i] for i in out]
        nothing = np.full(len(out), np.nan)
        return {
            "client": self._ids[out],
            "tier": self._tiers[out],
            "num_samples": np.array([task.num_samples for task in tasks], np.int64),
            "loss": nothing,
            "acc_local": nothing,
            "seconds": nothing,
            "params": np.array([net.stored_params(t.map, "local") for t in tasks], np.int64),
            "macs": np.array([net.cost(task.map).macs for task in tasks], np.int64),
            "units": np.array([kept_units(net, task.map) for task in tasks], str),
            "steps": (computed * self.planned.steps[out]).astype(np.int64),
            "flops": computed * self.planned.flops[out],
            "bytes_up": (sent * self.planned.bytes_up[out]).astype(np.int64),
            "bytes_map": np.zeros(len(out), np.int64),
            "status": self.ends.status[out],
        }

    def columns(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns of `clients/` beside `rows`: simulated seconds, and energy where it is known."""
        order = np.argsort(self._ids)
        at = order[np.searchsorted(self._ids, rows["client"], sorter=order)]
        found = {"sim_seconds": self.ends.until[at]}
        if self._devices.have_energy:
            # J = J/FLOP * FLOPs + J/byte * (bytes down + bytes up)
            moved = rows["bytes_down"] + rows["bytes_up"]
            computing = self._number("joules_per_flop")[at] * rows["flops"]
            found["energy_j"] = computing + self._number("joules_per_byte")[at] * moved
        return found

    def record(self, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """What `metrics.jsonl` says of it; `rows` are those of `clients/`, `columns` with them."""
        status = self.ends.status
        late, dropped = int((status == LATE).sum()), int(np.isin(status, DROPPED).sum())
        found = {
            "dropped": dropped,
            "late": late,
            "drop_rate": dropped / len(status),
            "straggler_rate": late / len(status),
            "sim_seconds": self.seconds,
            "sim_time": self.time + self.seconds,
        }
        if "energy_j" in rows:
            found["energy_j"] = float(rows["energy_j"].sum())
        return found


def _share(spent: np.ndarray, takes: np.ndarray) -> np.ndarray:
    """The share of a piece of work that is done after so many seconds of it, in [0, 1]."""
    whole = np.where(takes > 0, takes, 1.0)
    return np.where(takes > 0, np.clip(spent / whole, 0.0, 1.0), (spent >= 0).astype(np.float64))


def simulate(
    job: Job, phase: Phase, plan: RoundPlan, round: int, *, time: float, wait: float, wanted: int
) -> Outcome | None:
    """Who of a plan's clients arrives (see `Outcome`); None where no device has a profile."""
    if job.devices is None or not plan.tasks:
        return None
    planned = Planned.of(job.work.net, job.federation, phase.program, plan, round)
    how = {"time": time, "wait": wait, "deadline": job.options.deadline}
    return Outcome(job.devices, plan, planned, round, wanted=wanted, **how)
