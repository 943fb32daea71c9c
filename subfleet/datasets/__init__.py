"""Data sets as federations: clients by number, their rows on demand."""

from __future__ import annotations

from collections.abc import Callable

from subfleet.datasets.federation import Block, Federation, split_clients
from subfleet.datasets.femnist import open_femnist
from subfleet.datasets.memory import InMemory
from subfleet.datasets.reader import ClientRows
from subfleet.datasets.store import Store
from subfleet.datasets.synthetic import SyntheticFemnist
from subfleet.datasets.vectors import SyntheticVectors
from subfleet.datasets.writing import write_store

SETS: dict[str, Callable[..., Federation]] = {
    "femnist": open_femnist,
    "synthetic_femnist": SyntheticFemnist,
    "synthetic_vectors": SyntheticVectors,
}
"""What configuration knows by name; a factory's parameters are the keys of `[data]`."""

__all__ = [
    "SETS",
    "Block",
    "ClientRows",
    "Federation",
    "InMemory",
    "Store",
    "SyntheticFemnist",
    "SyntheticVectors",
    "open_femnist",
    "split_clients",
    "write_store",
]
