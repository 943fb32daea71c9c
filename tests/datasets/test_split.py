"""Rows of a client: covered once, repeats on one side, at least one in each part."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from subfleet.datasets.federation import offsets_of, train_sizes
from subfleet.datasets.split import leaf_split, seeded_split, side_sizes

# Clients as lists of contents: equal numbers are repeats of one image.
clients = st.lists(st.lists(st.integers(0, 12), min_size=2, max_size=25), min_size=1, max_size=8)


def _arrays(contents):
    offsets = offsets_of(np.array([len(c) for c in contents]))
    group = np.concatenate([[c.index(v) for v in c] for c in contents])
    return offsets, group


def _check_sides(contents, offsets, side):
    for i, content in enumerate(contents):
        mine = side[offsets[i] : offsets[i + 1]]
        train = {v for v, t in zip(content, mine, strict=True) if t}
        test = {v for v, t in zip(content, mine, strict=True) if not t}
        assert not train & test
        assert train and (test or len(set(content)) == 1)


@given(st.integers(0, 1000), clients)
def test_seeded_split_keeps_repeats_together(seed, contents):
    offsets, group = _arrays(contents)
    side = seeded_split(seed, offsets, group)
    assert np.array_equal(side, seeded_split(seed, offsets, group))
    _check_sides(contents, offsets, side)


@given(st.integers(0, 1000), st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_without_repeats_the_sizes_follow_the_formula(seed, sizes):
    offsets = offsets_of(np.array(sizes))
    side = seeded_split(seed, offsets)
    assert np.array_equal(side_sizes(side, offsets), train_sizes(np.array(sizes)))


@given(st.integers(0, 1000), clients, st.randoms())
def test_leaf_split_keeps_repeats_together(seed, contents, random):
    offsets, group = _arrays(contents)
    from_test = np.array([random.random() < 0.3 for _ in group])
    _check_sides(contents, offsets, leaf_split(seed, offsets, group, from_test))


def test_leaf_split_moves_a_repeat_of_a_train_row_to_train():
    contents = [[1, 2, 3, 1, 4]]
    offsets, group = _arrays(contents)
    from_test = np.array([False, False, False, True, True])
    side = leaf_split(0, offsets, group, from_test)
    assert side.tolist() == [True, True, True, True, False]


def test_leaf_split_falls_back_where_a_part_would_be_empty():
    offsets, group = _arrays([[1, 2, 3, 4, 5], [1, 2]])
    from_test = np.array([False] * 5 + [False, True])
    side = leaf_split(3, offsets, group, from_test)
    assert np.array_equal(side[:5], seeded_split(3, offsets, group)[:5])
    assert side[5:].tolist() == [True, False]


def test_a_client_is_split_alike_whoever_is_beside_it():
    one = seeded_split(4, np.array([0, 30]))
    two = seeded_split(4, np.array([0, 30, 50]))
    assert np.array_equal(one, two[:30])


def test_seeds_give_different_splits():
    offsets = np.array([0, 100])
    assert not np.array_equal(seeded_split(0, offsets), seeded_split(1, offsets))
