"""Pathological partitions: each client holds Z classes only; and shards of sorted labels.

Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from
Decentralized Data" (2017): shards. T Dinh, Tran, Nguyen, "Personalized Federated
Learning with Moreau Envelopes" (pFedMe, 2020): client u holds the classes
(u + j) mod K, j < Z, in unequal amounts.
"""

from __future__ import annotations

import numpy as np

from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.seeds import generator
from subfleet.datasets.federation import checked_number, offsets_of
from subfleet.datasets.partition_result import Partition, checked_labels, gathered, rows_by_class

GENERATORS = ("auto", "pfedme", "random", "shards")
# A holder's part of a class is in proportion to a number from here. With two classes each,
# 20 clients of MNIST then train on about 1,200 to 3,800 images, the range that pFedMe states.
_UNEQUAL = (0.3, 1.7)


def pathological(
    labels: np.ndarray, clients: int, seed: int, classes_per_client: int, form: str = "auto"
) -> Partition:
    """Each client holds exactly Z = classes_per_client of the K classes that have rows.

    form: "pfedme": classes (u + j) mod K, unequal sizes. "random": random sets of Z
    classes, each class with as many holders as any other give or take two, unequal
    sizes. "shards": see `shards`; at most about Z classes, equal sizes. "auto": "pfedme"
    where it reaches every class of 10 or fewer, else "random". InputError: Z over K;
    fewer than K / Z clients for "random"; a class with fewer rows than holders.

    >>> part = pathological(np.arange(600) % 10, clients=20, seed=0, classes_per_client=2)
    >>> np.unique(part.rows[: part.offsets[1]] % 10)
    array([0, 1])
    """
    labels = checked_labels(labels, clients)
    checked_number("classes_per_client", classes_per_client, 1, whole=True)
    if form not in GENERATORS:
        raise InputError(f"form={form!r} is unknown; {did_you_mean(form, GENERATORS)}")
    if form == "shards":
        return shards(labels, clients, seed, classes_per_client)
    present = np.flatnonzero(np.bincount(labels))
    if classes_per_client > len(present):
        raise InputError(
            f"classes_per_client={classes_per_client} is more than the {len(present)} classes "
            f"that have rows; give at most {len(present)}"
        )
    reached = clients + classes_per_client - 1 >= len(present)
    if form == "pfedme" or (form == "auto" and len(present) <= 10 and reached):
        turn = np.arange(clients)[:, None] + np.arange(classes_per_client)
        hands = turn % len(present)
    else:
        hands = _random_hands(len(present), clients, classes_per_client, seed)
    return _deal_hands(labels, present, hands, seed)


def _random_hands(classes: int, clients: int, each: int, seed: int) -> np.ndarray:
    """Z distinct classes for each client, int64 [clients, Z], every class as often as any.

    Classes are dealt like cards: a shuffled deck serves K // Z clients; the cards
    that are left over are drawn first from the next deck.
    """
    if clients * each < classes:
        raise InputError(
            f"clients={clients} with classes_per_client={each} hold {clients * each} classes, "
            f"fewer than the {classes} that have rows; give at least {-(-classes // each)} "
            f'clients, or form="pfedme", which leaves the other classes out and says so'
        )
    draw = generator(seed, "pathological classes")
    served = classes // each
    decks = -(-clients // served)
    spare = classes - served * each
    score = draw.random((decks, classes), dtype=np.float32)
    if spare:
        # The leftovers of deck d are the d-th stretch of a fixed random order.
        order = draw.permutation(classes)
        left = order[(np.arange(decks)[:, None] * spare + np.arange(spare)) % classes]
        deck = np.arange(decks)[:, None]
        score[deck[1:], left[:-1]] -= 2
        score[deck, left] += 4
    hands = np.argsort(score, axis=1)[:, : served * each].reshape(-1, each)[:clients]
    return hands[draw.permutation(clients)]


def _deal_hands(labels: np.ndarray, present: np.ndarray, hands: np.ndarray, seed: int) -> Partition:
    """Cuts every class among its holders, at random and unequally, one row each at least."""
    clients, each = hands.shape
    per_class = np.bincount(labels)
    rows = per_class[present]
    holders = np.bincount(hands.reshape(-1), minlength=len(present))
    if np.any(holders > rows):
        worst = int(np.argmax(holders - rows))
        raise InputError(
            f"classes_per_client={each} with clients={clients} gives class {present[worst]} "
            f"{holders[worst]} holders, but it has {rows[worst]} rows, one each at least; "
            "give fewer clients or fewer classes a client"
        )
    pair = np.argsort(hands.reshape(-1), kind="stable")  # (client, class) pairs, class by class
    held = holders > 0
    counts = _unequal(rows[held], holders[held], generator(seed, "pathological sizes"))
    order = rows_by_class(labels, generator(seed, "partition rows"))
    unheld = present[~held]
    if len(unheld):
        order = order[~np.isin(labels[order], unheld)]
    owner = np.full(len(labels), -1, dtype=np.int64)
    owner[order] = np.repeat(pair // each, counts)
    left_out = {f"class {c} has no holder": int(per_class[c]) for c in unheld.tolist()}
    return gathered(owner, clients, labels, kind="pathological", left_out=left_out)


def _unequal(rows: np.ndarray, holders: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Cuts rows[c] into holders[c] random parts, each at least 1: int64 [holders.sum()]."""
    weight = np.cumsum(draw.uniform(*_UNEQUAL, size=int(holders.sum())))
    ends = np.cumsum(holders)
    before = np.repeat(np.append(0.0, weight[ends - 1])[:-1], holders)
    whole = np.repeat(np.diff(weight[ends - 1], prepend=0.0), holders)
    free = rows - holders
    upto = np.floor((weight - before) / whole * np.repeat(free, holders)).astype(np.int64)
    upto[ends - 1] = free
    parts = np.diff(upto, prepend=0)
    starts = ends[:-1]
    parts[starts] = upto[starts]
    return parts + 1


def shards(labels: np.ndarray, clients: int, seed: int, shards_per_client: int) -> Partition:
    """Rows sorted by label, cut into clients x Z equal shards, Z of them dealt to each client.

    Rows of one class are in random order. Shards differ by one row at most.

    >>> part = shards(np.arange(100) % 10, clients=10, seed=0, shards_per_client=2)
    >>> part.sizes.tolist() == [10] * 10
    True
    """
    labels = checked_labels(labels, clients)
    checked_number("shards_per_client", shards_per_client, 1, whole=True)
    number = clients * shards_per_client
    if number > len(labels):
        raise InputError(
            f"clients={clients} with {shards_per_client} shards each need {number} rows, one a "
            f"shard at least, but there are {len(labels)}; give fewer clients or shards"
        )
    edges = offsets_of(even_sizes(len(labels), number))
    client = np.empty(number, dtype=np.int64)
    client[generator(seed, "shards").permutation(number)] = np.arange(number) // shards_per_client
    owner = np.empty(len(labels), dtype=np.int64)
    order = rows_by_class(labels, generator(seed, "partition rows"))
    owner[order] = np.repeat(client, np.diff(edges))
    return gathered(owner, clients, labels, kind="shards")


def even_sizes(rows: int, parts: int) -> np.ndarray:
    """`rows` in `parts` sizes that differ by one at most, the larger first, int64 [parts].

    >>> even_sizes(7, 3)
    array([3, 2, 2])
    """
    return rows // parts + (np.arange(parts) < rows % parts).astype(np.int64)
