"""Data sets as federations: clients by number, their rows on demand."""

from subfleet.datasets.federation import Block, Federation, split_clients
from subfleet.datasets.memory import InMemory
from subfleet.datasets.synthetic import SyntheticFemnist
from subfleet.datasets.vectors import SyntheticVectors

__all__ = [
    "Block",
    "Federation",
    "InMemory",
    "SyntheticFemnist",
    "SyntheticVectors",
    "split_clients",
]
