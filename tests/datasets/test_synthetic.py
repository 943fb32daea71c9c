"""Synthetic writers: cheap, reproducible, skewed, learnable."""

import pickle
import time

import numpy as np
import pytest
import torch

from subfleet.core.errors import InputError
from subfleet.datasets import Federation, SyntheticFemnist

DATA = SyntheticFemnist(1000, seed=1)


def test_it_is_a_federation_of_dark_ink_on_white():
    assert isinstance(DATA, Federation)
    block = DATA.block(np.arange(5), "train")
    assert block.x.dtype == np.uint8 and block.x.shape[1:] == DATA.input_shape == (1, 28, 28)
    assert np.median(block.x) > 225 and block.x.mean() > 180
    assert (block.x.reshape(len(block.y), -1).min(1) < 160).mean() > 0.98


def test_a_writer_is_the_same_alone_among_others_and_pickled():
    among = DATA.block(np.array([3, 77, 500]), "all")
    alone = pickle.loads(pickle.dumps(DATA)).block(np.array([77]), "all")
    low, high = among.offsets[1:3]
    assert np.array_equal(alone.x, among.x[low:high])
    assert np.array_equal(alone.y, among.y[low:high])


def test_a_writer_does_not_depend_on_how_many_there_are():
    more = SyntheticFemnist(1_000_000, seed=1).block(np.array([77]), "train")
    assert np.array_equal(more.x, DATA.block(np.array([77]), "train").x)


def test_seeds_and_writers_differ():
    other = SyntheticFemnist(1000, seed=2)
    ids = np.arange(50)
    assert not np.array_equal(DATA.sizes(ids, "all"), other.sizes(ids, "all"))
    first, second = DATA.block(np.array([0]), "test"), DATA.block(np.array([1]), "test")
    assert not np.array_equal(first.x[0], second.x[0])


def test_all_is_the_train_part_then_the_test_part_of_each_writer():
    ids = np.array([9, 2])
    every = DATA.block(ids, "all")
    train, test = DATA.block(ids, "train"), DATA.block(ids, "test")
    for i in range(2):
        parts = [b.x[b.offsets[i] : b.offsets[i + 1]] for b in (train, test)]
        mine = every.x[every.offsets[i] : every.offsets[i + 1]]
        assert np.array_equal(np.concatenate(parts), mine)


@pytest.mark.parametrize("part", ["train", "test", "all"])
def test_sizes_and_counts_agree_with_the_block(part):
    ids = np.array([11, 4, 800])
    block = DATA.block(ids, part)
    assert np.array_equal(np.diff(block.offsets), DATA.sizes(ids, part))
    for i, counts in enumerate(DATA.label_counts(ids, part)):
        labels = block.y[block.offsets[i] : block.offsets[i + 1]]
        assert np.array_equal(np.bincount(labels, minlength=62), counts)


def test_sizes_are_log_normal_with_the_mean_asked_for():
    data = SyntheticFemnist(20_000, mean_samples=60, min_samples=20)
    sizes = data.sizes(np.arange(20_000), "all")
    assert abs(sizes.mean() - 60) < 1.5 and sizes.min() >= 20
    assert np.median(sizes) < sizes.mean()


def test_skew_makes_writers_differ():
    def distance(skew):
        data = SyntheticFemnist(200, skew=skew, mean_samples=300)
        counts = data.label_counts(np.arange(200), "all")
        share = counts / counts.sum(1, keepdims=True)
        return np.abs(share - share.mean(0)).sum(1).mean() / 2

    assert distance(0.0) < 0.1 < distance(0.7) < distance(1.5)


def test_a_million_writers_cost_nothing_but_arrays():
    start = time.perf_counter()
    data = SyntheticFemnist(1_000_000)
    assert len(pickle.dumps(data)) < 500
    data.sizes(np.arange(1_000_000), "train")
    assert time.perf_counter() - start < 3  # 0.25 s where it was measured


def test_drawing_is_quick():
    DATA.block(np.arange(2), "train")
    start = time.process_time()
    rows = len(DATA.block(np.arange(50), "train").y)
    assert rows / (time.process_time() - start) > 10_000  # 130,000 where it was measured


def test_a_small_network_learns_it():
    torch.manual_seed(0)
    some = DATA.block(np.arange(60), "train")
    x, y = DATA.scale.apply(torch.tensor(some.x)), torch.tensor(some.y)
    layers = [torch.nn.Conv2d(1, 8, 3, 2), torch.nn.ReLU(), torch.nn.Flatten()]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(8 * 169, 62))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(6):
        for batch in torch.randperm(len(y)).split(50):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    fresh = DATA.block(np.arange(900, 930), "all")
    guess = net(DATA.scale.apply(torch.tensor(fresh.x))).argmax(1)
    assert (guess == torch.tensor(fresh.y)).float().mean() > 0.45


@pytest.mark.parametrize(
    "wrong",
    [{"clients": 0}, {"clients": 1.5}, {"mean_samples": 3}, {"digits": 1.0}, {"skew": -1}],
)
def test_options_out_of_bounds_are_input_errors(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name}="):
        SyntheticFemnist(**{"clients": 5, **wrong})


def test_writers_of_digits_only_change_nobody_else():
    some = SyntheticFemnist(200, seed=1, digits_only=0.3)
    counts, before = (d.label_counts(np.arange(200), "all") for d in (some, DATA))
    lone = counts[:, 10:].sum(axis=1) == 0
    assert 0.2 < lone.mean() < 0.4 and not (before[:, 10:].sum(axis=1) == 0).any()
    assert np.array_equal(counts[~lone], before[~lone])
    assert np.array_equal(counts.sum(axis=1), before.sum(axis=1))


def test_no_rows_validate():
    block = DATA.block(np.arange(3), "val")
    assert block.x.shape == (0, 1, 28, 28) and not block.offsets.any()
