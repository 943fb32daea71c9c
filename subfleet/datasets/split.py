"""The split of a client's rows into a train, a validation and a test part.

A split is a code for each row, int8 [rows]: TRAIN, VAL, TEST, or NONE for a row
in no part. Every client with a row trains on one at least.
"""

from __future__ import annotations

import numpy as np

from subfleet.core.errors import InputError
from subfleet.datasets.draws import hashes, stream_key
from subfleet.datasets.federation import PARTS, checked_number, checked_part, offsets_of

TRAIN, VAL, TEST, NONE = range(4)
CODES = {"train": TRAIN, "val": VAL, "test": TEST}
_SLACK = 1e-9  # a share of 0.8 of 35 rows is 28, whichever way floats round


def check_shares(test_share: float, val_share: float) -> None:
    """InputError unless both are in [0, 1) and leave something to train on."""
    for name, share in (("test_share", test_share), ("val_share", val_share)):
        checked_number(name, share, 0, 0.99)
    if test_share + val_share > 0.99:
        raise InputError(
            f"test_share={test_share} and val_share={val_share} add up to more than 0.99; "
            "leave some rows to train on"
        )


def cuts(
    sizes: np.ndarray, test_share: float | np.ndarray = 0.2, val_share: float | np.ndarray = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Where the train part of n rows ends, and where the validation part does, int64 [clients].

    Shares to train are rounded down; each part with a share gets a row at least, as
    far as there are rows: first the train part, then the test part. Source: LEAF's
    rule, by which a client of two has one and one.

    >>> cuts(np.array([0, 1, 2, 3, 10]), 0.2, 0.1)
    (array([0, 1, 1, 1, 7]), array([0, 1, 1, 2, 8]))
    """
    n = np.asarray(sizes, dtype=np.int64)
    train = np.floor(n * (1.0 - test_share - val_share) + _SLACK).astype(np.int64)
    kept = np.floor(n * (1.0 - test_share) + _SLACK).astype(np.int64)
    return _at_least_one(train, kept, n, test_share, val_share)


def _at_least_one(
    train: np.ndarray,
    kept: np.ndarray,
    n: np.ndarray,
    test_share: float | np.ndarray,
    val_share: float | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Moves both cuts so that no part with a share is empty, where n suffices."""
    tests, validates = np.asarray(test_share) > 0, np.asarray(val_share) > 0
    most = np.maximum(n - tests, 1)
    train = np.maximum(np.minimum(train, most - validates), 1)
    kept = np.minimum(np.maximum(kept, train + validates), most)
    return np.minimum(train, n), np.minimum(np.where(validates, kept, train), n)


def seeded_split(
    seed: int,
    offsets: np.ndarray,
    group: np.ndarray | None = None,
    test_share: float | np.ndarray = 0.2,
    val_share: float | np.ndarray = 0.0,
    purpose: str = "train or test",
) -> np.ndarray:
    """Codes int8 [rows]: about `test_share` of each client's rows test, drawn from the seed.

    `offsets` int64 [clients + 1] says where clients start; a share may be one for
    all or one a client. Rows of one client with equal `group` (int [rows], numbered
    within the client) are repeats of each other and stay together; without `group`
    every row stands alone. Of a client with enough groups each part with a share
    gets one at least. A group that lies across a cut goes where its middle is.

    >>> code = seeded_split(0, np.array([0, 10, 12]), val_share=0.1)
    >>> np.bincount(code[:10]), np.bincount(code[10:])
    (array([7, 1, 2]), array([1, 0, 1]))
    """
    sizes = np.diff(offsets)
    rows = int(offsets[-1])
    client = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(rows) - np.repeat(offsets[:-1], sizes)
    group = within if group is None else np.asarray(group, dtype=np.int64)
    counter = (client.astype(np.uint64) << np.uint64(32)) | group.astype(np.uint64)
    draw = hashes(stream_key(seed, purpose), counter, 1)[:, 0]
    # Clients are in order already, so the draw alone orders rows within each.
    order = np.lexsort((group, draw, client))
    ordered = counter[order]
    new = np.ones(rows, dtype=bool)
    new[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(new)
    spans = np.diff(np.append(starts, rows))
    owner = client[order[starts]]
    # Twice the middle of each group, which is 2p + 1 for a lone row at place p.
    middle = 2 * (starts - offsets[owner]) + spans
    groups = np.bincount(owner, minlength=len(sizes))
    upto = [
        np.bincount(owner[middle <= 2 * cut[owner]], minlength=len(sizes))
        for cut in cuts(sizes, test_share, val_share)
    ]
    upto = _at_least_one(upto[0], upto[1], groups, test_share, val_share)
    number = np.arange(len(starts)) - np.repeat(offsets_of(groups)[:-1], groups)
    code = np.where(number < upto[0][owner], TRAIN, np.where(number < upto[1][owner], VAL, TEST))
    result = np.empty(rows, dtype=np.int8)
    result[order] = np.repeat(code, spans)
    return result


def leaf_split(
    seed: int,
    offsets: np.ndarray,
    group: np.ndarray,
    from_test: np.ndarray,
    test_share: float = 0.2,
    val_share: float = 0.0,
) -> np.ndarray:
    """The publisher's own parts, codes int8 [rows], with repeats on one side.

    A test row (bool [rows] `from_test`) that repeats a train row of the same client
    trains. A client that is left without a train or a test part is split by
    `seeded_split` instead. `val_share` of a client's rows are drawn from its train part.
    """
    sizes = np.diff(offsets)
    client = np.repeat(np.arange(len(sizes)), sizes)
    # Groups are numbered by their first row, so this is a row number.
    leader = np.repeat(offsets[:-1], sizes) + group
    in_train = np.zeros(int(offsets[-1]), dtype=bool)
    in_train[leader[~from_test]] = True
    trains = in_train[leader]
    count = np.bincount(client[trains], minlength=len(sizes))
    partless = (count == 0) | (count == sizes)
    code = np.where(trains, TRAIN, TEST).astype(np.int8)
    if val_share > 0:
        share = np.minimum(val_share * sizes / np.maximum(count, 1), 0.99)
        inner = seeded_split(seed, offsets_of(count), group[trains], share, 0.0, "train or val")
        code[trains] = np.where(inner == TEST, VAL, TRAIN)
    fallback = seeded_split(seed, offsets, group, test_share, val_share)
    return np.where(partless[client], fallback, code)


def temporal_split(
    offsets: np.ndarray, overlap: int, test_share: float = 0.2, val_share: float = 0.0
) -> np.ndarray:
    """Codes int8 [rows]: each client's first rows train, then some validate, the last ones test.

    The `overlap` rows after each cut share inputs with those before it and are in no
    part. A client too small for a part beyond its gap goes without the validation
    part; one without room for a test part either only trains, on all its rows.
    Source: LEAF's Shakespeare, which leaves such clients out. Rows that repeat
    others are not looked for.

    >>> temporal_split(np.array([0, 10, 12]), overlap=1)
    array([0, 0, 0, 0, 0, 0, 0, 0, 3, 2, 0, 0], dtype=int8)
    """
    sizes = np.diff(offsets)
    train, kept = cuts(sizes, test_share, val_share)
    tests = (kept < sizes) & (kept + overlap < sizes)
    kept = np.where(tests, kept, sizes)
    validates = (train < kept) & (train + overlap < kept) & (tests | (test_share == 0))
    train = np.where(validates, train, kept)
    within = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1], sizes)
    train, kept = np.repeat(train, sizes), np.repeat(kept, sizes)
    code = np.where(within < train, TRAIN, np.where(within < kept, VAL, TEST))
    gap = (within >= train) & (within < train + overlap) & (train < kept)
    gap |= (within >= kept) & (within < kept + overlap)
    return np.where(gap, NONE, code).astype(np.int8)


class Parts:
    """Which of a list of rows, client after client, are in which part.

    >>> parts = Parts(np.array([TRAIN, TEST, TRAIN, NONE], np.int8), np.array([0, 2, 4]))
    >>> parts.sizes(np.array([1, 0]), "train"), parts.rows(np.array([1, 0]), "all")
    (array([1, 1]), (array([2, 3, 0, 1]), array([0, 2, 4])))
    """

    def __init__(self, codes: np.ndarray, offsets: np.ndarray) -> None:
        self.codes = codes  # int8 [rows]
        self.offsets = offsets  # int64 [clients + 1]
        clients = len(offsets) - 1
        self._sizes = {"all": np.diff(offsets)}
        for part, code in CODES.items():
            before = offsets_of(codes == code)
            self._sizes[part] = before[offsets[1:]] - before[offsets[:-1]]
        assert set(self._sizes) == set(PARTS) and len(self._sizes["all"]) == clients

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The rows of each client in `part`, int64 [len(ids)]; "all" counts those in none, too."""
        return self._sizes[checked_part(part)][ids]

    def rows(self, ids: np.ndarray, part: str) -> tuple[np.ndarray, np.ndarray]:
        """Places in the list of the clients' rows in `part`, and where each client's start."""
        sizes = self.sizes(ids, "all")
        bounds = offsets_of(sizes)
        places = np.arange(bounds[-1]) + np.repeat(self.offsets[ids] - bounds[:-1], sizes)
        if part == "all":
            return places, bounds
        chosen = self.codes[places] == CODES[checked_part(part)]
        return places[chosen], offsets_of(chosen)[bounds]

    def report(self) -> dict[str, int]:
        """Rows of each part and in none, and how many clients have no test part."""
        counts = np.bincount(self.codes, minlength=NONE + 1)
        facts = {f"rows_{part}": int(counts[code]) for part, code in CODES.items()}
        empty = int((self._sizes["test"] == 0).sum())
        return facts | {"rows_in_no_part": int(counts[NONE]), "clients_without_test": empty}
