"""Small parts of published data sets: some clients, and some rows of each.

An experiment names them as any data set of one's own, `data.name = "samples:shakespeare"`.
The part is the same for every seed of a run; only the split of a client's tweets into a
train and a test part follows the run's seed, as it does for whole data sets.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from subfleet.config import DataTable
from subfleet.core.errors import InputError
from subfleet.core.seeds import generator
from subfleet.datasets.federation import offsets_of, split_of
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
    return _sample(reader, source, xs, ys, train=np.concatenate(trains))


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


def apart(*, of: str, seed: int = 0, **options: Any) -> Sample:
    """The clients of the data set `of` that train under this seed, as a data set of their own.

    A run on it holds out some of them, so that settings can be chosen without a look at the
    clients that the whole data set holds out. `options` are those of `of`.
    """
    whole = build_data(DataTable(name=of, **options), seed=seed)
    ids, _ = split_of(whole, seed)
    blocks = [whole.block(ids, part) for part in ("train", "test")]
    owner = np.concatenate([np.repeat(np.arange(len(ids)), np.diff(b.offsets)) for b in blocks])
    order = np.argsort(owner, kind="stable")
    made = Sample(
        np.concatenate([block.x for block in blocks])[order],
        np.concatenate([block.y for block in blocks])[order],
        offsets_of(np.bincount(owner, minlength=len(ids))),
        num_classes=whole.num_classes,
        scale=whole.scale,
        train=(np.arange(len(owner)) < len(blocks[0].y))[order],
        name=f"{whole.name}-apart",
    )
    made.vocabulary = getattr(whole, "vocabulary", 0)
    return made


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
