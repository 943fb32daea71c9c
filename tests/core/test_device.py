"""Numbers of devices, and windows of availability: what they may not be."""

from __future__ import annotations

import math

import pytest

from subfleet.core.device import Device, Quantity, windows
from subfleet.core.errors import InputError


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
