"""Wall-clock time: seconds of a round by its parts, and how long the rest will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from subfleet.platform.stretches import Stretch


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


def seconds_left(
    rounds: Mapping[str, float], paces: Mapping[str, float], otherwise: float
) -> float:
    """How long the rounds that are left of each phase take, at so many seconds a round.

    A phase without a pace goes by `otherwise`.

    >>> seconds_left({"warm-up": 2, "search": 1, "train": 10}, {"warm-up": 3.0}, 5.0)
    61.0
    """
    return sum((n * paces.get(name, otherwise) for name, n in rounds.items()), 0.0)


class TimeLeft:
    """Seconds until the last round, from the pace of the most recent rounds of each phase.

    A phase of which no round is known goes by the mean of all rounds so far.

    >>> left = TimeLeft([Stretch("train", 1, 10)], window=3)
    >>> [left.update("train", second) for second in (9.0, 11.0, 13.0, 15.0)]
    [81.0, 44.0, 30.333333333333332, 12.0]
    >>> left = TimeLeft([Stretch("warm-up", 1, 3), Stretch("search", 4, 4), Stretch("train", 5, 7)])
    >>> left.update("warm-up", 2.0), left.update("warm-up", 4.0), left.update("warm-up", 6.0)
    (12.0, 10.0, 8.0)
    >>> left.update("search", 16.0), left.update("train", 17.0)  # 3 rounds of 4 s; 2 of 1 s
    (12.0, 2.0)
    """

    def __init__(
        self, phases: Iterable[Stretch], done: int = 0, now: float = 0.0, window: int = 20
    ) -> None:
        """`done` rounds are done already, and nothing is known of how long they took."""
        self._window = window
        self._left: dict[str, float] = {}
        for name, first, last in phases:
            rounds = max(0, last - max(first - 1, done))
            self._left[name] = self._left.get(name, 0) + rounds
        self._recent: dict[str, deque[float]] = {}
        self._rounds = 0
        self._started_s = self._round_s = now

    def update(self, phase: str, now: float) -> float:
        """One more round, of `phase`, is done at second `now`."""
        recent = self._recent.setdefault(phase, deque(maxlen=self._window))
        recent.append(now - self._round_s)
        self._round_s = now
        self._rounds += 1
        self._left[phase] = max(0, self._left.get(phase, 0) - 1)
        mean = (now - self._started_s) / self._rounds
        return seconds_left(self._left, self._paces(), mean)

    def within(self, phase: str, share: float, now: float) -> float | None:
        """A `share` of the round that goes on, of `phase`, is done at second `now`.

        The first round of a phase goes by itself. None while nothing is known at all.

        >>> left = TimeLeft([Stretch("search", 1, 1), Stretch("train", 2, 3)])
        >>> left.within("search", 0.0, 5.0), left.within("search", 0.25, 10.0)  # 30 s, 2 of 40 s
        (None, 110.0)
        """
        paces = self._paces()
        if share > 0:
            paces.setdefault(phase, (now - self._round_s) / share)
        if not paces:
            return None
        known = self._round_s - self._started_s
        mean = known / self._rounds if self._rounds else paces[phase]
        left = self._left | {phase: max(0.0, self._left.get(phase, 0) - share)}
        return seconds_left(left, paces, mean)

    def _paces(self) -> dict[str, float]:
        return {name: sum(recent) / len(recent) for name, recent in self._recent.items()}
