"""A process beside a run that compiles steps and tries them, while the run goes on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from subfleet.core.program import Params
from subfleet.datasets.federation import Federation
from subfleet.platform.bundles import Trial
from subfleet.platform.engine import Work
from subfleet.platform.worker import Worker

_held: dict[str, Worker] = {}  # of the process beside


class Aside:
    """One process of low priority; it lives from the first trial to `close`."""

    def __init__(self, work: Work, federation: Federation, device: str):
        self._made_from = work, federation, device
        self._pool: ProcessPoolExecutor | None = None

    def start(self, trial: Trial, shared: Mapping[int, Params]) -> Future[list[float]]:
        """Begins a trial; its result is the seconds of each choice (see `Engine.trial`)."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, get_context("spawn"), initializer=_begin, initargs=self._made_from
            )
        return self._pool.submit(_try, trial, dict(shared))

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._pool is not None:
            processes: Any = getattr(self._pool, "_processes", None) or {}
            for process in list(processes.values()):
                process.terminate()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def _begin(work: Work, federation: Federation, device: str) -> None:
    os.nice(10)  # the run's own processes go first
    _held["worker"] = Worker(work, federation, device)


def _try(trial: Trial, shared: Mapping[int, Params]) -> list[float]:
    return _held["worker"].run(trial, shared).table["seconds"].tolist()
