from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subfleet.core.errors import InputError
from subfleet.core.golomb import Sparse, decode, encode, most_bytes, position_bits, rice_bits


def sparse(size, positions, negative=None, magnitude=(0.5,)):
    negative = [False] * len(positions) if negative is None else negative
    return Sparse(
        size,
        np.array(positions, np.int64),
        np.array(negative, bool),
        np.array(magnitude, np.float32),
    )


def spelled(code, header=9):
    return "".join(f"{byte:08b}" for byte in code[header:])


def plain_words(value):
    """The words of a vector as a string of 0 and 1, one after the other."""
    k = len(value.positions)
    text, last = "", -1
    for place, minus in zip(value.positions.tolist(), value.negative.tolist(), strict=True):
        if k < value.size:
            rice, gap = rice_bits(k / value.size), place - last - 1
            rest = f"{gap % 2**rice:0{rice}b}" if rice else ""
            text += "1" * (gap // 2**rice) + "0" + rest
        text += "0" if minus else "1"
        last = place
    return text


def same(a, b):
    return (
        a.size == b.size
        and np.array_equal(a.positions, b.positions)
        and np.array_equal(a.negative, b.negative)
        and a.magnitude.tobytes() == b.magnitude.tobytes()
    )


# --- the formulas ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "rice", "position", "per_entry", "compression"),
    [
        (0.25, 1, 3.286, 1.0714, 29.9),
        (0.1, 3, 4.756, 0.5756, 55.6),
        (0.01, 6, 8.108, 0.0911, 351),
        (1 / 400, 8, 10.114, 0.0278, 1152),
        (0.001, 9, 11.495, 0.0125, 2561),
    ],
)
def test_remainder_bits_and_mean_bits(p, rice, position, per_entry, compression):
    assert rice_bits(p) == rice
    assert position_bits(p) == pytest.approx(position, abs=5e-4)
    bits = p * (position_bits(p) + 1)
    assert bits == pytest.approx(per_entry, abs=5e-5)
    assert 32 / bits == pytest.approx(compression, rel=2e-3)


@given(st.floats(1e-6, 0.999))
def test_no_code_is_shorter_than_the_entropy(p):
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    assert entropy + p <= p * (position_bits(p) + 1)


@pytest.mark.parametrize("p", [0.01, 0.05, 0.25])
def test_a_random_vector_takes_the_mean_bits(p):
    draw = np.random.default_rng(5)
    positions = np.cumsum(draw.geometric(p, 400_000)) - 1
    value = sparse(int(positions[-1]) + 1, positions, draw.random(len(positions)) < 0.5)
    code = encode(value)
    assert 8 * (len(code) - 9) / len(positions) == pytest.approx(position_bits(p) + 1, rel=1e-3)
    assert same(decode(code, value.size), value)


# --- the code ----------------------------------------------------------------------------------


def test_a_code_by_hand():
    # + at 3, - at 4, + at 11 of 20; b* = 2. Gaps less one: 3 = 0 * 4 + 3, 0, 6 = 1 * 4 + 2.
    value = sparse(20, [3, 4, 11], [False, True, False])
    code = encode(value)
    assert code[:4] == b"\x03\0\0\0" and code[4] == 2
    assert np.frombuffer(code, "<f4", 1, 5) == [0.5]
    assert spelled(code) == "0111" + "0000" + "10101" + "000"
    assert len(code) == 9 + 2
    vector = np.zeros(20, np.float32)
    vector[[3, 4, 11]] = [0.5, -0.5, 0.5]
    assert np.array_equal(decode(code, 20).dense(), vector)


def test_a_vector_without_zeros_is_its_signs():
    value = sparse(5, range(5), [False, True, True, False, True])
    code = encode(value)
    assert spelled(code) == "10010" + "000"
    assert same(decode(code, 5), value)


def test_no_non_zeros_are_a_header():
    code = encode(sparse(7, []))
    assert len(code) == 9
    assert np.array_equal(decode(code, 7).dense(), np.zeros(7))


@st.composite
def vectors(draw):
    size = draw(st.integers(1, 300))
    some = draw(st.sets(st.integers(0, size - 1)))
    if draw(st.booleans()):
        some = set(range(size)) - some
    positions = sorted(some)
    k = len(positions)
    negative = draw(st.lists(st.booleans(), min_size=k, max_size=k))
    each = draw(st.booleans())
    count = k if each else 1
    floats = st.floats(0, width=32, allow_infinity=False)
    return sparse(size, positions, negative, draw(st.lists(floats, min_size=count, max_size=count)))


@settings(max_examples=200, deadline=None)
@given(vectors())
def test_what_is_encoded_is_decoded(value):
    count = len(value.magnitude)
    code = encode(value)
    words = plain_words(value)
    header = 5 + 4 * count
    assert len(code) == header + math.ceil(len(words) / 8)
    assert spelled(code, header)[: len(words)] == words
    assert same(decode(code, value.size, ternary=count == 1), value)


def test_one_of_a_million():
    value = sparse(10**6, [999_999], [True])
    assert same(decode(encode(value), 10**6), value)


# --- bytes that are no code --------------------------------------------------------------------

CODE = encode(sparse(20, [3, 4, 11], [False, True, False]))


@pytest.mark.parametrize(
    ("code", "size"),
    [
        (b"", 20),
        (CODE[:7], 20),
        (CODE[:9], 20),
        (CODE[:-1], 20),
        (CODE + b"\0", 20),
        (CODE, 11),
        (CODE, 2),
        (b"\xff\xff\xff\xff" + CODE[4:], 20),
        (b"\x0b" + CODE[1:], 20),
    ],
)
def test_other_bytes_are_refused(code, size):
    with pytest.raises(InputError, match=f"{len(code)} bytes are no code of {size} entries"):
        decode(code, size)


@given(st.binary(max_size=40), st.integers(1, 30), st.booleans())
def test_any_bytes_decode_or_are_refused(code, size, ternary):
    try:
        value = decode(code, size, ternary=ternary)
    except InputError:
        return
    assert value.dense().shape == (size,)
    assert (np.diff(value.positions) > 0).all()


@given(size=st.integers(1, 400), data=st.data(), ternary=st.booleans())
def test_no_code_is_longer_than_the_longest(size, data, ternary):
    positions = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    k = len(positions)
    magnitude = (0.5,) if ternary else (0.5,) * k
    code = encode(sparse(size, positions, magnitude=magnitude))
    last = encode(sparse(size, range(size - k, size), magnitude=magnitude))
    longest = most_bytes(size, k, ternary=ternary)
    assert len(code) <= longest == len(last), "all zeros before the first"
