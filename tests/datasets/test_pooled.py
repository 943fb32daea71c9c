"""All training clients' rows at one client."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.errors import InputError
from subfleet.datasets import Federation, InMemory
from subfleet.datasets.federation import offsets_of, split_clients, split_of
from subfleet.datasets.pooled import Pooled
from subfleet.datasets.synthetic import SyntheticFemnist
from subfleet.datasets.tables import to_block, to_table

PARTS = ("train", "val", "test", "all")


def apart(**options):
    return toys.federation([5, 9, 1, 7, 12, 4], (2,), 3, **options)


def rows(block):
    """A block's rows as a sorted list of (x, y)."""
    return sorted(
        (tuple(x.ravel().tolist()), int(y)) for x, y in zip(block.x, block.y, strict=True)
    )


def test_it_is_a_federation_of_the_pool_and_those_held_out():
    data = Pooled(apart(), np.array([4, 0, 3]))
    assert isinstance(data, Federation)
    facts = (data.name, data.num_clients, data.num_classes, data.input_shape)
    assert facts == ("in_memory", 4, 3, (2,)) and data.scale == apart().scale
    train, held = split_of(data, seed=5)
    assert train.tolist() == [0] and held.tolist() == [1, 2, 3] == data.held_out.tolist()
    assert data.fingerprint == apart().fingerprint
    assert getattr(data, "vocabulary", None) is None  # images have none


@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_pooled_by_itself(part):
    given, train = apart(val_share=0.2), np.array([0, 3, 4])
    data = Pooled(given, train)
    block = data.block(np.array([0]), part)
    assert rows(block) == rows(given.block(train, part)) and len(block.y)
    assert block.offsets.tolist() == [0, len(block.y)]


def test_the_others_keep_their_rows_in_order():
    given = apart()
    data, others = Pooled(given, np.array([0, 3, 4])), np.array([1, 2, 5])
    for ids in ([1, 2, 3], [3, 1], [2], []):
        found, expected = (
            data.block(np.array(ids, np.int64), "all"),
            given.block(others[np.array(ids, np.int64) - 1], "all"),
        )
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_pool_may_stand_among_others():
    data = Pooled(apart(), np.array([0, 3, 4]))
    mixed = data.block(np.array([2, 0, 1]), "train")
    for place, client in enumerate((2, 0, 1)):
        alone = data.block(np.array([client]), "train")
        at = slice(mixed.offsets[place], mixed.offsets[place + 1])
        assert np.array_equal(mixed.x[at], alone.x) and np.array_equal(mixed.y[at], alone.y)


@pytest.mark.parametrize("part", PARTS)
def test_sizes_and_counts_agree_with_the_block(part):
    data, ids = Pooled(apart(val_share=0.2), np.array([0, 3, 4])), np.array([3, 0, 1, 0])
    block = data.block(ids, part)
    assert np.array_equal(data.sizes(ids, part), np.diff(block.offsets))
    counts = data.label_counts(ids, part)
    assert counts.shape == (4, 3) and np.array_equal(counts.sum(1), np.diff(block.offsets))
    assert counts[1].tolist() == np.bincount(data.block(ids[1:2], part).y, minlength=3).tolist()


@given(st.integers(1, 30), st.integers(1, 6), st.randoms(use_true_random=False))
def test_who_had_a_row_leaves_no_trace(count, clients, random):
    """Any order of the rows and any cut into clients gives the same pool, bit for bit."""
    x = np.arange(count, dtype=np.float32).reshape(-1, 1) // 3  # some rows are repeats
    y = np.arange(count) % 2
    whole = InMemory(x, y, np.array([0, count]), num_classes=2, train=np.ones(count, bool))
    order = np.array(random.sample(range(count), count))
    cuts = sorted(random.randrange(count + 1) for _ in range(clients - 1))
    offsets = np.array([0, *cuts, count])
    dealt = InMemory(x[order], y[order], offsets, num_classes=2, train=np.ones(count, bool))
    one, other = (
        Pooled(d, np.arange(d.num_clients)).block(np.array([0]), "train") for d in (whole, dealt)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_labels_count_in_the_order():
    """Rows of equal x and other labels lie the same, whoever had them."""
    x = np.zeros((4, 2), np.float32)
    blocks = []
    for y in ([0, 1, 2, 3], [3, 1, 0, 2]):
        given = InMemory(x, np.array(y), offsets_of(np.array([2, 2])), train=np.ones(4, bool))
        blocks.append(Pooled(given, np.array([0, 1])).block(np.array([0]), "train"))
    assert np.array_equal(blocks[0].y, blocks[1].y)


def test_it_pickles_small_and_comes_back_the_same():
    data = Pooled(SyntheticFemnist(30, seed=1), split_clients(0, 30)[0])
    before = data.block(np.array([0]), "train")
    pickled = pickle.dumps(data)
    assert len(pickled) < 5_000  # what was read stays behind
    after = pickle.loads(pickled).block(np.array([0]), "train")
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_it_is_not_streamed_though_its_rows_are_stored():
    given = apart()
    given.stored = True  # type: ignore[attr-defined]
    assert not getattr(Pooled(given, np.array([0, 1])), "stored", False)


def test_its_rows_travel_as_any_other():
    """Asked to stream it all the same, hosts get the rows that they would read."""
    data, ids = Pooled(apart(), np.array([0, 3, 4])), np.array([0])
    came = to_block([to_table(data, ids, "train")], ids, data.input_shape)
    here = data.block(ids, "train")
    assert all(np.array_equal(a, b) for a, b in zip(came, here, strict=True))


def test_nobody_may_be_held_out():
    data = Pooled(apart(), np.arange(6))
    assert data.num_clients == 1 and split_of(data, 0)[1].tolist() == []
    assert data.sizes(np.array([0]), "all").tolist() == [38]


def test_unknown_clients_are_refused():
    with pytest.raises(InputError, match=r"client 6 is outside 0\.\.5"):
        Pooled(apart(), np.array([6]))
    with pytest.raises(InputError, match=r"client 4 is outside 0\.\.3"):
        Pooled(apart(), np.array([0, 3, 4])).block(np.array([4]), "train")
