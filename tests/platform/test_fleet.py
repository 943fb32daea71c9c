from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.algorithm import FULL, TierSize
from subfleet.platform.fleet import Fleet


def fleet(shares, clients, seed=0):
    tiers = tuple(TierSize(f"t{i}", share, FULL) for i, share in enumerate(shares))
    return Fleet(tiers, clients, seed)


@pytest.mark.parametrize(
    ("shares", "clients", "counts"),
    [([5, 3, 2], 10, [5, 3, 2]), ([5, 3, 2], 7, [4, 2, 1]), ([2, 3, 5], 10, [2, 3, 5])],
)
def test_sizes_by_largest_remainder(shares, clients, counts):
    made = fleet(shares, clients)
    assert made.counts == counts
    assert np.bincount(made.tier_of, minlength=3).tolist() == counts


@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(1, 400), st.integers(0, 5)
)
def test_every_client_has_one_tier_and_the_seed_decides_which(shares, clients, seed):
    made = fleet(shares, clients, seed)
    assert made.tier_of.shape == (clients,) and made.tier_of.dtype == np.int16
    assert np.bincount(made.tier_of, minlength=len(shares)).tolist() == made.counts
    assert np.array_equal(made.tier_of, fleet(shares, clients, seed).tier_of)


def test_another_seed_deals_otherwise():
    assert not np.array_equal(fleet([1, 1], 100, 0).tier_of, fleet([1, 1], 100, 1).tier_of)


def test_pickles_without_its_array():
    made = fleet([1, 1], 100_000)
    first = made.tier_of.copy()
    packed = pickle.dumps(made)
    assert len(packed) < 2_000
    assert np.array_equal(pickle.loads(packed).tier_of, first)
