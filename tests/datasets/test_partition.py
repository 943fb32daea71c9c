"""Partitions from labels alone: every row once, as the rules say, whatever the options."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.errors import InputError
from subfleet.datasets.memory import count_labels
from subfleet.datasets.partition import (
    KINDS,
    dirichlet,
    iid,
    partition,
    pathological,
    quantity,
    same_distribution,
    shards,
    total_variation,
)
from subfleet.datasets.partition_dirichlet import class_counts, cut, log_gamma_draws
from subfleet.datasets.partition_result import least_rows, repair

alphas = st.floats(-3, 3).map(lambda power: 10.0**power)
labels = st.integers(0, 2**32).flatmap(
    lambda seed: st.tuples(st.integers(1, 300), st.integers(1, 12)).map(
        lambda facts: np.random.default_rng(seed).integers(0, facts[1], facts[0])
    )
)
OPTIONS = {
    "iid": {},
    "dirichlet": {"alpha": 0.3},
    "pathological": {"classes_per_client": 2},
    "shards": {"shards_per_client": 2},
    "quantity": {"alpha": 0.3},
}


def check_cover(part, rows, clients):
    """Every row on one client, or left out for a reason; each client's in order."""
    assert np.array_equal(np.sort(np.concatenate([part.rows, part.left_out])), np.arange(rows))
    assert sum(part.report.left_out.values()) == len(part.left_out)
    assert part.offsets[0] == 0 and part.offsets[-1] == len(part.rows) == part.report.rows
    assert len(part.offsets) == clients + 1
    assert np.all(np.diff(part.rows)[np.diff(part.owners()) == 0] > 0)
    assert (part.report.smallest, part.report.largest) == (part.sizes.min(), part.sizes.max())
    assert {part.rows.dtype, part.offsets.dtype, part.left_out.dtype} == {np.dtype(np.int64)}


def histograms(part, y, classes):
    return count_labels(np.asarray(y, np.int64)[part.rows], part.offsets, classes)


@given(labels, st.integers(0, 99), st.data())
def test_rows_are_covered_once_and_draws_follow_the_seed(y, seed, data):
    kind = data.draw(st.sampled_from(["iid", "dirichlet", "quantity", "shards"]))
    clients = data.draw(st.integers(1, len(y) // 2 if kind == "shards" and len(y) > 1 else len(y)))
    if kind == "shards" and 2 * clients > len(y):
        return
    part = partition(kind, y, clients, seed, **OPTIONS[kind])
    check_cover(part, len(y), clients)
    again = partition(kind, y.astype(np.uint8), clients, seed, **OPTIONS[kind])
    assert np.array_equal(part.rows, again.rows) and np.array_equal(part.offsets, again.offsets)
    assert part.report == again.report


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_give_different_partitions(kind):
    y = np.arange(500) % 10
    one, two = (partition(kind, y, 20, seed, **OPTIONS[kind]) for seed in (0, 1))
    assert not (np.array_equal(one.rows, two.rows) and np.array_equal(one.offsets, two.offsets))


def test_iid_sizes_differ_by_one_at_most():
    assert sorted(iid(np.zeros(103, int), 10, 0).sizes.tolist()) == [10] * 7 + [11] * 3


# --- Dirichlet ------------------------------------------------------------------------------------


@given(labels, st.integers(0, 99), alphas, st.data())
def test_no_alpha_hangs_or_leaves_a_client_below_the_least(y, seed, alpha, data):
    clients = data.draw(st.integers(1, len(y)))
    for part in (dirichlet(y, clients, seed, alpha), quantity(y, clients, seed, alpha)):
        check_cover(part, len(y), clients)
        assert part.report.least == least_rows(len(y), clients) >= min(10, len(y) // (2 * clients))
        assert part.sizes.min() >= part.report.least
        assert 1 <= part.report.draws <= 10
        assert (part.report.moved == 0) == (part.report.repaired == 0)
        assert part.report.moved == 0 or part.report.draws == 10


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any),
    st.integers(1, 80),
    alphas,
    st.integers(0, 99),
)
def test_who_has_its_share_gets_no_more(per_class, clients, alpha, seed):
    counts = class_counts(np.array(per_class), clients, seed, alpha, 0)
    assert counts.sum(axis=1).tolist() == per_class and counts.min() >= 0
    before = np.cumsum(counts, axis=0) - counts
    assert not counts[before * clients >= sum(per_class)].any()


@given(st.lists(st.floats(-1e5, 0), min_size=1, max_size=50), st.integers(1, 10**6))
def test_a_cut_is_proportional_and_whole(log_weights, rows):
    given_ = cut(np.array(log_weights), rows)
    q = np.exp(np.array(log_weights) - max(log_weights))
    assert given_.sum() == rows
    assert np.all(np.abs(given_ - q / q.sum() * rows) <= 1 + 1e-6 * rows)
    assert not given_[q == 0].any()


@pytest.mark.parametrize("alpha", [0.1, 0.5, 5.0])
def test_the_draws_are_gamma(alpha):
    draws = np.exp(log_gamma_draws(np.random.default_rng(0), alpha, 200_000))
    assert np.allclose([draws.mean(), draws.var()], alpha, rtol=0.03)


def test_a_thousandth_keeps_its_draws_apart():
    draws = log_gamma_draws(np.random.default_rng(0), 1e-3, 10_000)
    assert np.isfinite(draws).all() and len(np.unique(draws)) == 10_000


def test_concentration_is_what_alpha_says():
    y = np.arange(20_000) % 10
    flat = np.full((20, 10), 1)
    far = [
        float(total_variation(histograms(dirichlet(y, 20, 3, a), y, 10), flat).mean())
        for a in (0.01, 0.1, 1.0, 100.0)
    ]
    assert far == sorted(far, reverse=True) and far[0] > 0.75 and far[-1] < 0.06


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.integers(1, 6))
def test_repair_moves_one_row_at_a_time_from_whoever_has_most(sizes, least):
    if sum(sizes) < least * len(sizes):
        return
    expected, moves = sorted(sizes), 0
    while expected[0] < least:
        expected[0] += 1
        expected[-1] -= 1
        moves += 1
        expected.sort()
    owner = np.repeat(np.arange(len(sizes)), sizes)
    after, repaired, moved = repair(owner, len(sizes), least)
    assert sorted(np.bincount(after, minlength=len(sizes)).tolist()) == expected
    assert (repaired, moved) == (sum(size < least for size in sizes), moves)
    assert (after != owner).sum() == moved


# --- classes ------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 60), st.integers(0, 99), st.data())
def test_each_client_has_exactly_z_classes(classes, clients, seed, data):
    each = data.draw(st.integers(1, classes))
    form = data.draw(st.sampled_from(["pfedme", "random", "auto"]))
    y = np.random.default_rng(seed).permutation(np.arange(classes * clients * 2) % classes)
    if form != "pfedme" and clients * each < classes:
        with pytest.raises(InputError, match=rf"at least {-(-classes // each)} clients"):
            pathological(y, clients, seed, each, "random")
        return
    part = pathological(y, clients, seed, each, form)
    check_cover(part, len(y), clients)
    held = histograms(part, y, classes) > 0
    assert np.all(held.sum(axis=1) == each)
    holders = held.sum(axis=0)
    if form == "pfedme":
        expected = (np.arange(clients)[:, None] + np.arange(each)) % classes
        assert all(
            set(np.flatnonzero(h)) == set(e.tolist()) for h, e in zip(held, expected, strict=True)
        )
        assert set(y[part.left_out].tolist()) == set(np.flatnonzero(holders == 0).tolist())
    else:
        assert holders.min() >= 1 and len(part.left_out) == 0
        assert form == "auto" or np.ptp(holders) <= 3


def test_classes_without_rows_are_passed_over_and_named():
    y = np.array([1, 4, 6] * 40)
    part = pathological(y, 9, 0, 2)
    assert np.all((histograms(part, y, 7) > 0).sum(axis=1) == 2)
    assert part.report.absent == [0, 2, 3, 5]
    assert dirichlet(y, 9, 0, 0.5).report.absent == [0, 2, 3, 5]


def test_classes_that_nobody_holds_are_left_out_and_named():
    y = np.arange(100) % 10
    part = pathological(y, 3, 0, 2, "pfedme")
    assert part.report.left_out == {f"class {c} has no holder": 10 for c in range(4, 10)}


def test_a_class_is_cut_unequally():
    sizes = pathological(np.arange(20_000) % 10, 20, 0, 2).sizes
    assert sizes.min() < 0.8 * sizes.mean() and sizes.max() > 1.2 * sizes.mean()


def test_shards_are_equal_and_of_few_classes():
    y = np.random.default_rng(0).permutation(np.arange(6000) % 10)
    part = shards(y, 100, 0, 2)
    assert set(part.sizes.tolist()) == {60}
    found = (histograms(part, y, 10) > 0).sum(axis=1)
    assert found.max() <= 2  # 20 shards a class: no shard spans two
    same = pathological(y, 100, 0, 2, "shards")
    assert np.array_equal(same.rows, part.rows)


# --- the same distribution ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_test_rows_are_dealt_like_train_rows(kind):
    y = np.random.default_rng(0).permutation(np.arange(20_000) % 10)
    test = np.random.default_rng(1).permutation(np.arange(4_000) % 10)
    options = OPTIONS[kind]
    train = partition(kind, y, 20, 5, **options)
    part = same_distribution(train, y, test, 5, alpha=options.get("alpha"))
    check_cover(part, len(test), 20)
    assert len(part.left_out) == 0
    mine = histograms(part, test, 10)
    apart = total_variation(histograms(train, y, 10), mine)[mine.sum(axis=1) >= 50]
    assert len(apart) >= 5 and apart.mean() < 0.03 and apart.max() < 0.15
    again = same_distribution(train, y, test, 5, alpha=options.get("alpha"))
    assert np.array_equal(part.rows, again.rows)


def test_test_rows_of_classes_that_nobody_trains_on_are_left_out():
    y, test = np.arange(100) % 10, np.arange(50) % 10
    train = pathological(y, 3, 0, 2, "pfedme")
    part = same_distribution(train, y, test, 0)
    check_cover(part, 50, 3)
    assert part.report.left_out == {f"class {c} has no train rows": 5 for c in range(4, 10)}


# --- errors, and full size ------------------------------------------------------------------------

WRONG = {
    "clients=11 are more than the 10 rows": ("iid", {"clients": 11}),
    "clients=0 is out of bounds": ("iid", {"clients": 0}),
    "alpha=0 is out of bounds": ("dirichlet", {"alpha": 0}),
    "alpha=nan is out of bounds": ("quantity", {"alpha": float("nan")}),
    "alpha=inf is out of bounds": ("dirichlet", {"alpha": float("inf")}),
    "classes_per_client=3 is more than the 2 classes": ("pathological", {"classes_per_client": 3}),
    "classes_per_client=0 is out of": ("pathological", {"classes_per_client": 0}),
    "form='pfedmee' is unknown; did you mean 'pfedme'": (
        "pathological",
        {"classes_per_client": 1, "form": "pfedmee"},
    ),
    "gives class 0 10 holders, but it has 5 rows": (
        "pathological",
        {"clients": 10, "classes_per_client": 2},
    ),
    "with 4 shards each need 12 rows": ("shards", {"shards_per_client": 4}),
    "partition='dirichelt' is unknown; did you mean 'dirichlet'": ("dirichelt", {}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_input_errors(message):
    kind, options = WRONG[message]
    with pytest.raises(InputError, match=message):
        partition(kind, np.arange(10) % 2, **{"clients": 3, **options})


def test_labels_must_be_whole_and_not_negative():
    with pytest.raises(InputError, match=r"labels\[1\] = -1 is negative"):
        iid(np.array([0, -1]), 1, 0)
    with pytest.raises(InputError, match="float64; give integers"):
        iid(np.zeros(3), 1, 0)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("clients", [100, 10_000])
def test_cifars_labels_are_dealt_at_full_size(real_data, name, clients):
    with np.load(real_data / name / "labels_full.npz") as file:
        fine = "_fine" if name == "cifar100" else ""
        y, test = file[f"train{fine}_labels"], file[f"test{fine}_labels"]
    classes = int(y.max()) + 1
    options = OPTIONS | {"pathological": {"classes_per_client": 5}}
    for kind in KINDS:
        start = time.process_time()
        part = partition(kind, y, clients, 0, **options[kind])
        assert time.process_time() - start < 1
        check_cover(part, 50_000, clients)
        assert len(part.left_out) == 0 and part.sizes.min() >= (1 if kind == "iid" else 2)
        dealt = same_distribution(part, y, test, 0, alpha=options[kind].get("alpha"))
        check_cover(dealt, 10_000, clients)
        if kind == "pathological":
            assert np.all((histograms(part, y, classes) > 0).sum(axis=1) == 5)


def test_dwnps_test_split_of_cifar_is_close_to_its_train_split(real_data):
    with np.load(real_data / "cifar10" / "labels_full.npz") as file:
        y, test = file["train_labels"], file["test_labels"]
    for alpha in (0.1, 0.5, 5.0):
        part = dirichlet(y, 20, 0, alpha)
        dealt = same_distribution(part, y, test, 0, alpha=alpha)
        mine, tested = histograms(part, y, 10), histograms(dealt, test, 10)
        apart = np.nan_to_num(total_variation(mine, tested))
        weighted = float(apart @ dealt.sizes / dealt.sizes.sum())
        uniform = float(total_variation(mine, np.ones((20, 10))).mean())
        assert weighted < 0.02 and (alpha > 1 or weighted < uniform / 10)
