from __future__ import annotations

import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.program import ClientResult, ClientTask, StepProgram, Stream
from subfleet.platform import bundles
from subfleet.platform.record import Choice, variant_name

MAPS = {v: toys.FULL for v in ((8, 4), (4, 2), (2, 1))}
CHOICES = {variant_name(v): Choice(variant_name(v), "cpu", "loop") for v in MAPS}


@st.composite
def tasks(draw):
    ids = draw(st.lists(st.integers(0, 500), min_size=1, max_size=60, unique=True))
    return [
        ClientTask(
            i, toys.FULL, draw(st.sampled_from(list(MAPS))), 1.0, draw(st.integers(0, 50)), 0
        )
        for i in ids
    ]


def cost(task):
    return 0.1 + task.num_samples


def cut(found, count, **options):
    return bundles.cut(found, cost, count, round=3, choices=CHOICES, **options)


def shape(found):
    return [[t.client for t in bundle.tasks] for bundle in found]


@given(tasks(), st.integers(1, 20))
def test_every_task_once_sorted_and_contiguous(found, count):
    made = cut(found, count)
    flat = [t for bundle in made for t in bundle.tasks]
    assert flat == sorted(found, key=lambda t: (variant_name(t.variant), t.client))
    assert [b.number for b in made] == list(range(len(made)))
    assert len(made) <= count and all(b.tasks for b in made)


@given(tasks(), st.integers(1, 20), st.randoms())
def test_the_cut_does_not_depend_on_the_order_of_the_tasks(found, count, random):
    before = shape(cut(found, count))
    random.shuffle(found)
    assert shape(cut(found, count)) == before


@given(tasks(), st.integers(1, 20))
def test_bundles_cost_about_the_same(found, count):
    made = cut(found, count)
    costs = [cost(t) for t in found]
    for bundle in made:
        assert bundle.predicted == pytest.approx(sum(cost(t) for t in bundle.tasks))
        # At most its share, and half a client sticking out at either end.
        assert bundle.predicted <= sum(costs) / count + max(costs) + 1e-9


def test_a_hand_made_cut():
    found = [ClientTask(i, toys.FULL, (8, 4), 1.0, n, 0) for i, n in enumerate([4, 1, 1, 2, 4])]
    made = bundles.cut(found, lambda t: float(t.num_samples), 3, round=1, choices=CHOICES)
    assert shape(made) == [[0], [1, 2, 3], [4]]  # costs 4, 4, 4


def test_tasks_that_cost_nothing_still_go_somewhere():
    found = [ClientTask(i, toys.FULL, (8, 4), 1.0, 0, 0) for i in range(3)]
    made = bundles.cut(found, lambda t: 0.0, 2, round=1, choices=CHOICES)
    assert shape(made) == [[0, 1, 2]]
    assert bundles.cut([], cost, 4, round=1, choices=CHOICES) == []


def test_a_bundle_carries_the_choices_of_its_own_variants_and_its_chunks():
    found = [ClientTask(i, toys.FULL, v, 1.0, 1, 0) for i, v in enumerate([(8, 4), (2, 1), (8, 4)])]
    (whole,) = cut(found, 1, local_test=True)
    assert whole.chunks() == [((2, 1), [0]), ((8, 4), [1, 2])]
    assert whole.ids.tolist() == [1, 0, 2] and whole.ids.dtype == np.int64
    assert sorted(whole.choices) == ["(2, 1)", "(8, 4)"] and whole.local_test and whole.round == 3
    apart = cut(found, 3)
    assert [sorted(b.choices) for b in apart] == [["(2, 1)"], ["(8, 4)"], ["(8, 4)"]]


def test_predicted_seconds_by_hand():
    """50 rows by 20 are 3 steps, 60 rows at most; each pass costs as much as the first."""
    task = ClientTask(0, toys.FULL, (8, 4), 1.0, 50, 0)
    nothing = lambda *a: ({}, {})  # noqa: E731
    streams = {"train": Stream(batch=20), "val": Stream(batch=20, take=0.1)}
    for passes in (1.0, 2.0, 5.0):
        program = StepProgram(dict, nothing, lambda: ClientResult({}), streams, passes=passes)
        seconds = bundles.predicted_seconds(program, task, macs=10**8)
        assert seconds == pytest.approx(passes * (3 * 4e-4 + 3 * 1e8 * 60 / 1e10))


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=80),
    st.integers(1, 16),
)
def test_evaluation_bundles_hold_every_client_once_in_order(sizes, count):
    ids = np.arange(len(sizes)) * 3 + 1
    views = {"global": toys.FULL}
    made = bundles.cut_evaluation(ids, np.array(sizes), views, 0.5, count, round=2, part="all")
    assert np.concatenate([b.ids for b in made]).tolist() == ids.tolist()
    assert [b.number for b in made] == list(range(len(made))) and len(made) <= count
    weights = np.maximum(sizes, 1)
    assert sum(b.predicted for b in made) == pytest.approx(0.5 * weights.sum())
    assert all(b.predicted / 0.5 <= weights.sum() / count + weights.max() for b in made)
    assert all(b.part == "all" and b.round == 2 and b.views is views for b in made)


def test_no_clients_no_evaluation():
    none = np.array([], np.int64)
    assert bundles.cut_evaluation(none, none, {}, 1.0, 4, round=1, part="test") == []


def test_auto_count_is_a_power_of_two_that_never_exceeds_the_cohort():
    assert [bundles.auto_count(n, 9.0) for n in (1, 2, 3)] == [1, 2, 3]
    # Where nothing is summed each client may be a bundle of its own.
    assert [bundles.auto_count(10, s, sums=False) for s in (0.1, 9.0)] == [4, 10]
    assert bundles.auto_count(10, 9.0) == 4
    for n in range(4, 3000, 7):
        for seconds in (0.0, 0.3, 7.0, 1e4):
            count = bundles.auto_count(n, seconds)
            assert count & (count - 1) == 0 and min(4, n) <= count <= max(4, 2 * n**0.5)


def test_dear_clients_make_more_bundles_up_to_the_root_of_their_number():
    assert [bundles.auto_count(1000, s) for s in (0.1, 3.2, 8.1, 1e3)] == [4, 8, 16, 32]
