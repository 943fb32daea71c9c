"""Numbers drawn from laws, and windows against an hour-by-hour walk."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.device import Quantity, windows
from subfleet.platform import device_draws
from subfleet.platform.device_draws import presence


def drawn(name: str, value: object, count: int = 20_000) -> np.ndarray:
    uniform = np.random.default_rng(0).random((count, 2))
    return device_draws.drawn(Quantity.of(name, value), uniform)


def test_a_number_is_that_of_every_client() -> None:
    assert drawn("flops_per_s", 10**9, 3).tolist() == [1e9] * 3


def test_a_uniform_fills_its_bounds() -> None:
    found = drawn("latency_s", {"uniform": [1.0, 3.0]})
    assert found.min() >= 1 and found.max() <= 3
    # 20,000 draws: the mean's standard error is 0.004.
    assert found.mean() == pytest.approx(2.0, abs=0.02)
    assert found.std() == pytest.approx(2 / math.sqrt(12), abs=0.02)


def test_a_lognormal_has_its_median_and_sigma() -> None:
    logs = np.log(drawn("flops_per_s", {"lognormal": [1e9, 0.5]}))
    assert logs.mean() == pytest.approx(math.log(1e9), abs=0.02)
    assert logs.std() == pytest.approx(0.5, abs=0.02)
    assert logs.max() - logs.mean() > 4 * 0.4, "tails are a normal's, not cut"


def test_a_normal_is_clipped_to_its_bounds_and_to_those_of_the_key() -> None:
    found = drawn("up_bytes_per_s", {"normal": [10.0, 2.0], "min": 9.0, "max": 12.0})
    assert (found.min(), found.max()) == (9.0, 12.0)
    assert np.mean(found == 9.0) == pytest.approx(0.309, abs=0.02)  # P(z < -0.5)
    rates = drawn("failure_rate", {"normal": [0.5, 1.0]})
    assert (rates.min(), rates.max()) == (0.0, 1.0)


spans = st.lists(
    st.tuples(st.integers(0, 24), st.integers(0, 24)).filter(lambda s: s[0] != s[1]), max_size=4
)


@given(spans=spans, now=st.integers(0, 23))
def test_presence_is_that_of_an_hour_by_hour_walk(spans: list, now: int) -> None:
    open_hours = [
        any(a <= h < b if a < b else h >= a or h < b for a, b in spans) for h in range(24)
    ]
    rows = windows(spans, 24) if spans else ()
    begins, lengths = np.array([[w[i] for w in rows] for i in (0, 1)]).reshape(2, 1, len(rows))
    wait, stay = (float(v[0]) for v in presence(begins, lengths, np.array([float(now)]), 24.0))
    if not any(open_hours):
        assert wait == math.inf
        return
    ahead = [open_hours[(now + i) % 24] for i in range(72)]
    assert wait == ahead.index(True)
    rest = ahead[int(wait) :]
    assert stay == (math.inf if all(open_hours) else rest.index(False))
