"""Divergence of a client's labels from the uniform ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.skew import njsd

counts = st.lists(st.integers(0, 50), min_size=2, max_size=20).filter(any)


def test_by_hand():
    assert njsd(np.array([1, 1, 0, 0])) == pytest.approx(0.5672, abs=5e-5)
    assert njsd(np.array([9, 1])) == pytest.approx(0.4716, abs=5e-5)


@pytest.mark.parametrize("classes", [2, 10, 62, 80])
def test_all_classes_alike_is_0_and_a_single_class_1(classes):
    rows = np.stack([np.full(classes, 7), 5 * np.eye(classes, dtype=int)[1], np.zeros(classes)])
    assert njsd(rows).tolist() == pytest.approx([0, 1, 0], abs=1e-12)


@given(counts, st.randoms())
def test_the_order_of_classes_does_not_matter(row, random):
    other = random.sample(row, len(row))
    assert njsd(np.array(row)) == pytest.approx(float(njsd(np.array(other))), abs=1e-12)


@given(st.integers(2, 30))
def test_it_grows_from_uniform_to_one_class(classes):
    uniform, one = np.full(classes, 1 / classes), np.eye(classes)[0]
    path = np.stack([(1 - t) * uniform + t * one for t in np.linspace(0, 1, 11)])
    assert (np.diff(njsd(path)) > 0).all()
