"""Partitions by name: labels to clients, deterministic in the seed.

    from subfleet.datasets.partition import partition
    part = partition("dirichlet", labels, clients=100, seed=0, alpha=0.5)

Generators need labels alone, are vectorised, and never loop without bound.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.seeds import generator
from subfleet.datasets.partition_classes import even_sizes, pathological, shards
from subfleet.datasets.partition_dirichlet import (
    class_counts,
    deal_counts,
    dirichlet,
    quantity,
)
from subfleet.datasets.partition_result import Partition, Report, checked_labels, gathered


def iid(labels: np.ndarray, clients: int, seed: int) -> Partition:
    """Rows in random order, cut into sizes that differ by one at most.

    >>> iid(np.zeros(10, int), clients=4, seed=0).sizes
    array([3, 3, 2, 2])
    """
    labels = checked_labels(labels, clients)
    owner = np.empty(len(labels), dtype=np.int64)
    mixed = generator(seed, "partition rows").permutation(len(labels))
    owner[mixed] = np.repeat(np.arange(clients), even_sizes(len(labels), clients))
    return gathered(owner, clients, labels, kind="iid")


KINDS: dict[str, tuple[Callable[..., Partition], tuple[str, ...]]] = {
    "iid": (iid, ()),
    "dirichlet": (dirichlet, ("alpha",)),
    "pathological": (pathological, ("classes_per_client", "form")),
    "shards": (shards, ("shards_per_client",)),
    "quantity": (quantity, ("alpha",)),
}
"""Name -> generator(labels, clients, seed, **options), and the names of its options."""


def partition(
    kind: str, labels: np.ndarray, clients: int, seed: int = 0, **options: Any
) -> Partition:
    """The partition of this kind; `options` are those of its generator in `KINDS`.

    labels: integers [n], from 0. InputError: an unknown kind, more clients than
    rows, or an option out of its bounds.
    """
    if kind not in KINDS:
        raise InputError(f"partition={kind!r} is unknown; {did_you_mean(kind, KINDS)}")
    return KINDS[kind][0](labels, clients, seed, **options)


def same_distribution(
    train: Partition,
    train_labels: np.ndarray,
    test_labels: np.ndarray,
    seed: int,
    *,
    alpha: float | None = None,
) -> Partition:
    """Test rows dealt so that each client's labels are distributed about as its train labels.

    A Dirichlet partition (`alpha` and `seed` as for `dirichlet`): each class of test
    rows is cut by the very proportions that cut the train rows, and the balance
    rule looks at test counts; distributions are alike, not the same. Any other:
    by the share of the class's train rows that each client has. Every test row is
    with one client, except those of classes that nobody trains on. A client may
    get none. Source: DWNP's split of CIFAR's test set.
    """
    clients = len(train.offsets) - 1
    labels = np.asarray(test_labels, dtype=np.int64)
    classes = int(max(labels.max(initial=0), np.max(train_labels, initial=0))) + 1
    per_class = np.bincount(labels, minlength=classes)
    if train.report.kind == "dirichlet" and alpha is not None:
        counts = class_counts(per_class, clients, seed, alpha, train.report.draws - 1)
        assert counts is not None  # no client needs any
        owner = deal_counts(labels, counts, generator(seed, "partition test rows"))
        return gathered(owner, clients, labels, kind="same distribution")
    held = np.asarray(train_labels, dtype=np.int64)[train.rows] * clients + train.owners()
    mine = np.bincount(held, minlength=classes * clients).reshape(classes, clients)
    untrained = np.flatnonzero((mine.sum(axis=1) == 0) & (per_class > 0))
    dealt = ~np.isin(labels, untrained)
    counts = np.zeros_like(mine)
    for label in np.flatnonzero(mine.sum(axis=1) > 0).tolist():
        upto = np.cumsum(mine[label])
        counts[label] = np.diff(upto * per_class[label] // upto[-1], prepend=0)
    owner = np.full(len(labels), -1, dtype=np.int64)
    draw = generator(seed, "partition test rows")
    owner[dealt] = deal_counts(labels[dealt], counts, draw)
    left_out = {f"class {c} has no train rows": int(per_class[c]) for c in untrained.tolist()}
    return gathered(owner, clients, labels, kind="same distribution", left_out=left_out)


def total_variation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Half the L1 distance of two histograms' shares, float64 [clients], in [0, 1].

    first, second: counts [clients, classes]. NaN where a client has nothing in one.

    >>> total_variation(np.array([[2, 2], [3, 0]]), np.array([[1, 1], [0, 5]]))
    array([0., 1.])
    """
    with np.errstate(invalid="ignore"):
        p = first / first.sum(axis=1, keepdims=True)
        q = second / second.sum(axis=1, keepdims=True)
    return np.abs(p - q).sum(axis=1) / 2


__all__ = [
    "KINDS",
    "Partition",
    "Report",
    "dirichlet",
    "iid",
    "partition",
    "pathological",
    "quantity",
    "same_distribution",
    "shards",
    "total_variation",
]
