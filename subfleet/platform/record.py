"""The engine record: how each variant is computed, as data.

A client's bits differ between loop and vmap, between numbers of clients side by
side, memory formats and thread counts. So these choices are written down in
`engine.json` before round 1, sent with every bundle, and replayed by a resume;
a host never chooses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork, has_dropout
from subfleet.core.units import IndexMap

Way = Literal["loop", "vmap"]
VERSION = 1
SIDE_BY_SIDE = {"cpu": 16, "cuda": 256}  # clients in one mapped call, at most
CACHE_BYTES = 4 << 20
FULL = IndexMap.full()


@dataclass(frozen=True)
class Choice:
    """How the clients of one variant are computed on one kind of device from a round on.

    `side_by_side` is the number of clients in one vmapped call at most (1 for a loop).
    Raises `InputError` for what this release cannot compute.
    """

    variant: str
    device: str
    way: Way
    side_by_side: int = 1
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    dtype: str = "float32"
    compiled: bool = False
    threads: int = 1
    from_round: int = 1

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known or type(value) is not type(known[0]):
                raise InputError(
                    f"engine record: {name}={value!r} for variant {self.variant}; "
                    f"this release knows {', '.join(map(repr, known))}"
                )
        for name in ("side_by_side", "from_round"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(
                    f"engine record: {name}={value!r} for variant {self.variant}; "
                    "give a whole number from 1 up"
                )


_KNOWN: dict[str, tuple[Any, ...]] = {
    "device": ("cpu", "cuda"),
    "way": ("loop", "vmap"),
    "memory_format": ("contiguous", "channels_last"),
    "dtype": ("float32",),
    "compiled": (False,),
    "threads": (1,),
}


@dataclass(frozen=True)
class EngineRecord:
    """All choices of a run, oldest first; the last that has begun holds.

    >>> record = EngineRecord((Choice("a", "cpu", "loop"),))
    >>> record = record.extended([Choice("a", "cpu", "vmap", 8, from_round=5)])
    >>> record.at("a", "cpu", 4).way, record.at("a", "cpu", 5).way, record.at("b", "cpu", 1)
    ('loop', 'vmap', None)
    """

    choices: tuple[Choice, ...] = ()
    _index: dict[tuple[str, str], list[Choice]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index: dict[tuple[str, str], list[Choice]] = {}
        for choice in self.choices:
            index.setdefault((choice.variant, choice.device), []).append(choice)
        object.__setattr__(self, "_index", index)

    def at(self, variant: str, device: str, round: int) -> Choice | None:
        """The choice for a variant on a device in a round; None where nothing holds yet."""
        held = [c for c in self._index.get((variant, device), ()) if c.from_round <= round]
        return held[-1] if held else None

    def begins_with(self, other: EngineRecord) -> bool:
        """Whether `other` is this record as it once was: it only ever grows at its end."""
        return self.choices[: len(other.choices)] == other.choices

    def extended(self, choices: Iterable[Choice]) -> EngineRecord:
        """This record with more entries at its end."""
        return replace(self, choices=(*self.choices, *choices))

    def to_json(self) -> dict[str, Any]:
        """The content of `engine.json`."""
        return {"version": VERSION, "choices": [asdict(choice) for choice in self.choices]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], source: str = "engine record") -> EngineRecord:
        """Reads `engine.json`; InputError names what is wrong with it."""
        try:
            if value["version"] != VERSION:
                raise InputError(
                    f"{source}: version {value['version']!r}, but this release reads {VERSION}; "
                    "leave --engine-record out to have a new one made"
                )
            return cls(tuple(Choice(**choice) for choice in value["choices"]))
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{source} is not an engine record ({error}); give a run's engine.json"
            ) from error

    @classmethod
    def load(cls, path: str) -> EngineRecord:
        """Reads a record from a file."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls.from_json(json.load(file), path)
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"--engine-record {path}: {error}") from error


def variant_name(variant: object) -> str:
    """The name under which a variant is recorded."""
    return repr(variant)


def must_loop(net: SuperNetwork) -> bool:
    """Whether clients of this network cannot be mapped.

    With BatchNorm padded rows would enter the batch statistics; dropout's draws torch
    cannot map, and recurrent layers it maps by a loop of its own, slower than ours.
    """
    module = net.module(device="meta")
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    return bool(net.statistics) or recurrent or has_dropout(module)


def choose(
    net: SuperNetwork, variant: object, device: str, engine: str, *, loop: bool, round: int
) -> Choice:
    """The choice for a variant not yet recorded; `loop` where nothing else is possible.

    "auto" takes vmap on a GPU, which small steps leave idle, and on CPUs for small
    networks without convolutions, whose steps are mostly overhead; else the loop.
    """
    has_convolutions = any(layer.kind in ("conv", "depthwise") for layer in net.layers)
    width = SIDE_BY_SIDE[device]
    if device == "cpu":
        # Where the parameters of all leave the cache, mapping loses what it gains.
        width = min(width, CACHE_BYTES // (4 * net.stored_params(FULL)))
    auto = device != "cpu" or (not has_convolutions and width >= 4)
    mapped = not loop and (engine == "vmap" or (engine == "auto" and auto))
    way: Way = "vmap" if mapped else "loop"
    return Choice(
        variant=variant_name(variant),
        device=device,
        way=way,
        side_by_side=max(2, width) if way == "vmap" else 1,
        memory_format="channels_last" if way == "loop" and has_convolutions else "contiguous",
        from_round=round,
    )
