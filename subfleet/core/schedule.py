"""How the clients' learning rate changes from round to round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from subfleet.core.errors import InputError

ScheduleName = Literal["constant", "cosine", "step", "exponential"]


@dataclass(frozen=True)
class Schedule:
    """A factor of the learning rate for each round r = 1, 2, ..., R.

        constant     1
        cosine       (1 + cos(pi (r - 1 - warmup) / (R - warmup))) / 2
        step         decay ^ (how many milestones are rounds before r)
        exponential  decay ^ (r - 1 - warmup)

    In the first `warmup` rounds the rate rises instead: r / (warmup + 1) of its full
    height. Only "cosine" looks at R, `rounds`: it falls to nothing after the last round.

    >>> step = Schedule("step", milestones=(2, 3), decay=0.5)
    >>> [step.factor(round) for round in range(1, 6)]
    [1.0, 1.0, 0.5, 0.25, 0.25]
    >>> cosine = Schedule("cosine", rounds=4, warmup=1)
    >>> [round(cosine.factor(r), 3) for r in range(1, 5)]
    [0.5, 1.0, 0.75, 0.25]
    """

    name: ScheduleName = "constant"
    rounds: int = 1
    warmup: int = 0
    milestones: tuple[int, ...] = ()
    decay: float = 1.0

    def __post_init__(self) -> None:
        if self.name == "cosine" and self.warmup >= self.rounds:
            raise InputError(
                f"train.warmup = {self.warmup} leaves no round of run.rounds = {self.rounds} to "
                "the cosine; give fewer rounds of warm-up"
            )

    def factor(self, round: int) -> float:
        """What the learning rate is multiplied by in a round; rounds count from 1."""
        since = round - 1 - self.warmup
        if since < 0:
            return round / (self.warmup + 1)
        if self.name == "cosine":
            return (1.0 + math.cos(math.pi * min(1.0, since / (self.rounds - self.warmup)))) / 2
        if self.name == "step":
            return self.decay ** sum(milestone < round for milestone in self.milestones)
        if self.name == "exponential":
            return self.decay**since
        return 1.0
