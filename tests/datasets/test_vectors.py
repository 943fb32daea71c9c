"""Synthetic vectors: cheap, reproducible, learnable by a linear model."""

import pickle
import time

import numpy as np
import pytest

from subfleet.core.errors import InputError
from subfleet.datasets import Federation, SyntheticVectors


def test_a_client_is_the_same_alone_among_others_and_pickled():
    data = SyntheticVectors(1000, seed=4, samples=20, dim=8, num_classes=5)
    assert isinstance(data, Federation)
    among = data.block(np.array([7, 900, 3]), "train")
    alone = pickle.loads(pickle.dumps(data)).block(np.array([900]), "train")
    low, high = among.offsets[1:3]
    assert np.array_equal(alone.x, among.x[low:high])
    assert np.array_equal(alone.y, among.y[low:high])


def test_parts_are_disjoint_and_make_up_all():
    data = SyntheticVectors(10, samples=20, dim=8, num_classes=5)
    one = np.array([6])
    both = [data.block(one, part) for part in ("train", "test")]
    everything = data.block(one, "all")
    assert np.array_equal(np.concatenate([b.x for b in both]), everything.x)
    assert np.array_equal(np.concatenate([b.y for b in both]), everything.y)
    assert [len(b.y) for b in both] == [16, 4]


def test_counts_agree_with_the_block():
    data = SyntheticVectors(50, samples=30, dim=4, num_classes=6)
    ids = np.array([4, 1])
    block = data.block(ids, "test")
    assert np.array_equal(data.label_counts(ids, "test").sum(0), np.bincount(block.y, minlength=6))


def test_nearest_centre_finds_the_class():
    data = SyntheticVectors(100, seed=2)
    block = data.block(np.arange(40), "all")
    centres = np.stack([block.x[block.y == c].mean(0) for c in range(62)])
    fresh = data.block(np.arange(50, 60), "all")
    score = fresh.x @ centres.T - (centres**2).sum(1) / 2
    assert (score.argmax(1) == fresh.y).mean() > 0.8


def test_a_thousand_clients_draw_quickly():
    data = SyntheticVectors(1_000_000, samples=63)
    data.block(np.arange(2), "train")
    start = time.perf_counter()
    for low in range(0, 1000, 50):
        data.block(np.arange(low, low + 50), "train")
    assert time.perf_counter() - start < 1  # 0.05 s where it was measured


@pytest.mark.parametrize("wrong", [{"clients": 0}, {"samples": 1}, {"dim": 0}, {"signal": -1}])
def test_options_out_of_bounds_are_input_errors(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name}="):
        SyntheticVectors(**{"clients": 5, **wrong})
