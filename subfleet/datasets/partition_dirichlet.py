"""Dirichlet partitions: of each class over clients, and of sizes alone.

Source: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution
for Federated Visual Classification" (2019), in the form of FedML and DWNP: the
classes are dealt in turn, and who has its share of the rows gets no more. Those
draw anew until every client has ten rows, which need not end; here at most
`DRAWS` times, after which rows move from the largest clients.
"""

from __future__ import annotations

import numpy as np

from subfleet.core.seeds import generator
from subfleet.datasets.federation import checked_number
from subfleet.datasets.partition_result import (
    Partition,
    checked_labels,
    gathered,
    least_rows,
    repair,
    rows_by_class,
)

DRAWS = 10


def log_gamma_draws(draw: np.random.Generator, alpha: float, count: int) -> np.ndarray:
    """Logarithms of Gamma(alpha) draws, float64 [count], finite however small alpha is.

    Gamma(a) = Gamma(a + 1) U^(1/a), and -log U is exponential; the draw itself
    would be 0 for nearly everyone when alpha is 0.001.
    """
    grown = np.log(draw.standard_gamma(alpha + 1.0, count))
    return grown - draw.standard_exponential(count) / alpha


def cut(log_weights: np.ndarray, rows: int) -> np.ndarray:
    """Rows of each client, int32, `rows` in all, in proportion to exp(log_weights).

    Cut at floor(cumsum(q) rows), so a client with q = 0 gets none.
    """
    upto = np.cumsum(np.exp(log_weights - log_weights.max()))
    upto *= rows / upto[-1]
    edges = upto.astype(np.int32)
    # Whoever comes after the last q > 0 stands where it does, at the very end.
    edges[np.searchsorted(upto, upto[-1]) :] = rows
    edges[1:] -= edges[:-1].copy()
    return edges


def dirichlet(labels: np.ndarray, clients: int, seed: int, alpha: float) -> Partition:
    """Each class is dealt in proportions drawn from Dir(alpha, ..., alpha).

    labels: integers [n]. Every client gets min(10, n / 2 clients) rows at least.

    >>> part = dirichlet(np.arange(1000) % 10, clients=20, seed=0, alpha=0.5)
    >>> sorted(part.rows.tolist()) == list(range(1000)), int(part.sizes.min()) >= 10
    (True, True)
    """
    labels = checked_labels(labels, clients)
    check_alpha(alpha)
    per_class = np.bincount(labels)
    least = least_rows(len(labels), clients)
    counts, draws = None, 0
    while counts is None:
        # The last draw is taken as it comes.
        wanted = least if draws < DRAWS - 1 else 0
        counts = class_counts(per_class, clients, seed, alpha, draws, least=wanted)
        draws += 1
    owner = deal_counts(labels, counts, generator(seed, "partition rows"))
    owner, repaired, moved = repair(owner, clients, least)
    facts = {"draws": draws, "least": least, "repaired": repaired, "moved": moved}
    return gathered(owner, clients, labels, kind="dirichlet", **facts)


def class_counts(
    per_class: np.ndarray, clients: int, seed: int, alpha: float, number: int, *, least: int = 0
) -> np.ndarray | None:
    """The rows of each class and client in the draw of this number, int32 [classes, clients].

    Classes in turn: q ~ Dir(alpha), q_i <- 0 for whoever has rows / clients or more,
    and the class is cut in proportion to what remains. Whoever has its share before
    the last row is dealt leaves somebody who has not, so some q_i always remains.
    The proportions of a class depend on (seed, draw, class) alone: train and test
    rows cut by the same draw get the same ones. None as soon as it is certain that
    a client will have fewer than `least` rows.
    """
    total = left = int(per_class.sum())
    sizes = np.zeros(clients, dtype=np.int64)
    counts = np.zeros((len(per_class), clients), dtype=np.int32)
    for label, rows in enumerate(per_class.tolist()):
        if rows == 0:
            continue
        draw = generator(seed, "dirichlet", round=number, client=label)
        log_q = log_gamma_draws(draw, alpha, clients)
        # Balance rule in whole numbers: size_i >= total / clients.
        full = sizes * clients >= total
        if full.any():
            log_q[full] = -np.inf
        counts[label] = cut(log_q, rows)
        sizes += counts[label]
        left -= rows
        if left < least * clients and left < np.maximum(least - sizes, 0).sum():
            return None
    return counts


def deal_counts(labels: np.ndarray, counts: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The client of each row, int64 [n], when client i takes counts[c, i] rows of class c.

    The counts of a class sum to its rows; which rows are whose is drawn.
    """
    owner = np.empty(len(labels), dtype=np.int64)
    owner[rows_by_class(labels, draw)] = np.concatenate(
        [np.repeat(np.arange(counts.shape[1]), of_class) for of_class in counts]
    )
    return owner


def quantity(labels: np.ndarray, clients: int, seed: int, alpha: float) -> Partition:
    """Sizes in proportions drawn from Dir(alpha, ..., alpha); labels are IID.

    Every client gets min(10, n / 2 clients) rows at least: of ten draws the first in
    which each has them, else the last one with rows moved from the largest clients.

    >>> part = quantity(np.zeros(1000, int), clients=4, seed=0, alpha=0.3)
    >>> int(part.sizes.sum()), int(part.sizes.min()) >= 10
    (1000, True)
    """
    labels = checked_labels(labels, clients)
    check_alpha(alpha)
    least = least_rows(len(labels), clients)
    sizes, draws = np.zeros(clients, dtype=np.int32), 0
    while draws < DRAWS and sizes.min() < least:
        draw = generator(seed, "quantity", round=draws)
        sizes = cut(log_gamma_draws(draw, alpha, clients), len(labels))
        draws += 1
    owner = np.empty(len(labels), dtype=np.int64)
    mixed = generator(seed, "partition rows").permutation(len(labels))
    owner[mixed] = np.repeat(np.arange(clients), sizes)
    owner, repaired, moved = repair(owner, clients, least)
    facts = {"draws": draws, "least": least, "repaired": repaired, "moved": moved}
    return gathered(owner, clients, labels, kind="quantity", **facts)


def check_alpha(alpha: float) -> None:
    """InputError unless alpha is a number in [1e-6, 1e6]."""
    checked_number("alpha", alpha, 1e-6, 1e6)
