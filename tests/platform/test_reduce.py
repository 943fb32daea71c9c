from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.platform.reduce import ReductionTree


def reduced(leaves, order, merge):
    tree = ReductionTree(len(leaves), merge)
    for number in order:
        tree.add(number, leaves[number])
    return tree.result()


@st.composite
def arrivals(draw):
    count = draw(st.integers(1, 40))
    return count, draw(st.permutations(range(count)))


@given(arrivals())
def test_the_same_tree_for_every_order_of_arrival(found):
    count, order = found
    leaves = [str(i) for i in range(count)]
    merge = "({} {})".format
    assert reduced(leaves, order, merge) == reduced(leaves, range(count), merge)


@given(arrivals(), st.integers(0, 9))
def test_the_same_bits_where_rounding_shows(found, seed):
    count, order = found
    draw = np.random.default_rng(seed)
    leaves = (draw.standard_normal(count) * 10.0 ** draw.integers(-6, 7, count)).astype(np.float32)
    result = reduced(leaves, order, lambda a, b: a + b)
    assert result.dtype == np.float32
    assert result == reduced(leaves, range(count), lambda a, b: a + b)


def test_adding_as_they_come_would_show():
    """Why there is a tree: these float32 sums differ by order."""
    leaves = np.array([1e8, 1.0, -1e8, 1.0], np.float32)
    come = [sum(leaves[list(order)], np.float32(0)) for order in ([0, 1, 2, 3], [0, 2, 1, 3])]
    assert come[0] != come[1]
    assert {float(reduced(leaves, o, np.add)) for o in ([0, 1, 2, 3], [0, 2, 1, 3])} == {0.0}


@pytest.mark.parametrize(
    ("count", "tree"),
    [
        (1, "a"),
        (2, "(ab)"),
        (3, "((ab)c)"),
        (5, "(((ab)(cd))e)"),
        (6, "(((ab)(cd))(ef))"),
        (7, "(((ab)(cd))((ef)g))"),
    ],
)
def test_pairs_by_number(count, tree):
    assert reduced("abcdefg"[:count], reversed(range(count)), "({}{})".format) == tree


def test_a_missing_leaf_is_not_passed_over():
    tree = ReductionTree(3, lambda a, b: a + b)
    tree.add(0, 1)
    tree.add(2, 1)
    with pytest.raises(KeyError):
        tree.result()


def test_merges_as_soon_as_a_pair_is_there():
    merged = []
    tree = ReductionTree(4, lambda a, b: merged.append(a + b) or a + b)
    for number, seen in ((3, []), (0, []), (2, ["cd"]), (1, ["cd", "ab", "abcd"])):
        tree.add(number, "abcd"[number])
        assert merged == seen
