"""Keep ratios: the shift that keeps the wanted share on average, and its slope."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core import seeds
from subfleet.core.keep_ratio import LEAST_EPSILON, sampling


def sampled(b, ratio, epsilon):
    """Of a single group."""
    b = torch.tensor([b], dtype=torch.float64)
    real = torch.ones_like(b, dtype=torch.bool)
    found = sampling(b, torch.tensor([ratio], dtype=torch.float64), torch.tensor(epsilon), real)
    return float(found.beta), found.p[0], found.slope[0]


@pytest.mark.parametrize(
    ("epsilon", "beta", "p"),
    [
        (1.0, 0.373952, [0.431937, 0.456621, 0.506512, 0.604930]),
        (0.1, 0.322668, [0.097380, 0.226763, 0.684239, 0.991619]),
        (0.01, 0.300000, None),
    ],
)
def test_four_units_by_hand(epsilon, beta, p):
    found = sampled([0.1, 0.2, 0.4, 0.8], 0.5, epsilon)
    assert found[0] == pytest.approx(beta, abs=1e-6)
    if p is not None:
        assert found[1].tolist() == pytest.approx(p, abs=1e-6)


def test_an_epsilon_below_the_least_counts_as_the_least():
    least = sampled([0.1, 0.2, 0.4, 0.8], 0.5, LEAST_EPSILON)
    for epsilon in (1e-300, 1e-60, 0.0):
        found = sampled([0.1, 0.2, 0.4, 0.8], 0.5, epsilon)
        assert found[0] == pytest.approx(least[0], abs=1e-9)
        assert found[1].tolist() == pytest.approx([0, 0, 1, 1], abs=1e-6)
        assert bool(torch.isfinite(found[2]).all())


@pytest.mark.parametrize("epsilon", [1e-3, 0.1, 1.0, 10.0])
def test_two_units_are_symmetric(epsilon):
    assert sampled([0.0, 1.0], 0.5, epsilon)[0] == pytest.approx(0.5, abs=1e-9)


def test_equal_importance_gives_the_ratio_itself():
    beta, p, _ = sampled([0.3] * 7, 0.37, 0.2)
    assert beta == pytest.approx(0.406443, abs=1e-6)
    assert p.tolist() == pytest.approx([0.37] * 7, abs=1e-12)


def test_a_small_epsilon_takes_the_top_and_a_large_one_all_alike():
    b = [0.9, 0.1, 0.5, 0.7, 0.3]
    assert sampled(b, 0.5, 1e-3)[1].tolist() == pytest.approx([1, 0, 0.5, 1, 0], abs=1e-6)
    assert sampled(b, 0.4, 1e-3)[1].tolist() == pytest.approx([1, 0, 0, 1, 0], abs=1e-6)
    assert sampled(b, 0.4, 1e3)[1].tolist() == pytest.approx([0.4] * 5, abs=1e-3)


importances = st.lists(st.floats(0, 1), min_size=2, max_size=60)
ratios = st.floats(0.02, 0.98)
epsilons = st.floats(-3, 1).map(lambda power: 10.0**power)


@given(importances, ratios, epsilons)
def test_the_wanted_share_is_kept_and_the_important_first(b, ratio, epsilon):
    _, p, slope = sampled(b, ratio, epsilon)
    assert float(p.sum()) == pytest.approx(ratio * len(b), abs=1e-10)
    # But for the last digit: of importances that hardly differ it is the kernel's.
    assert (p[torch.tensor(b, dtype=torch.float64).argsort()].diff() >= -1e-15).all()
    assert float(slope.sum()) == pytest.approx(len(b), rel=1e-9) and (slope >= 0).all()


@given(importances, ratios, epsilons)
def test_beta_falls_as_the_ratio_grows(b, ratio, epsilon):
    low, high = sampled(b, 0.9 * ratio, epsilon)[0], sampled(b, ratio, epsilon)[0]
    assert high < low


@given(st.integers(0, 1000), ratios, st.floats(-1, 1).map(lambda power: 10.0**power))
def test_slopes_are_those_of_differences(seed, ratio, epsilon):
    draw = np.random.default_rng(seed)
    b, weight = draw.random(9).tolist(), torch.tensor(draw.standard_normal(9))

    def loss(at):  # any smooth one
        return float((weight * sampled(b, at, epsilon)[1]).sin().sum())

    step = 1e-3 * min(ratio, 1 - ratio)
    near, far = ((loss(ratio + h) - loss(ratio - h)) / (2 * h) for h in (step, 2 * step))
    wanted = (4 * near - far) / 3  # of the fourth order
    _, p, slope = sampled(b, ratio, epsilon)
    found = float((weight * (weight * p).cos() * slope).sum())
    assert found == pytest.approx(wanted, rel=1e-6, abs=1e-8)


def test_beta_moves_as_it_should():
    b, ratio, epsilon, step = [0.1, 0.2, 0.4, 0.8], 0.5, 0.1, 1e-6
    _, p, _ = sampled(b, ratio, epsilon)
    wanted = -4 * epsilon / float((p * (1 - p)).sum())  # -C epsilon / sum p (1 - p)
    found = sampled(b, ratio + step, epsilon)[0] - sampled(b, ratio - step, epsilon)[0]
    assert found / (2 * step) == pytest.approx(wanted, rel=1e-6)


def test_a_full_ratio_keeps_everybody_and_moves_nobody():
    _, p, slope = sampled([0.1, 0.9, 0.5], 1.0, 0.1)
    assert p.tolist() == [1, 1, 1] and slope.tolist() == [0, 0, 0]


def test_where_probabilities_underflow_the_boundary_unit_moves_alone():
    _, _, slope = sampled([0.9, 0.1, 0.5, 0.7, 0.3], 0.5, 1e-3)
    assert slope.tolist() == pytest.approx([0, 0, 5, 0, 0], abs=1e-6)


def test_draws_keep_the_share_on_average():
    p = sampled([0.1, 0.2, 0.4, 0.8], 0.5, 0.1)[1]
    uniform = seeds.uniform(torch.tensor(7), (100_000, 4))
    kept = (uniform < p).sum(1).double()
    deviation = float((p * (1 - p)).sum()) ** 0.5
    assert float(kept.mean()) == pytest.approx(2.0, abs=4 * deviation / 100_000**0.5)
    assert float(kept.std()) == pytest.approx(deviation, rel=0.02)


def test_groups_of_other_sizes_and_mapped_clients_are_rows_like_any():
    draw = torch.Generator().manual_seed(3)
    b, ratio = torch.rand(4, 2, 9, generator=draw), torch.rand(4, 2, generator=draw) * 0.9 + 0.05
    real = torch.arange(9) < torch.tensor([[9], [4]])
    epsilon = torch.tensor(0.2)
    mapped = torch.func.vmap(lambda b, r: sampling(b, r, epsilon, real))(b, ratio)
    for k in range(4):
        for g, size in enumerate((9, 4)):
            beta, p, slope = sampled(b[k, g, :size].tolist(), float(ratio[k, g]), 0.2)
            assert float(mapped.beta[k, g]) == pytest.approx(beta, abs=1e-9)
            assert torch.allclose(mapped.p[k, g, :size], p, atol=1e-9)
            assert torch.allclose(mapped.slope[k, g, :size], slope, atol=1e-8)
            assert not mapped.p[k, g, size:].any() and not mapped.slope[k, g, size:].any()
