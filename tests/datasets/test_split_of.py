"""Who is held out: drawn, or as the data themselves say."""

import numpy as np
import pytest
import toys

from subfleet.core.errors import InputError
from subfleet.datasets.federation import split_clients, split_of


def test_drawn_unless_the_data_say_it():
    data = toys.federation([5] * 10, (2,), 2)
    for drawn, found in zip(split_clients(3, 10), split_of(data, 3), strict=True):
        assert np.array_equal(drawn, found)
    data.held_out = np.array([1, 4])
    train, held = split_of(data, 3)
    assert held.tolist() == [1, 4] and train.tolist() == [0, 2, 3, 5, 6, 7, 8, 9]


def test_a_cohort_is_held_against_those_who_train():
    data = toys.federation([5] * 10, (2,), 2)
    data.held_out = np.array([1])
    algorithm = toys.OneProgram(toys.setting(toys.linear(2, 2)), toys.loss_program())
    toys.job(algorithm, data, cohort=9)
    with pytest.raises(InputError, match="cohort"):
        toys.job(algorithm, data, cohort=10)
