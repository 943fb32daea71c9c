"""Clients' rows as Arrow tables: the same block, whatever tables it is cut from."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.datasets import InMemory
from subfleet.datasets.tables import to_block, to_table


def _data(seed: int, clients: int, dtype=np.uint8) -> InMemory:
    draw = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(draw.integers(0, 6, clients))])
    rows = int(offsets[-1])
    x = draw.integers(0, 100, (rows, 2, 3)).astype(dtype)
    return InMemory(x, draw.integers(0, 4, rows), offsets, num_classes=4)


@given(
    seed=st.integers(0, 99),
    cuts=st.lists(st.integers(0, 12), max_size=3),
    chosen=st.lists(st.integers(0, 11), unique=True, max_size=12),
    part=st.sampled_from(["train", "test", "all"]),
)
def test_any_clients_from_any_tables(seed, cuts, chosen, part) -> None:
    data = _data(seed, 12)
    order = np.random.default_rng(seed).permutation(12)
    tables = [to_table(data, ids, part) for ids in np.split(order, sorted(cuts))]
    ids = np.array(chosen, np.int64)
    wanted, found = data.block(ids, part), to_block(tables, ids, (2, 3))
    for a, b in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert found.x.dtype == np.uint8 and found.x.shape[1:] == (2, 3)


def test_neighbours_in_one_table_are_a_view() -> None:
    data = _data(3, 8)
    table = to_table(data, np.arange(8), "all")
    whole = table.column("x").chunk(0).flatten().to_numpy()
    assert np.shares_memory(to_block([table], np.array([2, 3, 4]), (2, 3)).x, whole)
    assert not np.shares_memory(to_block([table], np.array([4, 2]), (2, 3)).x, whole)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int8, np.int16, np.int32])
def test_dtypes_survive_a_file(tmp_path, dtype) -> None:
    data = _data(1, 4, dtype)
    table = to_table(data, np.arange(4), "all")
    with pa.OSFile(str(tmp_path / "a"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    read = pa.ipc.open_file(pa.memory_map(str(tmp_path / "a"))).read_all()
    found = to_block([read], np.arange(4), (2, 3))
    assert found.x.dtype == dtype
    np.testing.assert_array_equal(found.x, data.block(np.arange(4), "all").x)
