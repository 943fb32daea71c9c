"""Synthetic pools of images: cheap, reproducible, learnable, but not by colour alone."""

import pickle
import time

import numpy as np
import pytest
import torch

from subfleet.core.errors import InputError
from subfleet.datasets.pool import Pool
from subfleet.datasets.twin_images import PRESETS, SyntheticImages

POOL = SyntheticImages.like("cifar10", seed=1)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_measures_of_their_sets(name):
    pool, preset = SyntheticImages.like(name), PRESETS[name]
    assert isinstance(pool, Pool) and pool.name == f"synthetic_{name}"
    labels, tests = pool.labels(), pool.from_test()
    assert labels.dtype == np.int64 and len(labels) == len(tests) == preset.train + preset.test
    assert tests.sum() == preset.test
    for part in (labels[~tests], labels[tests]):
        counts = np.bincount(part, minlength=pool.num_classes)
        assert counts.max() - counts.min() <= 1
    images = pool.rows(np.array([len(labels) - 1, 0]))
    assert images.dtype == np.uint8 and images.shape == (2, *pool.input_shape)


def test_a_row_is_the_same_alone_among_others_and_pickled():
    again = pickle.loads(pickle.dumps(POOL))
    assert len(pickle.dumps(POOL)) < 500 and again.fingerprint == POOL.fingerprint
    among = POOL.rows(np.array([5, 59_999, 5, *range(200)]))
    assert np.array_equal(again.rows(np.array([59_999])), among[1:2])
    assert np.array_equal(among[0], among[2]) and np.array_equal(among[0], among[8])
    assert np.array_equal(again.labels(), POOL.labels())
    assert POOL.rows(np.array([], dtype=np.int64)).shape == (0, 3, 32, 32)


def test_rows_seeds_and_sets_differ():
    first = POOL.rows(np.arange(50))
    assert len(np.unique(first.reshape(50, -1), axis=0)) == 50
    other = SyntheticImages.like("cifar10", seed=2)
    assert other.fingerprint != POOL.fingerprint
    assert not np.array_equal(other.rows(np.arange(5)), first[:5])
    assert not np.array_equal(other.labels(), POOL.labels())


def test_drawing_is_quick():
    POOL.rows(np.arange(100))
    start = time.process_time()
    POOL.rows(np.arange(3000))
    assert 3000 / (time.process_time() - start) > 8_000  # 60,000 where it was measured


def reached(layers):
    """Accuracy on 500 test rows after training on 2,500."""
    torch.manual_seed(0)
    labels = torch.from_numpy(POOL.labels())
    tests = np.flatnonzero(POOL.from_test())[:500]
    x, fresh = (POOL.scale.apply(torch.tensor(POOL.rows(n))) for n in (np.arange(2500), tests))
    net = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.LazyLinear(10))
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(6):
        for batch in torch.randperm(len(x)).split(50):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(net(x[batch]), labels[batch])
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        return (net(fresh).argmax(1) == labels[tests]).float().mean()


def test_a_small_network_learns_it_and_a_linear_one_less():
    layers = [torch.nn.Conv2d(3, 12, 5, 2), torch.nn.ReLU(), torch.nn.Conv2d(12, 24, 5, 2)]
    convolved, linear = reached([*layers, torch.nn.ReLU()]), reached([])
    assert convolved > 0.5 and 0.15 < linear < convolved - 0.1


def test_more_classes_share_their_looks():
    looks = SyntheticImages.like("tiny_imagenet")._classes
    assert len(np.unique(looks[:, :4], axis=0)) == 200
    assert all(len(np.unique(column)) <= 8 for column in looks.T)


@pytest.mark.parametrize(
    "wrong", [{"num_classes": 0}, {"size": 4}, {"channels": 2}, {"train": 0}, {"variation": 3}]
)
def test_options_out_of_bounds_are_input_errors(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name}="):
        SyntheticImages(**wrong)


def test_unknown_rows_and_presets_are_input_errors():
    with pytest.raises(InputError, match=r"row 60000 is outside 0\.\.59999"):
        POOL.rows(np.array([3, 60_000]))
    with pytest.raises(InputError, match="cifar10"):
        SyntheticImages.like("cifar11")
