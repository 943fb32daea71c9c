"""Rows of a client: covered once, repeats on one side, at least one in each part."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.errors import InputError
from subfleet.datasets.federation import offsets_of, train_sizes
from subfleet.datasets.split import (
    NONE,
    TEST,
    TRAIN,
    VAL,
    Parts,
    check_shares,
    cuts,
    leaf_split,
    seeded_split,
    temporal_split,
)

# Clients as lists of contents: equal numbers are repeats of one image.
clients = st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=25), min_size=1, max_size=8)
shares = st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.33, 0.45])


def _arrays(contents):
    offsets = offsets_of(np.array([len(c) for c in contents]))
    group = np.concatenate([[c.index(v) for v in c] for c in contents])
    return offsets, group


def _check_sides(contents, offsets, code, parts=(TRAIN, TEST)):
    """Contents are in one part each, and as many of `parts` are there as contents allow."""
    needed = [TRAIN, *[part for part in (TEST, VAL) if part in parts]]
    for i, content in enumerate(contents):
        mine = code[offsets[i] : offsets[i + 1]]
        found = {v: {c for w, c in zip(content, mine, strict=True) if w == v} for v in content}
        assert all(len(codes) == 1 for codes in found.values())
        assert set(mine.tolist()) == set(needed[: len(set(content))])


@given(st.integers(0, 1000), clients, shares, shares)
def test_seeded_split_keeps_repeats_together(seed, contents, test_share, val_share):
    offsets, group = _arrays(contents)
    code = seeded_split(seed, offsets, group, test_share, val_share)
    assert np.array_equal(code, seeded_split(seed, offsets, group, test_share, val_share))
    parts = [TRAIN] + [TEST] * (test_share > 0) + [VAL] * (val_share > 0)
    _check_sides(contents, offsets, code, parts)


@given(st.integers(0, 1000), st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_without_repeats_the_sizes_follow_the_formula(seed, sizes):
    offsets = offsets_of(np.array(sizes))
    code = seeded_split(seed, offsets)
    found = Parts(code, offsets).sizes(np.arange(len(sizes)), "train")
    assert np.array_equal(found, train_sizes(np.array(sizes)))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=20), shares, shares)
def test_cuts_are_the_shares_rounded_and_leave_no_part_empty(sizes, test_share, val_share):
    n = np.array(sizes)
    train, kept = cuts(n, test_share, val_share)
    val, test = kept - train, n - kept
    assert np.all(train >= np.minimum(n, 1)) and np.all(val >= 0) and np.all(test >= 0)
    assert np.all((test >= 1) == ((n >= 2) & (test_share > 0)))
    assert np.all((val >= 1) == ((n >= 2 + (test_share > 0)) & (val_share > 0)))
    assert np.all(np.abs(test - test_share * n) <= 1 + 1e-6)
    assert np.all(np.abs(train - (1 - test_share - val_share) * n) <= 2 + 1e-6)


def test_a_fifth_to_test_is_leafs_formula():
    n = np.arange(100_000)
    assert np.array_equal(cuts(n)[0], train_sizes(n))
    assert np.array_equal(*cuts(n))


def test_a_validation_part_takes_nothing_from_the_test_part():
    offsets = np.array([0, 50, 90])
    plain, more = seeded_split(2, offsets), seeded_split(2, offsets, None, 0.2, 0.1)
    assert np.array_equal(plain == TEST, more == TEST)
    assert np.bincount(more).tolist() == [63, 9, 18]


@given(st.integers(0, 1000), clients, st.randoms())
def test_leaf_split_keeps_repeats_together(seed, contents, random):
    offsets, group = _arrays(contents)
    from_test = np.array([random.random() < 0.3 for _ in group])
    _check_sides(contents, offsets, leaf_split(seed, offsets, group, from_test))


def test_leaf_split_moves_a_repeat_of_a_train_row_to_train():
    contents = [[1, 2, 3, 1, 4]]
    offsets, group = _arrays(contents)
    from_test = np.array([False, False, False, True, True])
    code = leaf_split(0, offsets, group, from_test)
    assert code.tolist() == [TRAIN] * 4 + [TEST]


def test_leaf_split_falls_back_where_a_part_would_be_empty():
    offsets, group = _arrays([[1, 2, 3, 4, 5], [1, 2]])
    from_test = np.array([False] * 5 + [False, True])
    code = leaf_split(3, offsets, group, from_test)
    assert np.array_equal(code[:5], seeded_split(3, offsets, group)[:5])
    assert code[5:].tolist() == [TRAIN, TEST]


def test_leaf_split_draws_its_validation_part_from_the_train_part():
    offsets = np.array([0, 20, 40])
    group = np.tile(np.arange(20), 2)
    from_test = np.tile(np.arange(20) >= 15, 2)
    code = leaf_split(1, offsets, group, from_test, val_share=0.25)
    assert np.array_equal(code == TEST, from_test)
    for client in (code[:20], code[20:]):
        assert np.bincount(client).tolist() == [10, 5, 5]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=10), st.integers(0, 100), shares, shares)
def test_a_temporal_split_keeps_time_and_its_gaps(sizes, overlap, test_share, val_share):
    offsets = offsets_of(np.array(sizes))
    codes = temporal_split(offsets, overlap, test_share, val_share)
    for low, high in itertools.pairwise(offsets):
        mine = codes[low:high]
        places = {part: np.flatnonzero(mine == part) for part in (TRAIN, VAL, TEST)}
        there = [rows for rows in places.values() if len(rows)]
        # Parts are runs, in order, with exactly `overlap` rows of no part between.
        for rows in there:
            assert np.array_equal(rows, np.arange(rows[0], rows[-1] + 1))
        for before, after in itertools.pairwise(there):
            assert after[0] - before[-1] == overlap + 1
        if high > low:
            assert mine[0] == TRAIN and mine[-1] != NONE
        assert (mine == NONE).sum() == overlap * max(len(there) - 1, 0)


def test_a_text_is_cut_as_leaf_cuts_it():
    # 1,000 windows of 80 characters: 800 train, 79 share characters with them, 121 test.
    code = temporal_split(np.array([0, 1000, 1085, 1087]), overlap=79)
    assert [int((code[:1000] == part).sum()) for part in (TRAIN, NONE, TEST)] == [800, 79, 121]
    assert code[1000:].tolist() == [TRAIN] * 87  # 85 and 2 windows have no room for a gap


def test_a_client_is_split_alike_whoever_is_beside_it():
    one = seeded_split(4, np.array([0, 30]))
    two = seeded_split(4, np.array([0, 30, 50]))
    assert np.array_equal(one, two[:30])


def test_seeds_give_different_splits():
    offsets = np.array([0, 100])
    assert not np.array_equal(seeded_split(0, offsets), seeded_split(1, offsets))


def test_parts_tell_what_they_hold():
    parts = Parts(np.array([0, 1, 2, 3, 0], np.int8), np.array([0, 4, 4, 5]))
    ids = np.array([2, 0, 1])
    found = {part: parts.sizes(ids, part).tolist() for part in ("train", "val", "test", "all")}
    assert found == {"train": [1, 1, 0], "val": [0, 1, 0], "test": [0, 1, 0], "all": [1, 4, 0]}
    places, offsets = parts.rows(ids, "train")
    assert (places.tolist(), offsets.tolist()) == ([4, 0], [0, 1, 2, 2])
    assert parts.report() == {
        "rows_train": 2,
        "rows_val": 1,
        "rows_test": 1,
        "rows_in_no_part": 1,
        "clients_without_test": 2,
    }


@pytest.mark.parametrize("pair", [(-0.1, 0), (0, 1.0), (0.6, 0.5), (float("nan"), 0), (0, True)])
def test_shares_that_leave_nothing_to_train_on_are_input_errors(pair):
    with pytest.raises(InputError, match=r"(test|val)_share="):
        check_shares(*pair)
