import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subfleet.core.errors import InputError, RunFailed
from subfleet.platform import checkpoint
from subfleet.platform.kept import KeptStore


def tree(value, size=4):
    return {
        "w": np.full((size, 2), value, np.float32),
        "n": np.array(value, np.int64),
        "b": np.array([True, False]),
    }


def same(a, b):
    assert (a is None) == (b is None)
    if a is None:
        return
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert np.array_equal(a[name], b[name])


def test_rows_come_back_in_the_order_asked(tmp_path):
    store = KeptStore(tmp_path / "kept")
    assert store.read([3, 1]) == [None, None] and len(store) == 0
    store.write([5, 2**40, 0], [tree(5), tree(6), tree(0)])
    got = store.read([2**40, 1, 5, 5])
    same(got[0], tree(6))
    same(got[1], None)
    same(got[2], tree(5))
    assert store.ids.tolist() == [0, 5, 2**40]
    got[2]["w"][:] = 99  # a copy, and writable
    same(store.read([5])[0], tree(5))


def test_shapes_leaves_and_dtypes_may_differ_and_change(tmp_path):
    store = KeptStore(tmp_path / "kept")
    store.write([1, 2], [tree(1, size=3), {"only": np.zeros((0, 3), np.uint8)}])
    store.write([1], [{"w": torch.ones(5, dtype=torch.float64, requires_grad=True)}])
    same(store.read([1])[0], {"w": np.ones(5)})
    assert store.read([2])[0]["only"].shape == (0, 3)
    store.write([2, 3], [{}, tree(3)])
    assert store.read([2]) == [{}]
    store.write([3, 2], [None, tree(2)])
    assert store.read([3]) == [None] and store.ids.tolist() == [1, 2]


def test_bad_input_is_named_and_changes_nothing(tmp_path):
    store = KeptStore(tmp_path / "kept")
    store.write([1], [tree(1)])
    with pytest.raises(InputError, match="2 client ids for 2 states; give each id once"):
        store.write([1, 1], [tree(2), tree(3)])
    with pytest.raises(InputError, match="kept state of client 4: 'name' is <U1"):
        store.write([1, 4], [tree(2), {"name": np.array("x")}])
    same(store.read([1])[0], tree(1))


def test_a_cut_segment_is_an_error_not_a_crash(tmp_path):
    store = KeptStore(tmp_path / "kept")
    store.write([1], [tree(1)])
    segment = next((tmp_path / "kept").glob("*.rows"))
    segment.write_bytes(segment.read_bytes()[:10])
    with pytest.raises(RunFailed, match="cut short"):
        store.read([1])


def test_garbage_stays_below_half(tmp_path):
    store = KeptStore(tmp_path / "kept")
    for turn in range(50):
        store.write(range(20), [tree(turn + i) for i in range(20)])
        on_disk = sum(path.stat().st_size for path in (tmp_path / "kept").iterdir())
        assert on_disk == store.num_bytes <= 2 * 20 * 48
    for i, row in enumerate(store.read(range(20))):
        same(row, tree(49 + i))


def test_a_snapshot_is_not_touched_by_what_follows(tmp_path):
    store = KeptStore(tmp_path / "kept")
    store.write([1, 2], [tree(1), tree(2)])
    store.snapshot(tmp_path / "s1")
    store.write([2, 3], [tree(20, size=7), tree(3)])
    store.snapshot(tmp_path / "s2")
    for turn in range(5):  # compaction and removal of segments
        store.write([1, 2, 3], [tree(turn)] * 3)
    for folder, want in (("s1", [1, 2, None]), ("s2", [1, 20, 3])):
        fresh = KeptStore(tmp_path / f"from-{folder}")
        fresh.restore(tmp_path / folder)
        sizes = [4, 7 if want[1] == 20 else 4, 4]
        for row, value, size in zip(fresh.read([1, 2, 3]), want, sizes, strict=True):
            same(row, None if value is None else tree(value, size))
        fresh.write([1], [tree(100)])  # writes after a restore spare the snapshot too
        fresh.restore(tmp_path / folder)
        same(fresh.read([1])[0], tree(1))


def test_an_unwhole_snapshot_is_refused(tmp_path):
    store = KeptStore(tmp_path / "kept")
    store.write([1, 2], [tree(1), tree(2)])
    store.snapshot(tmp_path / "s")
    (tmp_path / "s" / "index.bin").write_bytes((tmp_path / "s" / "index.bin").read_bytes()[:20])
    with pytest.raises(InputError, match="no whole snapshot"):
        store.restore(tmp_path / "s")
    same(store.read([2])[0], tree(2))


def play(store, first, last, seed=3):
    """Rounds that read, change and write the rows of random cohorts."""
    for number in range(first, last + 1):
        rng = np.random.default_rng((seed, number))
        cohort = rng.choice(40, size=8, replace=False)
        rows = store.read(cohort)
        new = []
        for row in rows:
            size = int(rng.integers(1, 5))
            grown = {"w": rng.random((size, 3)).astype(np.float32)}
            if row is not None:
                grown["w"] += row["w"].sum()
            new.append(grown)
        store.write(cohort, new)


@settings(max_examples=15)
@given(at=st.integers(0, 30), every=st.integers(1, 9))
def test_a_resumed_store_equals_an_uninterrupted_one(tmp_path_factory, at, every):
    root = tmp_path_factory.mktemp("k")
    whole = KeptStore(root / "whole")
    play(whole, 1, 30)
    cut = KeptStore(root / "cut")
    done = 0
    for number in range(1, at + 1):
        play(cut, number, number)
        if number % every == 0:
            checkpoint.save(
                root / "c",
                number,
                {},
                fingerprint="f",
                attach=lambda path: cut.snapshot(path / "kept"),
            )
            done = number
    cut.close()
    again = KeptStore(root / "cut")  # the process was killed: what lies there is of no use
    found = checkpoint.load_latest(root / "c", fingerprint="f")
    assert (found.round if found else 0) == done
    if found:
        again.restore(found.path / "kept")
    play(again, done + 1, 30)
    assert again.ids.tolist() == whole.ids.tolist()
    for a, b in zip(whole.read(whole.ids), again.read(again.ids), strict=True):
        same(a, b)
    whole.close()
    again.close()


def test_a_hundred_thousand_clients(tmp_path):
    store = KeptStore(tmp_path / "kept")
    ids = np.random.default_rng(0).permutation(10_000_000)[:100_000]
    row = {"w": np.zeros(16, np.float32)}
    start = time.perf_counter()
    for part in np.array_split(ids, 100):
        store.write(part, [row] * len(part))
    store.snapshot(tmp_path / "s")
    assert len(store) == 100_000 and store.num_bytes == 100_000 * 64
    assert all(r is not None for r in store.read(ids[::10]))
    assert store.read([-1]) == [None]
    # About a second; the bound is for a store that became quadratic.
    assert time.perf_counter() - start < 20
    index = store._ids.nbytes + store._index.nbytes
    assert index <= 24 * 100_000


def test_reading_ahead_is_what_reading_gives_after_the_writes(tmp_path):
    """Rows of other clients are passed over, an empty bundle is no hindrance."""
    store = KeptStore(tmp_path / "kept")
    store.write([3, 5], [{"a": np.array([3.0])}, {"a": np.array([5.0])}])
    unwritten = [
        (np.array([9, 5]), [{"a": torch.tensor([9.0])}, {"b": torch.tensor([1, 2])}]),
        (np.array([], np.int64), []),
    ]
    ids = [5, 3, 7]
    ahead, before = store.read_ahead(ids, unwritten), store.read(ids)
    assert _plain(before)[0] == {"a": [5.0]}  # nothing was written
    for clients, trees in unwritten:
        store.write(clients, trees)
    assert _plain(ahead) == _plain(store.read(ids)) == [{"b": [1, 2]}, {"a": [3.0]}, None]


def _plain(rows):
    return [row and {name: leaf.tolist() for name, leaf in row.items()} for row in rows]
