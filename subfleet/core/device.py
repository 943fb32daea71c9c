"""What a client's device can do: numbers that are given, or drawn for each client.

`KEYS` names the numbers and says what each may be. Windows of availability repeat every
`period_s` seconds of simulated time. What is drawn is in `subfleet.platform.device_draws`: the
command line reads this file, and starts without NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from subfleet.core.errors import InputError, did_you_mean

DAY_S = 86_400.0
MOST_SIGMA = 10.0  # of a lognormal: e^(10 * 8.5) is still a number, and so is its inverse

Law = Literal["constant", "uniform", "lognormal", "normal"]
LAWS: dict[str, tuple[str, str]] = {
    "uniform": ("low", "high"),
    "lognormal": ("median", "sigma"),
    "normal": ("mean", "sd"),
}


class Key(NamedTuple):
    """What a number of a device may be, and what it is where nobody says it."""

    default: float
    give: str
    positive: bool = False  # above 0, rather than from 0 on
    most: float = math.inf

    def complaint(self, value: float) -> str:
        """What is wrong with a value, and the remedy; empty where nothing is.

        >>> KEYS["latency_s"].complaint(-1.0)
        '-1 is negative; give seconds before anything is sent, such as 0.1'
        """
        if not math.isfinite(value):
            return f"{value} is no finite number; give {self.give}"
        if value > self.most:
            return f"{value:g} is above {self.most:g}; give {self.give}"
        if value < 0 or (value == 0 and self.positive):
            bound = "not above 0" if self.positive else "negative"
            return f"{value:g} is {bound}; give {self.give}"
        return ""


_SPEED: dict[str, Any] = {"default": math.inf, "positive": True}
KEYS: dict[str, Key] = {
    "flops_per_s": Key(give="FLOPs a second, such as 1e9", **_SPEED),
    "up_bytes_per_s": Key(give="bytes sent a second, such as 1e5", **_SPEED),
    "down_bytes_per_s": Key(give="bytes received a second, such as 1e6", **_SPEED),
    "latency_s": Key(0.0, "seconds before anything is sent, such as 0.1"),
    "failure_rate": Key(0.0, "the probability to fail in a round, such as 0.05", most=1.0),
    "joules_per_flop": Key(0.0, "joules a FLOP, such as 1e-10"),
    "joules_per_byte": Key(0.0, "joules a byte sent or received, such as 1e-7"),
    "shift_s": Key(0.0, "seconds by which the windows come earlier, such as 3600"),
}


@dataclass(frozen=True)
class Quantity:
    """A number that each client has: the same for all, or drawn from a law and then clipped.

    `first` and `second` are the value and nothing, or low and high, median and sigma (the
    standard deviation of the logarithm), or mean and standard deviation.
    """

    law: Law
    first: float
    second: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    @classmethod
    def of(cls, name: str, value: Any) -> Quantity:
        """From what TOML says: 1e9, or {lognormal = [1e9, 0.5], min = 1e7, max = 1e11}.

        Raises `InputError`, without the name, which the caller knows in full.
        """
        key = KEYS[name]
        if _is_number(value):
            _refuse(key.complaint(value))
            return cls("constant", float(value))
        if not isinstance(value, Mapping):
            raise InputError(
                f"{value!r} is neither a number nor a distribution; give {key.give}, or a "
                "distribution such as { lognormal = [1e9, 0.5] }"
            )
        for unknown in value.keys() - {*LAWS, "min", "max"}:
            raise InputError(f"{unknown}: unknown; {did_you_mean(unknown, [*LAWS, 'min', 'max'])}")
        laws = [law for law in LAWS if law in value]
        if len(laws) != 1:
            given = " and ".join(laws) or "none"
            raise InputError(f"needs one of {', '.join(LAWS)}, and has {given}")
        low, high = _clipped_to(key, value)
        return cls(laws[0], *_parameters(key, laws[0], value), low, high)  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _refuse(complaint: str, what: str = "") -> None:
    if complaint:
        raise InputError(f"{what}{complaint}")


def _clipped_to(key: Key, value: Mapping[str, Any]) -> tuple[float, float]:
    """The bounds of a distribution: its own, within those of the key."""
    low, high = value.get("min", 0.0), value.get("max", key.most)
    for name, bound in (("min", low), ("max", high)):
        if name in value:
            if not _is_number(bound):
                raise InputError(f"{name} = {bound!r} is no number; give {key.give}")
            _refuse(key.complaint(bound), f"{name} = ")
    if low > high:
        raise InputError(f"min = {low:g} is above max = {high:g}; exchange them")
    return float(low), float(high)


def _parameters(key: Key, law: str, value: Mapping[str, Any]) -> tuple[float, float]:
    names, given = LAWS[law], value[law]
    numbers = isinstance(given, (list, tuple)) and len(given) == 2 and all(map(_is_number, given))
    if not numbers or not all(map(math.isfinite, given)):
        raise InputError(
            f"{law} = {given!r} is not a list of two finite numbers; give "
            f"{law} = [{names[0]}, {names[1]}]"
        )
    first, second = map(float, given)
    if law == "uniform":
        for bound in (first, second):
            _refuse(key.complaint(bound), f"{law} = {list(given)}: ")
        if first > second:
            raise InputError(f"uniform = {list(given)} falls; give the lower bound first")
        return first, second
    if law == "lognormal" and not first > 0:
        raise InputError(f"lognormal = {list(given)}: the median {first:g} is not above 0")
    most = MOST_SIGMA if law == "lognormal" else math.inf
    if not 0 <= second <= most:
        raise InputError(
            f"{law} = {list(given)}: {names[1]} {second:g} is outside [0, {most:g}]; "
            "give how far clients differ, such as 0.5 for a lognormal"
        )
    if law == "normal" and key.positive and "min" not in value:
        raise InputError(
            f"normal = {list(given)} may draw 0 or less, which this cannot be; add a min above 0"
        )
    return first, second


# --- windows ---------------------------------------------------------------------------------


Window = tuple[float, float]
"""Where a window begins within the period, and how long it lasts, both in seconds."""


def windows(spans: Any, period: float) -> tuple[Window, ...]:
    """Spans [from, to] of a period as disjoint windows; one that falls goes over the period's end.

    Windows that touch become one. Raises `InputError` for what is no list of such spans.

    >>> windows([[22, 24], [0, 6], [12, 13]], 24)
    ((12.0, 1.0), (22.0, 8.0))
    >>> windows([[22, 6]], 24)
    ((22.0, 8.0),)
    """
    if not isinstance(spans, (list, tuple)) or not spans:
        raise InputError(f"{spans!r} is no list of windows; give [[from, to], ...] in seconds")
    merged: list[list[float]] = []
    for begin, end in sorted(straight for span in spans for straight in _straight(span, period)):
        if merged and begin <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    # The last and the first are one where midnight lies between them.
    if len(merged) > 1 and merged[0][0] == 0 and merged[-1][1] == period:
        merged[-1][1] += merged.pop(0)[1]
    return tuple((begin, end - begin) for begin, end in merged)


def _straight(span: Any, period: float) -> list[tuple[float, float]]:
    pair = isinstance(span, (list, tuple)) and len(span) == 2 and all(map(_is_number, span))
    if not pair or not all(0 <= bound <= period for bound in span):
        raise InputError(
            f"{span!r} is not a window [from, to] with both in 0..{period:g} s, the period"
        )
    begin, end = map(float, span)
    if begin == end:
        raise InputError(
            f"[{begin:g}, {end:g}] is empty; give a window that lasts, or leave it out"
        )
    if begin < end:
        return [(begin, end)]
    return [s for s in ((begin, period), (0.0, end)) if s[0] < s[1]]


# --- a profile -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A kind of device: its numbers by key, and when it is there; without windows always."""

    numbers: Mapping[str, Quantity]
    windows: tuple[Window, ...] = ()
    period_s: float = DAY_S

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Device:
        """From a TOML table of `KEYS`, `available` and `period_s`; other keys are passed over.

        Raises `InputError` that begins with the key.
        """
        period = table.get("period_s", DAY_S)
        numbers, name = {}, "available"
        try:
            spans = windows(table[name], period) if name in table else ()
            for name in (key for key in KEYS if key in table):
                numbers[name] = Quantity.of(name, table[name])
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        return cls(numbers, spans, period)
