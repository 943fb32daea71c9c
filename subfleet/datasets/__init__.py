"""Data sets as federations: clients by number, their rows on demand."""

from subfleet.datasets.federation import Block, Federation, split_clients
from subfleet.datasets.femnist import open_femnist
from subfleet.datasets.memory import InMemory
from subfleet.datasets.sets import SETS, open_set
from subfleet.datasets.store import ClientRows, Store, write_store
from subfleet.datasets.synthetic import SyntheticFemnist
from subfleet.datasets.vectors import SyntheticVectors

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
    "open_set",
    "split_clients",
    "write_store",
]
