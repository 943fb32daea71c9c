"""The data sets that a name in an experiment may mean."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from subfleet.core.errors import InputError, did_you_mean
from subfleet.datasets.federation import Federation
from subfleet.datasets.femnist import open_femnist
from subfleet.datasets.synthetic import SyntheticFemnist
from subfleet.datasets.vectors import SyntheticVectors

SETS: dict[str, Callable[..., Federation]] = {
    "femnist": open_femnist,
    "synthetic_femnist": SyntheticFemnist,
    "synthetic_vectors": SyntheticVectors,
}


def open_set(name: str, **options: Any) -> Federation:
    """The data set `name` with its own options, each of which may be a key of `[data]`.

    InputError: an unknown name or option, a needed one left out, a value out of
    bounds.

    >>> open_set("synthetic_vectors", clients=10, samples=5).num_clients
    10
    """
    if name not in SETS:
        raise InputError(f"data set {name!r} is unknown; {did_you_mean(name, SETS)}")
    return call_factory(name, SETS[name], options)


def call_factory(
    name: str, factory: Callable[..., Federation], options: dict[str, Any]
) -> Federation:
    """`factory(**options)`, with InputError for options that it does not take or lacks."""
    known = inspect.signature(factory).parameters
    needed = [key for key, p in known.items() if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for key in options:
        if key not in known and not open_ended:
            raise InputError(
                f"data set {name!r} has no option {key!r} (given {options[key]!r}); "
                f"{did_you_mean(key, known)}"
            )
    for key in needed:
        if key not in options:
            raise InputError(f"data set {name!r} needs {key!r}, which is not given; set it")
    return factory(**options)
