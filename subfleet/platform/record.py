"""The engine record: how each variant is computed, as data.

A client's bits differ between loop and vmap, between numbers of clients side by
side, memory formats and thread counts. So these choices are written down in
`engine.json` before round 1, sent with every bundle, and replayed by a resume;
a host never chooses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from torch import nn

from subfleet.core.errors import InputError
from subfleet.core.program import ClientProgram, LossProgram, RunProgram
from subfleet.core.supernet import SuperNetwork, takes_channels_last
from subfleet.core.units import IndexMap
from subfleet.platform import layers, products

Way = Literal["loop", "traced", "vmap"]
Dtype = Literal["float32", "bfloat16"]
Engine = Literal["auto", "loop", "traced", "vmap"]
VERSION = 1
SIDE_BY_SIDE = {"cpu": 128, "cuda": 256}  # clients in one mapped call, at most
CACHE_BYTES = 16 << 20
MAPPED_BYTES = 512 << 20  # of all clients' parameters, if they had to be written out
USUAL_BATCH = 20
CLEARLY = 0.95  # of the time of what would be taken untried, or it is not worth another way
FULL = IndexMap.full()


@dataclass(frozen=True)
class Choice:
    """How the clients of one variant are computed on one kind of device from a round on.

    `way`: "loop" goes through autograd, one client after the other; "traced" likewise, by
    lists of kernels (`subfleet.platform.steps`); "vmap" takes `side_by_side` clients at
    most in one call. `factored`: clients that see few rows hold large dense layers as factors
    (`subfleet.platform.factors`); `products` multiplies float32 matrices
    (`subfleet.platform.products`). `reason` says for people why. Raises `InputError` for what this
    release cannot compute.
    """

    variant: str
    device: str
    way: Way
    side_by_side: int = 1
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    dtype: Dtype = "float32"
    compiled: bool = False
    factored: bool = False
    products: products.Library = "blas"
    threads: int = 1
    from_round: int = 1
    reason: str = ""

    @property
    def name(self) -> str:
        """The way in words: `vmap of 16`, or `traced by onednn`."""
        words = f"vmap of {self.side_by_side}" if self.way == "vmap" else self.way
        words += f" by {self.products}" * (self.products != "blas")
        return words + " compiled" * self.compiled

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known or type(value) is not type(known[0]):
                raise InputError(
                    f"engine record: {name}={value!r} for variant {self.variant}; "
                    f"this release knows {', '.join(map(repr, known))}"
                )
        if self.compiled and self.way == "loop":
            raise InputError(
                f"engine record: compiled=True with way='loop' for variant {self.variant}; "
                "only traced and vmap steps are compiled"
            )
        fits = self.device == "cpu" and self.way != "loop" and products.has_onednn()
        if self.products == "onednn" and not fits:
            raise InputError(
                f"engine record: products='onednn' for variant {self.variant} with "
                f"device={self.device!r} and way={self.way!r}; only traced and vmap steps on a CPU "
                "have it, where torch comes with oneDNN"
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
    "way": ("loop", "traced", "vmap"),
    "memory_format": ("contiguous", "channels_last"),
    "dtype": ("float32", "bfloat16"),
    "compiled": (False, True),
    "factored": (False, True),
    "products": ("blas", "onednn"),
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

    def at(
        self, variant: str, device: str, round: int, alike: Callable[[int], bool] | None = None
    ) -> Choice | None:
        """The choice for a variant on a device in a round; None where nothing holds yet.

        With `alike` only what was chosen in rounds counts that are alike: of one phase, say.
        """
        held = [c for c in self._index.get((variant, device), ()) if c.from_round <= round]
        for choice in reversed(held):
            if alike is None or alike(choice.from_round):
                return choice
        return None

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


def possible(net: SuperNetwork, program: ClientProgram) -> frozenset[Way]:
    """The ways in which clients can be computed; "loop" always is one.

    A search runs plain Python. Recurrent layers torch traces and maps step by step of time,
    slower than its loop. Layers must be known to give mapped clients what the loop gives them
    (`subfleet.platform.layers`); with BatchNorm only a loss, whose batch tells of its padding.
    """
    module = net.module(device="meta")
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    if isinstance(program, RunProgram) or recurrent:
        return frozenset({"loop"})
    ways: set[Way] = {"loop"}
    if isinstance(program, LossProgram):
        ways.add("traced")
    told = isinstance(program, LossProgram) or not net.statistics
    if told and layers.can_map(module, net.statistics):
        ways.add("vmap")
    return frozenset(ways)


def candidates(
    net: SuperNetwork,
    variant: object,
    device: str,
    engine: Engine,
    dtype: Dtype,
    *,
    ways: Collection[Way],
    round: int,
) -> list[Choice]:
    """The choices worth trying for a variant, the one to take untried first.

    "auto" takes vmap on a GPU, which small steps leave idle, and on CPUs for small
    networks without convolutions, whose steps are mostly overhead; else one client at a
    time, traced. Mapped convolutions never paid on a CPU: there they are not tried.
    """
    images = any(layer.kind in ("conv", "depthwise") for layer in net.layers)
    # Only traced steps name their products; and what is not tried goes by torch's own.
    tries = engine == "auto" and "traced" in ways
    # Where the parameters of all leave the cache, mapping loses what it gains ...
    size, most = 4 * net.stored_params(FULL), SIDE_BY_SIDE[device]
    cached = CACHE_BYTES // size if device == "cpu" else most
    widest = max(2, min(most, cached))
    maps = device != "cpu" or (not images and cached >= 4)
    order: list[tuple[Way, int]] = [("traced", 1), ("loop", 1)]
    if maps:
        order = [("vmap", widest), ("vmap", max(2, widest // 4)), *order]
    if tries and not images and max(cached, 3) < (held := min(most, MAPPED_BYTES // size)):
        order.append(("vmap", held))  # ... but for layers held as factors, which all share
    if engine != "auto":
        order = [(engine, widest if engine == "vmap" else 1), ("loop", 1)]
    last = images and takes_channels_last(net)
    return [
        Choice(
            variant=variant_name(variant),
            device=device,
            way=way,
            side_by_side=width,
            memory_format="channels_last" if way != "vmap" and last else "contiguous",
            dtype=dtype,
            factored=way != "loop",
            products=library,
            from_round=round,
        )
        for way, width in dict.fromkeys(order)
        if way in ways
        for library in (_libraries(net, device, width) if tries and way != "loop" else ("blas",))
    ]


def fastest(seconds: Sequence[float]) -> int:
    """The number of the fastest choice, or of the first where no other is clearly faster.

    >>> fastest([1.0, 0.97, 0.99]), fastest([1.0, 0.97, 0.94])
    (0, 2)
    """
    best = min(range(len(seconds)), key=seconds.__getitem__)
    return best if seconds[best] <= CLEARLY * seconds[0] else 0


def _libraries(net: SuperNetwork, device: str, clients: int) -> tuple[products.Library, ...]:
    """Those worth trying for so many clients side by side, with batches of the usual size."""
    matrices = [math.prod(shape) for shape in net.space.shapes.values() if len(shape) == 2]
    large = products.is_large(USUAL_BATCH * clients * max(matrices, default=0))
    return ("onednn", "blas") if device == "cpu" and large and products.has_onednn() else ("blas",)
