"""A job: all that a coordinator needs to run an experiment, picklable."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Any, Literal

import numpy as np

from subfleet.core.errors import InputError
from subfleet.datasets.federation import Federation, split_of
from subfleet.platform.devices import Devices
from subfleet.platform.engine import Work
from subfleet.platform.fleet import Fleet
from subfleet.platform.record import Dtype, Engine, EngineRecord
from subfleet.platform.start import Start

_SLACK = 1e-9  # 10 * 1.1 are 11 clients, although the product rounds above it


@dataclass(frozen=True)
class RunOptions:
    """How long a run goes on and what it measures; the keys of `[run]`."""

    rounds: int
    cohort: int
    engine: Engine = "auto"
    dtype: Dtype = "float32"
    compile: bool = False
    deadline: float | None = None
    over_select: float = 1.0
    eval_every: int = 5
    eval_clients: int = 1000
    held_out: float = 0.2
    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    target_accuracy: float | None = None
    max_seconds: float | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    bundle_clients: int = 0
    stream: bool | None = None


@dataclass(frozen=True)
class Job:
    """One run: what the hosts have, the data, the fleet, the options, and where it begins."""

    work: Work
    federation: Federation
    fleet: Fleet
    options: RunOptions
    config: dict[str, Any]
    fingerprint: str
    record: EngineRecord = field(default_factory=EngineRecord)
    start: Start | None = None  # freshly drawn parameters otherwise
    devices: Devices | None = None  # no simulated time otherwise

    @property
    def streams(self) -> bool:
        """Whether Ray Data streams the rows; left open, it does where they are `stored`."""
        stored = bool(getattr(self.federation, "stored", False))
        return stored if self.options.stream is None else self.options.stream

    @cached_property
    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the clients that train, and of those held out to measure."""
        return split_of(self.federation, self.work.seed, self.options.held_out)

    def asked(self, wanted: int) -> int:
        """How many clients are asked so that so many train; more only where devices may be late."""
        return ceil(wanted * self.options.over_select - _SLACK) if self.devices else wanted

    def __post_init__(self) -> None:
        training, held = map(len, self.split)
        if self.options.cohort > training:
            raise InputError(
                f"run.cohort={self.options.cohort} is more than the {training} clients that train "
                f"({held} of {self.federation.num_clients} are held out to measure); "
                f"set it to at most {training}"
            )
        if (asked := self.asked(self.options.cohort)) > training:
            raise InputError(
                f"run.over_select={self.options.over_select:g} asks {asked} clients for a cohort "
                f"of {self.options.cohort}, and {training} clients train; set it to at most "
                f"{training / self.options.cohort:g}"
            )
