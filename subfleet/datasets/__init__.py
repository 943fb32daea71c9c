"""Data sets as federations: clients by number, their rows on demand."""

from __future__ import annotations

import functools
from collections.abc import Callable

from subfleet.datasets.celeba import CelebA
from subfleet.datasets.cifar import Cifar10, Cifar100
from subfleet.datasets.cinic10 import Cinic10
from subfleet.datasets.federation import Block, Federation, split_clients
from subfleet.datasets.femnist import Femnist
from subfleet.datasets.memory import InMemory
from subfleet.datasets.mini_imagenet import MiniImagenet
from subfleet.datasets.mnist import Mnist
from subfleet.datasets.partitioned import Partitioned
from subfleet.datasets.published import dealt, published
from subfleet.datasets.reader import ClientRows, Reader
from subfleet.datasets.sent140 import Sent140
from subfleet.datasets.shakespeare import Shakespeare
from subfleet.datasets.store import Store
from subfleet.datasets.synthetic import SyntheticFemnist
from subfleet.datasets.tiny_imagenet import TinyImagenet
from subfleet.datasets.twin_celeba import SyntheticCelebA
from subfleet.datasets.twin_images import PRESETS, SyntheticImages
from subfleet.datasets.twin_sent140 import SyntheticSent140
from subfleet.datasets.twin_shakespeare import SyntheticShakespeare
from subfleet.datasets.vectors import SyntheticVectors
from subfleet.datasets.writing import write_store

READERS: dict[str, type[Reader]] = {
    "celeba": CelebA,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "cinic10": Cinic10,
    "femnist": Femnist,
    "mini_imagenet": MiniImagenet,
    "mnist": Mnist,
    "sent140": Sent140,
    "shakespeare": Shakespeare,
    "tiny_imagenet": TinyImagenet,
}
"""Published data sets; a reader's fields are options of its own."""

SETS: dict[str, Callable[..., Federation]] = {
    **{name: published(reader) for name, reader in READERS.items()},
    **{
        f"synthetic_{like}": dealt(functools.partial(SyntheticImages.like, like))
        for like in PRESETS
    },
    "synthetic_celeba": SyntheticCelebA,
    "synthetic_femnist": SyntheticFemnist,
    "synthetic_sent140": SyntheticSent140,
    "synthetic_shakespeare": SyntheticShakespeare,
    "synthetic_vectors": SyntheticVectors,
}
"""What configuration knows by name; a factory's parameters are the keys of `[data]`."""

__all__ = [
    "READERS",
    "SETS",
    "Block",
    "ClientRows",
    "Federation",
    "InMemory",
    "Partitioned",
    "Store",
    "SyntheticCelebA",
    "SyntheticFemnist",
    "SyntheticImages",
    "SyntheticSent140",
    "SyntheticShakespeare",
    "SyntheticVectors",
    "split_clients",
    "write_store",
]
