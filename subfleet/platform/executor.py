"""Executors: where bundles run. Here, or (`ray_executor`) on Ray hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from subfleet.core.program import Params
from subfleet.datasets.federation import Federation
from subfleet.datasets.tables import Upcoming
from subfleet.platform.bundles import Bundle, BundleResult, Merge
from subfleet.platform.engine import Work
from subfleet.platform.worker import Worker


class Executor(Protocol):
    """Runs bundles and yields their results as they come, in any order."""

    retries: int  # bundles that had to be run again, so far
    merges: bool  # whether it runs `Merge`s: sums of other bundles, which it then keeps to itself

    notes: list[str]  # what became of hosts since somebody took them out

    @property
    def device(self) -> str:
        """Where clients train: "cpu" or "cuda"."""
        ...

    def expect(self, upcoming: Callable[[int], Upcoming], first: int, last: int) -> None:
        """Says which rows the rounds `first` to `last` will read, so that they can come early."""
        ...

    def run(
        self, bundles: Sequence[Bundle], shared: Mapping[int, Params]
    ) -> Iterator[BundleResult]:
        """Every bundle's result, once; whoever stops asking may `run` others at once."""
        ...

    def close(self) -> None:
        """Lets the hosts go."""
        ...


def longest_first(bundles: Sequence[Bundle]) -> list[Bundle]:
    """The order of dispatch: longest predicted first, ties by number."""
    return sorted(bundles, key=lambda bundle: (-bundle.predicted, bundle.number))


class InlineExecutor:
    """Bundles in the caller's own process and thread, by workers that take turns.

    One worker is enough; several keep separate buffers as hosts do, to show that
    the result does not depend on who ran what. Threads would gain nothing: small
    steps hold the interpreter's lock, and torch's tracer and generator are global.
    """

    def __init__(self, work: Work, federation: Federation, device: str = "cpu", workers: int = 1):
        self.device = device
        self.retries = 0
        self.notes: list[str] = []
        self.merges = False  # everything lies in this process
        self._workers = [Worker(work, federation, device) for _ in range(workers)]

    def expect(self, upcoming: Callable[[int], Upcoming], first: int, last: int) -> None:
        """Nothing to do: workers read where the data lie."""

    def run(
        self, bundles: Sequence[Bundle], shared: Mapping[int, Params]
    ) -> Iterator[BundleResult]:
        """Every bundle's result, in order of dispatch."""
        for turn, bundle in enumerate(longest_first(bundles)):
            assert not isinstance(bundle, Merge)
            yield self._workers[turn % len(self._workers)].run(bundle, shared)

    def close(self) -> None:
        """Nothing to let go."""
