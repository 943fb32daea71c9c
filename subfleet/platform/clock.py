"""Wall-clock time: seconds of a round by its parts, and how long the rest will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

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
    """Seconds until the last round, from the median of the most recent rounds of each phase.

    The first round of a phase says nothing of its others: ways of computing are tried out in it,
    and networks compiled. So None comes until there is a second. A phase that is still to come
    goes by the mean of all rounds so far but the very first.

    >>> left = TimeLeft([Stretch("train", 1, 10)], window=3)
    >>> [left.update("train", second) for second in (9.0, 11.0, 13.0, 30.0)]
    [None, 16.0, 14.0, 12.0]
    >>> left = TimeLeft([Stretch("warm-up", 1, 3), Stretch("search", 4, 4), Stretch("train", 5, 7)])
    >>> left.update("warm-up", 9.0), left.update("warm-up", 11.0), left.update("warm-up", 13.0)
    (None, 10.0, 8.0)
    >>> left.update("search", 27.0), left.update("train", 37.0)  # 3 rounds of (2 + 2 + 14) / 3 s
    (18.0, None)
    >>> left.update("train", 38.0)
    1.0
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
        self._recent: dict[str, deque[float]] = {}  # without the first of each phase
        self._rounds = 0
        self._counted_s = self._round_s = now  # the end of the first round, and of the last

    def update(self, phase: str, now: float) -> float | None:
        """One more round, of `phase`, is done at second `now`."""
        if phase in self._recent:
            self._recent[phase].append(now - self._round_s)
        else:
            self._recent[phase] = deque(maxlen=self._window)
        if not self._rounds:
            self._counted_s = now
        self._rounds += 1
        self._round_s = now
        self._left[phase] = max(0, self._left.get(phase, 0) - 1)
        return self._seconds(phase, self._left, self._paces())

    def within(self, phase: str, share: float, now: float) -> float | None:
        """A `share` of the round that goes on, of `phase`, is done at second `now`.

        The second round of a phase goes by itself, and so does an only one, if it is not the
        very first.

        >>> left = TimeLeft([Stretch("train", 1, 3), Stretch("search", 4, 4)])
        >>> left.within("train", 0.5, 20.0), left.update("train", 40.0)
        (None, None)
        >>> left.within("train", 0.25, 42.0)  # 6 s, one of 8 s, and another phase as long
        22.0
        """
        paces, left = self._paces(), self._left.get(phase, 0)
        known = phase in self._recent or (self._rounds > 0 and left == 1)
        if share > 0 and known:
            paces.setdefault(phase, (now - self._round_s) / share)
        return self._seconds(phase, self._left | {phase: max(0.0, left - share)}, paces)

    def _seconds(
        self, phase: str, left: Mapping[str, float], paces: Mapping[str, float]
    ) -> float | None:
        if not any(left.values()):
            return 0.0
        if left[phase] and phase not in paces:
            return None
        if self._rounds > 1:
            mean = (self._round_s - self._counted_s) / (self._rounds - 1)
        elif phase in paces:
            mean = paces[phase]
        else:
            return None
        return seconds_left(left, paces, mean)

    def _paces(self) -> dict[str, float]:
        return {name: median(recent) for name, recent in self._recent.items() if recent}
