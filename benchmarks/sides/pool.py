"""Processes that hold one side of a comparison and run its rounds when told."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from queue import Empty
from typing import Any

import torch
import torch.multiprocessing as mp

Train = Callable[[], None]
Prepare = Callable[[list[int]], Train]
"""Fetches the rows of some clients, and returns what trains them. Only that is timed."""


def _serve(start: Callable[..., Prepare], args: tuple, inbox: Any, outbox: Any) -> None:
    try:
        torch.set_num_threads(1)
        prepare = start(*args)
        outbox.put(None)
        while (clients := inbox.get()) is not None:
            train = prepare(clients)
            outbox.put(None)  # ready; all begin at once
            inbox.get()
            began = time.perf_counter()
            train()
            outbox.put(time.perf_counter() - began)
    except Exception:
        outbox.put(traceback.format_exc())


def _answer(process: Any, outbox: Any) -> Any:
    """The next answer; RuntimeError where the process died before it gave one."""
    while True:
        try:
            return outbox.get(timeout=2)
        except Empty:
            if not process.is_alive():
                message = f"a process of the benchmark died with status {process.exitcode}"
                raise RuntimeError(message) from None


class Side:
    """`count` processes of one thread, alive between rounds: `start(*args)` in each of them.

    >>> with Side(start, 2, "logreg", "cpu") as side:  # doctest: +SKIP
    ...     seconds = side.round(list(range(100)))
    """

    def __init__(self, start: Callable[..., Prepare], count: int, *args: Any) -> None:
        context = mp.get_context("spawn")
        self._inboxes = [context.Queue() for _ in range(count)]
        self._outboxes = [context.Queue() for _ in range(count)]
        self._processes = [
            context.Process(target=_serve, args=(start, args, inbox, outbox), daemon=True)
            for inbox, outbox in zip(self._inboxes, self._outboxes, strict=True)
        ]
        for process in self._processes:
            process.start()
        self._answers()

    def _answers(self) -> list[Any]:
        pairs = zip(self._processes, self._outboxes, strict=True)
        answers = [_answer(process, outbox) for process, outbox in pairs]
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(f"a process of the benchmark failed:\n{answer}")
        return answers

    def round(self, clients: list[int]) -> float:
        """Seconds of training the clients, dealt to the processes: those of the slowest one."""
        for at, inbox in enumerate(self._inboxes):
            inbox.put(clients[at :: len(self._inboxes)])
        self._answers()
        for inbox in self._inboxes:
            inbox.put("go")
        return max(self._answers())

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        for inbox in self._inboxes:
            inbox.put(None)
        for process in self._processes:
            process.join(timeout=10)
            process.kill()
