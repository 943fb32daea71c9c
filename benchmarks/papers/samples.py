"""Small parts of published data sets: some clients, and some rows of each.

An experiment names them as any data set of one's own, `data.name = "samples:shakespeare"`.
The part is the same for every seed of a run; only the split of a client's tweets into a
train and a test part follows the run's seed, as it does for whole data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from subfleet.config import DataTable
from subfleet.core.errors import InputError
from subfleet.core.seeds import generator
from subfleet.datasets.federation import Federation, offsets_of, split_of, train_sizes
from subfleet.datasets.memory import InMemory
from subfleet.datasets.reader import ClientRows, Faults, Reader
from subfleet.datasets.sent140 import Sent140
from subfleet.datasets.shakespeare import Shakespeare
from subfleet.registry import build_data

PART_SEED = 0


class Sample(InMemory):
    """Clients in memory, of tokens 0 .. vocabulary - 1."""

    vocabulary = 0
    embedding = None
    ordered = False  # whether a client's rows follow each other, so that neighbours are alike


def shakespeare(*, source: str, clients: int = 60, most: int = 200) -> Sample:
    """`clients` drawn roles (0: all) with `most` windows of each, of the roles that have so many.

    The first four fifths of a role's windows are its train part and the last fifth its test
    part, 79 windows after it so that they share no character; `most` are spread evenly over
    both, four to one, since neighbouring windows differ in one character.
    """
    reader = Shakespeare()
    gap, tests = reader.seq_len - 1, most // 5
    roles = _drawn(_read(reader, source), clients, most + gap)
    xs, ys, trains = [], [], []
    for role in roles:
        # Of a short role the test part begins earlier, still a gap after the train part.
        cut = min(len(role.y) * 4 // 5, len(role.y) - gap - tests)
        rows = np.concatenate(
            [_spread(0, cut, most - tests), _spread(cut + gap, len(role.y), tests)]
        )
        xs.append(role.x[rows])
        ys.append(role.y[rows])
        trains.append(rows < cut)
    made = _sample(reader, source, xs, ys, train=np.concatenate(trains))
    made.ordered = True
    return made


def sent140(
    *,
    source: str,
    seed: int = 0,
    clients: int = 0,
    least: int = 10,
    vocabulary: int = 10_000,
    test_share: float = 0.2,
) -> Sample:
    """The users with `least` tweets or more; of them `clients` drawn ones, 0 for all."""
    reader = Sent140(vocabulary=vocabulary)
    users = _drawn(_read(reader, source), clients, least)
    xs, ys = [user.x for user in users], [user.y for user in users]
    return _sample(reader, source, xs, ys, seed=seed, test_share=test_share)


def apart(
    *, of: str, seeds: Sequence[int], seed: int = 0, progress: Any = None, **options: Any
) -> Sample:
    """What the data set `of` trains on under every one of `seeds`, as a data set of its own.

    For choosing settings without a look at what tables of these seeds are measured on: clients
    that any of the seeds holds out are left out, and so is of every other client each row that
    equals one of its test part under any of them. What is left of a client is split again: at
    random by the run's seed, or, where rows follow each other, the last fifth tests (of windows
    into one text those at the cut may share characters). `options` are those of `of`.
    """
    wholes = [
        build_data(DataTable(name=of, **options), seed=one, progress=progress) for one in seeds
    ]
    whole = wholes[0]
    ids = np.arange(whole.num_clients)
    for data, one in zip(wholes, seeds, strict=True):
        ids = np.intersect1d(ids, split_of(data, one)[0])
    kept = [_unmeasured(wholes, client) for client in ids]
    kept = [(x, y) for x, y in kept if len(y) > 1]  # one to train and one to test
    if not kept:
        raise InputError(
            f"data.seeds = {list(seeds)}: no client of {of} trains under all of them with two "
            "rows or more; give fewer seeds or more clients"
        )
    ordered = getattr(whole, "ordered", False)
    train = [np.arange(len(y)) < train_sizes(np.array(len(y))) for _, y in kept]
    made = Sample(
        np.concatenate([x for x, _ in kept]),
        np.concatenate([y for _, y in kept]),
        offsets_of(np.array([len(y) for _, y in kept])),
        num_classes=whole.num_classes,
        scale=whole.scale,
        seed=seed,
        train=np.concatenate(train) if ordered else None,
        name=f"{whole.name}-apart",
    )
    made.vocabulary = getattr(whole, "vocabulary", 0)
    return made


def _unmeasured(wholes: Sequence[Federation], client: int) -> tuple[np.ndarray, np.ndarray]:
    """A client's rows that equal none of its test part in any of these splits, in their order."""
    one = np.array([client])
    tests = {
        (x.tobytes(), int(y))
        for data in wholes
        for x, y in zip(*data.block(one, "test")[:2], strict=True)
    }
    x, y, _ = wholes[0].block(one, "train")
    free = [i for i in range(len(y)) if (x[i].tobytes(), int(y[i])) not in tests]
    return x[free], y[free]


def _read(reader: Reader, source: str) -> list[ClientRows]:
    faults, path = Faults(), Path(source).expanduser()
    return [rows for shard in reader.shards(path) for rows in reader.read(shard, faults)]


def _drawn(found: list[ClientRows], clients: int, least: int) -> list[ClientRows]:
    """`clients` of those with `least` rows, in order of their names."""
    able = sorted((one for one in found if len(one.y) >= least), key=lambda one: one.name)
    if not able or clients > len(able):
        raise InputError(
            f"data.clients = {clients}: {len(able)} clients have {least} rows or more; "
            "ask for fewer, or lower data.least"
        )
    if not clients:
        return able
    chosen = generator(PART_SEED, "sampled clients").choice(len(able), clients, replace=False)
    return [able[i] for i in np.sort(chosen)]


def _spread(first: int, last: int, number: int) -> np.ndarray:
    """`number` rows of first .. last - 1, evenly spread, each once.

    >>> _spread(0, 10, 4)
    array([0, 2, 5, 7])
    """
    return first + np.arange(number) * (last - first) // number


def _sample(
    reader: Reader,
    source: str,
    xs: list[np.ndarray],
    ys: list[np.ndarray],
    *,
    seed: int = 0,
    train: np.ndarray | None = None,
    test_share: float = 0.2,
) -> Sample:
    layout = reader.layout(Path(source).expanduser())
    made = Sample(
        np.concatenate(xs),
        np.concatenate(ys),
        offsets_of(np.array([len(y) for y in ys])),
        num_classes=layout.num_classes,
        scale=layout.scale,
        seed=seed,
        train=train,
        test_share=test_share,
        name=f"{reader.name}-sample",
    )
    made.vocabulary = layout.vocabulary
    return made
