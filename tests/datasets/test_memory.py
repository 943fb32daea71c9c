"""Arrays in memory as a federation."""

import pickle

import numpy as np
import pytest

from subfleet.core.errors import InputError
from subfleet.core.scaling import PIXELS, Scaling
from subfleet.datasets import Federation, InMemory

Y = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
X = np.arange(20, dtype=np.float32).reshape(10, 2)
DATA = InMemory(X, Y, np.array([0, 5, 5, 10]), train=np.arange(10) % 5 != 4)


def test_it_is_a_federation():
    assert isinstance(DATA, Federation)
    assert (DATA.num_clients, DATA.num_classes, DATA.input_shape, DATA.scale) == (
        3,
        3,
        (2,),
        Scaling(),
    )


def test_blocks_keep_the_order_asked_for():
    block = DATA.block(np.array([2, 0]), "train")
    assert block.offsets.tolist() == [0, 4, 8]
    assert block.y.tolist() == [2, 0, 1, 2, 0, 1, 2, 0]
    assert np.array_equal(block.x, X[[5, 6, 7, 8, 0, 1, 2, 3]])
    assert DATA.block(np.array([2, 1]), "test").y.tolist() == [0]


def test_sizes_and_counts_agree_with_the_block():
    ids = np.array([1, 2, 0])
    for part in ("train", "test", "all"):
        block = DATA.block(ids, part)
        assert np.array_equal(DATA.sizes(ids, part), np.diff(block.offsets))
        assert DATA.label_counts(ids, part).sum() == len(block.y)
    assert DATA.label_counts(np.array([0]), "all").tolist() == [[2, 2, 1]]


def test_it_pickles_with_its_split():
    other = pickle.loads(pickle.dumps(InMemory(X, Y, np.array([0, 10]), seed=9)))
    mine = InMemory(X, Y, np.array([0, 10]), seed=9)
    assert np.array_equal(
        other.block(np.array([0]), "train").x, mine.block(np.array([0]), "train").x
    )


def test_pixels_in_bytes_are_scaled():
    assert InMemory(X.astype(np.uint8), Y, np.array([0, 10])).scale == PIXELS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[:9], Y, np.array([0, 10])), "x has 9 rows, y 10"),
        ((X, Y, np.array([0, 9])), "offsets run from 0 to 9"),
        ((X, Y, np.array([0, 6, 5, 10])), "offsets"),
        ((X, Y - 1, np.array([0, 10])), "labels from -1"),
    ],
)
def test_wrong_arrays_are_input_errors(arguments, message):
    with pytest.raises(InputError, match=message):
        InMemory(*arguments)
