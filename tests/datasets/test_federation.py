"""The client split and the sizes of a client's parts."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.errors import InputError
from subfleet.datasets import (
    ClientRows,
    InMemory,
    Store,
    SyntheticFemnist,
    SyntheticVectors,
    split_clients,
    write_store,
)
from subfleet.datasets.federation import (
    checked_ids,
    checked_number,
    checked_part,
    identity,
    part_sizes,
    train_sizes,
)
from subfleet.datasets.reader import Layout


def stored(path, x):
    rows = ClientRows("a", x, np.arange(len(x)) % 2, np.zeros(len(x), bool))
    layout = Layout(num_classes=2, input_shape=(3,))
    write_store(path, [rows], name="toy", layout=layout, source={"folder": str(path)})
    return identity(Store(path))


def test_data_are_told_apart_by_what_they_hold_not_by_where_they_lie(tmp_path):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    changed = x.copy()
    changed[3, 1] += 1
    assert stored(tmp_path / "a", x) == stored(tmp_path / "b", x)
    assert stored(tmp_path / "a", x) != stored(tmp_path / "c", changed)
    y, offsets = np.array([0, 1, 0, 1]), np.array([0, 2, 4])
    same, again = (identity(InMemory(x.copy(), y, offsets)) for _ in range(2))
    assert same == again == json.loads(json.dumps(same))
    assert same["clients"] == 2 and same["input_shape"] == [3]
    for other in (
        InMemory(changed, y, offsets),
        InMemory(x, y[::-1], offsets),
        InMemory(x, y, np.array([0, 1, 4])),
        InMemory(x, y, offsets, train=np.ones(4, bool)),
    ):
        assert identity(other) != same
    # Drawn from the experiment alone: nothing of its own to add.
    assert identity(SyntheticFemnist(5)).keys() == {"name", "clients", "classes", "input_shape"}


@given(st.integers(0, 2**31), st.integers(1, 500), st.floats(0.01, 0.99))
def test_clients_are_covered_once_with_one_of_each_at_least(seed, count, held_out):
    train, held = split_clients(seed, count, held_out)
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(count))
    assert np.all(np.diff(train) > 0) and np.all(np.diff(held) > 0)
    assert train.dtype == held.dtype == np.int64
    assert len(train) >= 1
    assert len(held) == (0 if count == 1 else min(max(round(held_out * count), 1), count - 1))


def test_client_split_follows_the_seed_alone():
    assert np.array_equal(split_clients(5, 100)[1], split_clients(5, 100)[1])
    assert not np.array_equal(split_clients(5, 100)[1], split_clients(6, 100)[1])


def test_nobody_is_held_out_when_the_share_is_zero():
    assert len(split_clients(0, 10, 0.0)[1]) == 0


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_the_bounds_is_an_input_error(share):
    with pytest.raises(InputError, match=r"held_out=.*\[0, 1\)"):
        split_clients(0, 10, share)


def test_a_million_clients_split_quickly():
    start = time.perf_counter()
    train, held = split_clients(0, 1_000_000)
    assert (len(train), len(held)) == (800_000, 200_000)
    assert time.perf_counter() - start < 2


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=50))
def test_parts_add_up_and_neither_is_empty(sizes):
    n = np.array(sizes)
    train, test = part_sizes(n, "train"), part_sizes(n, "test")
    assert np.array_equal(train + test, n) and np.array_equal(part_sizes(n, "all"), n)
    assert not part_sizes(n, "val").any()
    assert np.all(train[n >= 1] >= 1) and np.all(test[n >= 2] >= 1)
    big = n >= 5
    assert np.array_equal(train[big], n[big] * 4 // 5)


def test_two_samples_are_one_and_one():
    assert train_sizes(np.array([2])).tolist() == [1]


def test_unknown_parts_and_clients_are_input_errors():
    with pytest.raises(InputError, match="did you mean 'train'"):
        checked_part("trian")
    with pytest.raises(InputError, match=r"client 7 is outside 0\.\.4"):
        checked_ids(np.array([1, 7]), 5)


@pytest.mark.parametrize("value", [0, 2.5, "3", True, float("nan"), None])
def test_numbers_out_of_bounds_are_input_errors(value):
    with pytest.raises(InputError, match=r"clients=.*an integer of at least 1"):
        checked_number("clients", value, 1, whole=True)


def test_arrays_in_memory_have_a_validation_part_where_it_is_asked_for():
    x, y = np.arange(40, dtype=np.float32).reshape(20, 2), np.arange(20) % 2
    plain = InMemory(x, y, np.array([0, 10, 20]))
    data = InMemory(x, y, np.array([0, 10, 20]), val_share=0.2)
    ids = np.array([1, 0])
    found = {part: data.sizes(ids, part).tolist() for part in ("train", "val", "test", "all")}
    assert found == {"train": [6, 6], "val": [2, 2], "test": [2, 2], "all": [10, 10]}
    assert plain.block(ids, "val").x.shape == (0, 2)
    assert np.array_equal(plain.block(ids, "test").x, data.block(ids, "test").x)
    assert identity(plain) != identity(data)


@pytest.mark.parametrize("data", [SyntheticFemnist(9), SyntheticVectors(9)], ids=lambda d: d.name)
def test_who_has_no_validation_part_gives_no_rows(data):
    block = data.block(np.arange(3), "val")
    assert block.x.shape == (0, *data.input_shape) and block.offsets.tolist() == [0] * 4
    assert not data.sizes(np.arange(3), "val").any() and not data.label_counts([0], "val").any()
