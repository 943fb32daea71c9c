"""Wall-clock time: seconds of a round by phase, and how long the rest will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up the seconds spent in named phases of a round.

    A phase within a phase counts for the inner one only, so that the phases of a
    round never sum to more than the round.

    >>> ticks = iter([0.0, 1.0, 4.0, 6.0])
    >>> clock = PhaseClock(now=lambda: next(ticks))
    >>> with clock.phase("train"):
    ...     with clock.phase("merge"):
    ...         pass
    >>> clock.take()
    {'merge': 3.0, 'train': 3.0}
    >>> clock.take()
    {}
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block to `name`, less the phases within it."""
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self._now() - start
            own = spent - self._inner.pop()
            self._inner[-1] += spent
            self._seconds[name] = self._seconds.get(name, 0.0) + own

    def add(self, name: str, seconds: float) -> None:
        """Charge seconds measured elsewhere, such as on a host."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The seconds by phase since the last `take`; starts anew."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class TimeLeft:
    """Seconds until the last round, from the pace of the most recent rounds.

    >>> left = TimeLeft(10, window=3)
    >>> [left.update(round, second) for round, second in [(0, 0.0), (1, 9.0), (2, 11.0), (3, 13.0)]]
    [None, 81.0, 44.0, 30.333333333333332]
    >>> left.update(4, 15.0)
    12.0
    """

    def __init__(self, total: int, window: int = 20) -> None:
        self._total = total
        self._seen: deque[tuple[int, float]] = deque(maxlen=window + 1)

    def update(self, round: int, now: float) -> float | None:
        """Note that `round` rounds are done at second `now`; None until two points are known."""
        self._seen.append((round, now))
        first_round, first_s = self._seen[0]
        if round <= first_round:
            return None
        return (now - first_s) / (round - first_round) * max(0, self._total - round)
