"""Numbers of devices, what they may be, and windows of availability."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.device import Device, Quantity, presence, windows
from subfleet.core.errors import InputError


def drawn(name: str, value: object, count: int = 20_000) -> np.ndarray:
    return Quantity.of(name, value).draw(np.random.default_rng(0).random((count, 2)))


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


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("flops_per_s", -5, "-5 is not above 0; give FLOPs a second, such as 1e9"),
        ("flops_per_s", 0, "0 is not above 0"),
        ("flops_per_s", True, "True is neither a number nor a distribution"),
        ("flops_per_s", math.inf, "inf is no finite number"),
        ("latency_s", -0.5, "-0.5 is negative; give seconds"),
        ("failure_rate", 1.5, "1.5 is above 1; give the probability"),
        ("failure_rate", {"uniform": [0.5, 2]}, r"uniform = \[0.5, 2\]: 2 is above 1"),
        ("latency_s", {"lognorml": [1, 1]}, "lognorml: unknown; did you mean 'lognormal'"),
        ("latency_s", {"min": 1}, "needs one of uniform, lognormal, normal, and has none"),
        ("latency_s", {"uniform": [0, 1], "normal": [0, 1]}, "has uniform and normal"),
        ("latency_s", {"uniform": [1]}, r"uniform = \[1\] is not a list of two .*\[low, high\]"),
        ("latency_s", {"uniform": [3, 1]}, r"uniform = \[3, 1\] falls"),
        ("latency_s", {"lognormal": [0, 1]}, "the median 0 is not above 0"),
        ("latency_s", {"lognormal": [1, 11]}, r"sigma 11 is outside \[0, 10\]"),
        ("latency_s", {"normal": [1, -1]}, r"sd -1 is outside \[0, inf\]"),
        ("flops_per_s", {"normal": [9, 3]}, "may draw 0 or less.*add a min above 0"),
        ("flops_per_s", {"normal": [9, 3], "min": 0}, "min = 0 is not above 0"),
        ("latency_s", {"normal": [9, 3], "min": 4, "max": 3}, "min = 4 is above max = 3"),
        ("latency_s", {"normal": [9, 3], "min": "a"}, "min = 'a' is no number"),
    ],
)
def test_bad_numbers_are_named_with_bound_and_remedy(name: str, value: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Quantity.of(name, value)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([], r"\[\] is no list of windows"),
        (7, "7 is no list of windows"),
        ([[0, 25]], r"\[0, 25\] is not a window .* 0..24 s"),
        ([[-1, 5]], r"\[-1, 5\] is not a window"),
        ([[5]], r"\[5\] is not a window"),
        ([[5, 5]], r"\[5, 5\] is empty"),
    ],
)
def test_bad_windows_are_named(spans: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        windows(spans, 24)
    with pytest.raises(InputError, match=f"available: {words}"):
        Device.of({"available": spans, "period_s": 24})


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
