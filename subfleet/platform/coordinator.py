"""Coordinator: the Ray actor that runs the rounds; and how a driver follows it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from subfleet.datasets.stream import CohortStream
from subfleet.platform.host import Hosts
from subfleet.platform.job import Job
from subfleet.platform.memory import keep_freed_memory
from subfleet.platform.metrics import Observer, tell, tell_hosts, tell_progress
from subfleet.platform.ray_executor import RayExecutor
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

POLL_S = 0.25
STOP_S = 25.0  # how long a coordinator may take to save what is finished

Event = tuple[str, dict[str, Any]]


class _Events:
    """An observer that remembers what happened, for whoever asks."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._lock = Lock()

    def _note(self, kind: str, value: dict[str, Any]) -> None:
        with self._lock:
            self._events.append((kind, value))

    def on_start(self, info: dict[str, Any]) -> None:
        self._note("start", info)

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        del coverage
        self._note("round", record)

    def on_note(self, text: str) -> None:
        self._note("note", {"text": text})

    def on_progress(self, done: int, total: int, doing: str) -> None:
        newest = ("progress", {"done": done, "total": total, "doing": doing})
        with self._lock:
            if self._events and self._events[-1][0] == "progress":
                self._events[-1] = newest  # nobody wants to know where it was before
            else:
                self._events.append(newest)

    def on_end(self, summary: dict[str, Any]) -> None:
        self._note("end", summary)

    def take(self) -> list[Event]:
        """What happened since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events


@ray.remote
class Coordinator:
    """Runs a job's rounds on its hosts and writes the run folder."""

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        hosts: Hosts,
        observers: Sequence[Observer],
        followed: bool,
    ):
        keep_freed_memory()  # each round's sums are as large as the last one's
        self._events = _Events()
        # What nobody asks for must not pile up.
        watching = [*observers, self._events] if followed else observers
        self._stream = CohortStream(job.federation) if job.streams else None
        tell = partial(tell_hosts, watching)
        self._executor = RayExecutor(hosts, stream=self._stream, tell=tell)
        self._rounds = Rounds(job, self._executor, folder, watching)

    def run(self) -> dict[str, Any]:
        """All rounds that are left; returns the summary, nothing when told to stop."""
        try:
            return self._rounds.run()
        except KeyboardInterrupt:
            return {}

    def stop(self) -> None:
        """Ends `run` as soon as it can, the last finished round saved."""
        self._rounds.stop()
        self._executor.stop()  # nor for what hosts are at
        if self._stream is not None:
            self._stream.close()  # nobody waits for rows any more

    def events(self) -> list[Event]:
        """What happened since the last call; nothing unless `followed`."""
        return self._events.take()


def start_coordinator(*args: Any) -> Any:
    """A coordinator that reserves no core; `args` are `Coordinator`'s."""
    actor: Any = Coordinator
    # Here, where the run folder is.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # Two calls at a time: the rounds, and a driver that asks how they go or tells to stop.
    return actor.options(num_cpus=0, max_concurrency=2, scheduling_strategy=here).remote(*args)


def follow(coordinator: Any, progress: Observer | None) -> dict[str, Any]:
    """Starts the coordinator and tells `progress` how it goes; returns the summary.

    With a `progress` the coordinator must have been told that it is followed. After a
    KeyboardInterrupt it is given a while to save the last finished round.
    """
    ended = coordinator.run.remote()
    try:
        return _followed(coordinator, ended, progress)
    except KeyboardInterrupt:
        coordinator.stop.remote()
        ray.wait([ended], timeout=STOP_S)
        raise


def _followed(coordinator: Any, ended: Any, progress: Observer | None) -> dict[str, Any]:
    while True:
        done, _ = ray.wait([ended], timeout=POLL_S if progress is not None else None)
        if progress is not None and (not done or _succeeded(ended)):
            for kind, value in ray.get(coordinator.events.remote()):
                _tell(progress, kind, value)
        if done:
            return ray.get(ended)


def _succeeded(ref: Any) -> bool:
    try:
        ray.get(ref)
    except RayError:
        return False
    return True


def _tell(progress: Observer, kind: str, value: dict[str, Any]) -> None:
    if kind == "start":
        progress.on_start(value)
    elif kind == "round":
        progress.on_round(value, {})
    elif kind == "note":
        tell([progress], value["text"])
    elif kind == "progress":
        tell_progress([progress], **value)
    else:
        progress.on_end(value)
