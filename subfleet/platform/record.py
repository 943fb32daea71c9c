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
    """How the clients of one variant are computed from a round on.

    `side_by_side` is the number of clients in one vmapped call (1 for a loop).
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


@dataclass(frozen=True)
class EngineRecord:
    """All choices of a run, oldest first; the last that has begun holds.

    >>> record = EngineRecord((Choice("a", "cpu", "loop"),))
    >>> record = record.extended([Choice("a", "cpu", "vmap", 8, from_round=5)])
    >>> record.at("a", 4).way, record.at("a", 5).way
    ('loop', 'vmap')
    """

    choices: tuple[Choice, ...] = ()
    _index: dict[str, list[Choice]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index: dict[str, list[Choice]] = {}
        for choice in self.choices:
            index.setdefault(choice.variant, []).append(choice)
        object.__setattr__(self, "_index", index)

    def at(self, variant: str, round: int) -> Choice:
        """The choice for a variant in a round; KeyError where nothing was recorded."""
        held = [c for c in self._index.get(variant, ()) if c.from_round <= round]
        if not held:
            raise KeyError(variant)
        return held[-1]

    def knows(self, variant: str) -> bool:
        """Whether anything is recorded for this variant."""
        return variant in self._index

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


def choose(
    net: SuperNetwork, variant: object, device: str, engine: str, way_forced: Way | None, round: int
) -> Choice:
    """The choice for a variant not yet recorded.

    "auto" takes vmap on a GPU, which small steps leave idle, and on CPUs for small
    networks without convolutions, whose steps are mostly overhead; else the loop.
    Networks with BatchNorm always loop: padded rows would enter their batch
    statistics. So do those with dropout, whose draws torch cannot map.
    """
    has_convolutions = any(layer.kind in ("conv", "depthwise") for layer in net.layers)
    width = SIDE_BY_SIDE[device]
    if device == "cpu":
        # Where the parameters of all leave the cache, mapping loses what it gains.
        width = min(width, CACHE_BYTES // (4 * net.stored_params(FULL)))
    auto = device != "cpu" or (not has_convolutions and width >= 4)
    way: Way = "vmap" if engine == "vmap" or (engine == "auto" and auto) else "loop"
    if net.statistics or way_forced == "loop" or has_dropout(net.module(device="meta")):
        way = "loop"
    return Choice(
        variant=variant_name(variant),
        device=device,
        way=way,
        side_by_side=max(2, width) if way == "vmap" else 1,
        memory_format="channels_last" if way == "loop" and has_convolutions else "contiguous",
        from_round=round,
    )
