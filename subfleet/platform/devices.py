"""The devices of a fleet: what each client's can do, drawn only for those who are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from subfleet.core.device import KEYS, Device
from subfleet.core.errors import InputError
from subfleet.datasets.draws import hashes, stream_key, uniforms
from subfleet.platform.device_draws import drawn, presence
from subfleet.platform.device_trace import Trace, padded


@dataclass(frozen=True)
class Profile:
    """The devices of one tier: numbers that are given or drawn, and those of a trace."""

    device: Device
    trace: Trace | None = None

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Profile:
        """From the tier's merged TOML table. Raises `InputError`."""
        device = Device.of(table)
        if "trace" not in table:
            return cls(device)
        trace = Trace.read(table["trace"], device.period_s)
        twice = [name for name in trace.numbers if name in device.numbers]
        twice += ["available"] if trace.windows is not None and device.windows else []
        if twice:
            raise InputError(
                f"trace {trace.path}: column {twice[0]!r} is there, and {twice[0]} is set beside "
                "the trace; remove one of them"
            )
        return cls(device, trace)

    @property
    def windows(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Begins and lengths, [rows, W] both: a row, or one for each of the trace."""
        if self.trace is not None and self.trace.windows is not None:
            return self.trace.windows
        return padded([self.device.windows]) if self.device.windows else None

    def states(self, name: str) -> bool:
        """Whether a number is said at all."""
        return name in self.device.numbers or (
            self.trace is not None and name in self.trace.numbers
        )


@dataclass(frozen=True)
class Devices:
    """The devices of all clients: a profile for each tier, and the seed that draws."""

    profiles: tuple[Profile, ...]
    seed: int

    @classmethod
    def of(
        cls,
        tables: Sequence[Mapping[str, Any]],
        names: Sequence[str],
        tier_of: np.ndarray,
        seed: int,
    ) -> Devices | None:
        """From a merged table for each tier, whose clients `tier_of` says; None without tables.

        Raises `InputError`.
        """
        profiles = []
        for tier, (name, table) in enumerate(zip(names, tables, strict=False)):
            try:
                profile = Profile.of(table)
                if profile.trace is not None:
                    profile.trace.check_covers(np.flatnonzero(tier_of == tier))
            except InputError as error:
                raise InputError(f"device of tier {name!r}: {error}") from None
            profiles.append(profile)
        return cls(tuple(profiles), seed) if profiles else None

    @property
    def facts(self) -> dict[str, Any]:
        """What the experiment does not say: the SHA-256 of each trace, by its path."""
        return {p.trace.path: p.trace.sha256 for p in self.profiles if p.trace is not None}

    @property
    def come_and_go(self) -> bool:
        """Whether some are not always there."""
        return any(profile.windows is not None for profile in self.profiles)

    @property
    def have_energy(self) -> bool:
        """Whether any profile says what work costs."""
        return any(p.states(name) for p in self.profiles for name in _JOULES)

    def numbers(self, ids: np.ndarray, tiers: np.ndarray, name: str) -> np.ndarray:
        """A number of `KEYS` of the clients, whose tiers are `tiers`: float64 [n]."""
        out = np.full(len(ids), KEYS[name].default)
        for tier, profile in enumerate(self.profiles):
            mine = np.flatnonzero(tiers == tier)
            trace = profile.trace
            if trace is not None and name in trace.numbers:
                out[mine] = trace.numbers[name][self._rows(trace, ids[mine])]
            elif name in profile.device.numbers:
                draws = uniforms(stream_key(self.seed, f"device {name}"), ids[mine], 2)
                out[mine] = drawn(profile.device.numbers[name], draws)
        return out

    def presence(
        self, ids: np.ndarray, tiers: np.ndarray, now: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Seconds from `now` until each is there (0: it is), and how long it then stays."""
        wait, stay = np.zeros(len(ids)), np.full(len(ids), np.inf)
        shift = self.numbers(ids, tiers, "shift_s")
        for tier, profile in enumerate(self.profiles):
            mine = np.flatnonzero(tiers == tier)
            if profile.windows is None or not len(mine):
                continue
            trace, (begins, lengths) = profile.trace, profile.windows
            rows = np.zeros(len(mine), np.int64)
            if trace is not None and trace.windows is not None:
                rows = self._rows(trace, ids[mine])
            period = profile.device.period_s
            local = np.mod(now + shift[mine], period)
            wait[mine], stay[mine] = presence(begins[rows], lengths[rows], local, period)
        return wait, stay

    def failures(self, ids: np.ndarray, tiers: np.ndarray, round: int) -> np.ndarray:
        """How far each comes in the round before it fails, in (0, 1); infinity: it does not."""
        draws = uniforms(stream_key(self.seed, f"device failure {round}"), ids, 2)
        fails = draws[:, 0] < self.numbers(ids, tiers, "failure_rate")
        return np.where(fails, draws[:, 1], np.inf)

    def _rows(self, trace: Trace, ids: np.ndarray) -> np.ndarray:
        """The rows of the trace that are the clients', or that they are dealt."""
        if trace.client is not None:
            return np.searchsorted(trace.client, ids)
        bits = hashes(stream_key(self.seed, "device trace"), ids, 1)[:, 0]
        return (bits % np.uint64(trace.rows)).astype(np.int64)


_JOULES = ("joules_per_flop", "joules_per_byte")
