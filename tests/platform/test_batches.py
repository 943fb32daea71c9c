from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.program import Stream
from subfleet.platform import batches

sizes = st.integers(1, 60)


def order(stream, n, *, seed=0, round=1, client=0, min_batch=1):
    return batches.steps(stream, n, seed=seed, round=round, client=client, min_batch=min_batch)


def rows(steps):
    return list(chain.from_iterable(batch.tolist() for batch in steps))


def test_the_order_follows_from_seed_round_and_client_alone():
    stream = Stream(batch=7, epochs=2)
    first = rows(order(stream, 40, seed=1, round=2, client=3))
    assert rows(order(stream, 40, seed=1, round=2, client=3)) == first
    for other in ({"seed": 2}, {"round": 3}, {"client": 4}):
        assert rows(order(stream, 40, **({"seed": 1, "round": 2, "client": 3} | other))) != first


@given(n=sizes, size=st.none() | st.integers(1, 25), epochs=st.integers(1, 3))
def test_every_pass_sees_each_row_once(n, size, epochs):
    stream = Stream(batch=size, epochs=epochs)
    steps = order(stream, n)
    assert len(steps) == stream.num_steps(n)
    seen = rows(steps)
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert all(len(batch) <= (size or n) for batch in steps)


def test_passes_of_one_round_differ_from_each_other():
    seen = rows(order(Stream(batch=10, epochs=2), 30))
    assert seen[:30] != seen[30:]


@given(n=sizes, size=st.integers(1, 25), steps=st.integers(1, 12))
def test_steps_are_exact_and_cycle_through_whole_passes(n, size, steps):
    found = order(Stream(batch=size, steps=steps), n)
    assert len(found) == steps
    counts = np.bincount(rows(found), minlength=n)
    assert counts.max() - counts.min() <= 1  # no row twice before every row was seen once


def test_a_client_without_rows_has_no_steps():
    assert order(Stream(steps=5), 0) == []
    assert order(Stream(batch=None), 0) == []


@given(n=st.integers(2, 60), edge=st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.9]))
def test_parts_cut_by_take_and_skip_are_disjoint_and_cover(n, edge):
    before = Stream(batch=4, take=edge)
    after = Stream(batch=4, skip=edge, take=1 - edge)
    a, b = rows(order(before, n)), rows(order(after, n))
    assert a and b
    assert sorted(a + b) == list(range(n))
    assert (len(a), len(b)) == (before.rows(n), after.rows(n))


def test_three_parts_whose_edges_are_sums_of_floats():
    parts = [Stream(take=0.1), Stream(skip=0.1, take=0.2), Stream(skip=0.3, take=0.7)]
    for n in range(8, 60):
        assert sorted(rows(chain.from_iterable(order(s, n) for s in parts))) == list(range(n))


def test_a_lone_row_serves_both_parts():
    assert rows(order(Stream(take=0.1), 1)) == rows(order(Stream(skip=0.1, take=0.9), 1)) == [0]


def test_redraw_round_draws_parts_and_order_anew_and_run_does_not():
    n = 40
    for take in (0.5, 1.0):
        fixed = Stream(take=take, redraw="run")
        assert rows(order(fixed, n, round=1)) == rows(order(fixed, n, round=9))
        fresh = Stream(take=take, redraw="round")
        assert rows(order(fresh, n, round=1)) != rows(order(fresh, n, round=9))
    part = Stream(take=0.5, redraw="round")
    assert set(rows(order(part, n, round=1))) != set(rows(order(part, n, round=2)))


@given(n=sizes, size=st.integers(1, 9), steps=st.integers(1, 7), rounds=st.integers(2, 4))
def test_a_stream_that_spans_rounds_goes_on_where_it_stopped(n, size, steps, rounds):
    short = Stream(batch=size, steps=steps, spans_rounds=True)
    long = Stream(batch=size, steps=steps * rounds, spans_rounds=True)
    split = list(chain.from_iterable(order(short, n, round=r + 1) for r in range(rounds)))
    whole = order(long, n)
    assert [b.tolist() for b in split] == [b.tolist() for b in whole]


def test_min_batch_drops_batches_too_small_for_batch_norm():
    assert [len(b) for b in order(Stream(batch=4, epochs=2), 9)] == [4, 4, 1, 4, 4, 1]
    assert [len(b) for b in order(Stream(batch=4, epochs=2), 9, min_batch=2)] == [4, 4, 4, 4]
    assert order(Stream(batch=4), 1, min_batch=2) == []


def test_padded_marks_real_rows_and_pads_with_row_zero():
    a, b = [np.array([3, 1]), np.array([2])], [np.array([5, 6])]
    numbers, weights = batches.padded([a, b, []])
    assert numbers.tolist() == [[[3, 1], [2, 0]], [[5, 6], [0, 0]], [[0, 0], [0, 0]]]
    assert weights.tolist() == [[[1, 1], [1, 0]], [[1, 1], [0, 0]], [[0, 0], [0, 0]]]
    assert batches.padded([[], []])[0].shape == (2, 0, 0)


@pytest.mark.parametrize("stream", [Stream(batch=7), Stream(batch=None), Stream(steps=3, batch=50)])
def test_num_steps_is_what_is_scheduled(stream):
    for n in (1, 6, 7, 8, 50):
        assert len(order(stream, n)) == stream.num_steps(n)


@given(
    n=st.integers(0, 60),
    size=st.none() | st.integers(1, 25),
    steps=st.none() | st.integers(1, 12),
    round=st.integers(1, 4),
    min_batch=st.integers(1, 2),
    spans=st.booleans(),
    cut=st.sampled_from([(0.0, 1.0), (0.1, 0.9), (0.0, 0.1)]),
)
def test_steps_and_rows_are_counted_without_drawing_them(
    n, size, steps, round, min_batch, spans, cut
):
    stream = Stream(batch=size, epochs=2, steps=steps, spans_rounds=spans, skip=cut[0], take=cut[1])
    drawn = order(stream, n, round=round, min_batch=min_batch)
    counted = batches.count(stream, n, round=round, min_batch=min_batch)
    assert counted == (len(drawn), sum(map(len, drawn)))
