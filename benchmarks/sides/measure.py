"""Pairs of figures: one side beside the plain loop, in turn, in one run."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sides import engine_alone, peers, plain_loop
from sides.engine_alone import How
from sides.pool import Side
from sides.workloads import WORKLOADS, Workload

from subfleet.core.algorithm import FULL
from subfleet.platform.bundles import BACKWARD

Pair = tuple[float, float]
"""Clients/s of the plain loop right before and after the other side, and of that."""

PROCESSES = {"cpu": 2, "cuda": 1}  # on a GPU both sides are one process, which keeps it busy


def training_flops(workload: Workload) -> float:
    """FLOPs of one client's training: three passes of two operations a multiply-accumulate."""
    macs = engine_alone.network(workload).cost(FULL).macs
    return BACKWARD * 2 * macs * workload.samples


def in_turn(plain: Callable[[], float], other: Callable[[], float], repeats: int) -> list[Pair]:
    """A B A B ... A: each B beside the mean of the A before and the A after it.

    The machine's speed drifts, and a B may last a minute.
    """
    pairs, before = [], plain()
    for _ in range(repeats):
        rate, after = other(), plain()
        pairs.append(((before + after) / 2, rate))
        before = after
    return pairs


class Loop:
    """A side whose rate can be asked for again and again, each time of clients of its own."""

    def __init__(self, side: Side, workload: Workload) -> None:
        self._side, self._workload = side, workload
        self._rounds = 0
        self._round()  # kernels are built on the first calls

    def _round(self) -> float:
        self._rounds += 1
        return self._side.round(self._workload.cohort_of(self._rounds))

    def __call__(self) -> float:
        """Clients/s, the median of the workload's rounds."""
        seconds = statistics.median(self._round() for _ in range(self._workload.rounds))
        return self._workload.cohort / seconds


@contextmanager
def torch_as_it_is() -> Iterator[None]:
    """For processes begun meanwhile: without the large pages that importing subfleet asks for."""
    name = "THP_MEM_ALLOC_ENABLE"
    asked, os.environ[name] = os.environ[name], "0"
    try:
        yield
    finally:
        os.environ[name] = asked


def plain_side(name: str, device: str) -> Side:
    """The processes of the plain loop."""
    with torch_as_it_is():
        return Side(plain_loop.start, PROCESSES[device], name, device)


def engine(name: str, device: str, how: How, repeats: int) -> dict[str, Any]:
    """The engine alone beside the plain loop, on the same number of processes."""
    workload, processes = WORKLOADS[name], PROCESSES[device]
    choice = engine_alone.choice_for(workload, device, how)
    mine = Side(engine_alone.start, processes, name, device, processes, choice)
    with plain_side(name, device) as other, mine:
        plain, own = Loop(other, workload), Loop(mine, workload)
        with Utilisation(device) as used:
            pairs = in_turn(plain, used.during(own), repeats)
    found = summary(pairs, training_flops(workload)) | {"choice": asdict(choice)}
    return found | ({} if device == "cpu" else {"utilisation": used.percent})


def end_to_end(name: str, how: How, repeats: int, *, stream: bool) -> dict[str, Any]:
    """Whole runs on Ray beside the plain loop."""
    from sides import end_to_end as whole
    from sides import store

    from subfleet.cluster.start import ray_session

    workload = WORKLOADS[name]
    path, runs = store.made(workload), []

    def own() -> float:
        runs.append(whole.run(workload, path, how, stream))
        return workload.cohort / runs[-1].round_s

    with plain_side(name, "cpu") as side, ray_session(None):
        plain = Loop(side, workload)
        pairs = in_turn(plain, own, repeats)
    middle = {
        key: float(np.median([r.phases.get(key, 0.0) for r in runs])) for key in runs[0].phases
    }
    found = summary(pairs, training_flops(workload))
    return found | {"phases": middle, "choice": runs[-1].choice}


def one_peer(peer: str, python: Path, name: str, rounds: int) -> dict[str, Any]:
    """A peer's rounds with the plain loop before and after them."""
    workload = WORKLOADS[name]
    with plain_side(name, "cpu") as side:
        plain = Loop(side, workload)
        before = plain()
        with torch_as_it_is():
            facts = peers.run(peer, python, name, rounds)
        beside = (before + plain()) / 2
    pairs = [(beside, workload.cohort / seconds) for seconds in facts.pop("seconds")]
    return summary(pairs, training_flops(workload)) | facts


def first_round(how: How, repeats: int) -> list[float]:
    """Seconds from the command to the end of the small CNN's first round, each time."""
    from sides import end_to_end as whole
    from sides import store

    workload = WORKLOADS["small_cnn"]
    path = store.made(workload)
    return [whole.first_round(workload, path, how) for _ in range(repeats)]


def summary(pairs: list[Pair], flops: float) -> dict[str, Any]:
    """Medians over the pairs, the ratio's spread, and all rates as they came."""
    ratios = sorted(own / plain for plain, own in pairs)
    own = statistics.median(own for _, own in pairs)
    return {
        "plain": statistics.median(plain for plain, _ in pairs),
        "own": own,
        "ratio": statistics.median(ratios),
        "ratio_least": ratios[0],
        "ratio_most": ratios[-1],
        "flops_per_s": own * flops,
        "pairs": pairs,
    }


class Utilisation(AbstractContextManager):
    """How busy the GPU is while one side runs, in percent: a sample every quarter second."""

    def __init__(self, device: str) -> None:
        self._wanted = device == "cuda"
        self._running, self._over = threading.Event(), threading.Event()
        self._samples: list[float] = []

    def during(self, side: Callable[[], float]) -> Callable[[], float]:
        """The side, watched while it runs."""

        def watched() -> float:
            self._running.set()
            try:
                return side()
            finally:
                self._running.clear()

        return watched

    @property
    def percent(self) -> float | None:
        """The mean of all samples; None where the driver tells nothing."""
        return statistics.mean(self._samples) if self._samples else None

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            if self._running.is_set() and (value := _utilisation()) is not None:
                self._samples.append(value)

    def __enter__(self) -> Utilisation:
        if self._wanted:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()


def _utilisation() -> float | None:
    ask = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True).stdout
        return float(told.splitlines()[0])
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        pass
    try:
        return float(torch.cuda.utilization())
    except (RuntimeError, ImportError):
        return None


def machine(device: str) -> dict[str, Any]:
    """The device and the versions that were measured."""
    facts: dict[str, Any] = {"device": _processor(), "python": platform.python_version()}
    if device == "cuda":
        facts["device"] = torch.cuda.get_device_name()
    for package in ("torch", "numpy", "ray"):
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()
