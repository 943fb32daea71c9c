"""The store on disk: exact rows, mapped, whole or absent."""

import errno
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from subfleet.core.errors import InputError, RunFailed
from subfleet.core.scaling import Scaling
from subfleet.datasets import ClientRows, Federation, Store, write_store, writing
from subfleet.datasets.pool import Pool
from subfleet.datasets.reader import Layout

LAYOUT = Layout(num_classes=4, input_shape=(2, 3), scale=Scaling(0.5, 1.0))
FACTS = {"name": "toy", "layout": LAYOUT, "source": {}}


def _clients(dtype=np.uint8, count=6):
    """Clients of 3 to 8 rows; row 1 of each repeats row 0."""
    draw = np.random.default_rng(0)
    for i in range(count):
        rows = 3 + i
        x = draw.integers(0, 255, (rows, 2, 3)).astype(dtype)
        x[1] = x[0]
        yield ClientRows(f"c{i}", x, draw.integers(0, 4, rows), np.arange(rows) == rows - 1)


@pytest.fixture(params=[np.uint8, np.float32, np.int8, np.int16, np.int32])
def written(request, tmp_path):
    write_store(tmp_path / "toy", _clients(request.param), **FACTS)
    return Store(tmp_path / "toy"), list(_clients(request.param))


def test_rows_come_back_as_they_were(written):
    data, clients = written
    assert isinstance(data, Federation) and isinstance(data, Pool)
    assert (data.num_clients, data.num_rows, data.scale) == (6, 33, Scaling(0.5, 1.0))
    assert data.client_names == [f"c{i}" for i in range(6)]
    block = data.block(np.array([4, 0, 4]), "all")
    assert block.x.dtype == clients[0].x.dtype
    assert np.array_equal(block.x, np.concatenate([clients[i].x for i in (4, 0, 4)]))
    assert np.array_equal(block.y, np.concatenate([clients[i].y for i in (4, 0, 4)]))
    assert block.offsets.tolist() == [0, 7, 10, 17]


@pytest.mark.parametrize("split", ["seeded", "leaf"])
def test_parts_cover_each_client_once_and_part_no_repeats(written, split):
    data = Store(written[0].path, seed=3, split=split)
    for client in range(6):
        one = np.array([client])
        train, test = data.block(one, "train"), data.block(one, "test")
        every = data.block(one, "all")
        assert len(train.y) >= 1 and len(test.y) >= 1
        assert len(train.y) + len(test.y) == len(every.y)
        rows = sorted(row.tobytes() for row in np.concatenate([train.x, test.x]))
        assert rows == sorted(row.tobytes() for row in every.x)
        seen = {row.tobytes() for row in train.x}
        assert not any(row.tobytes() in seen for row in test.x)
        for part, block in (("train", train), ("test", test), ("all", every)):
            assert data.sizes(one, part).tolist() == [len(block.y)]
            assert np.array_equal(
                data.label_counts(one, part)[0], np.bincount(block.y, minlength=4)
            )


def test_leaf_split_keeps_leafs_test_rows(written):
    data = Store(written[0].path, split="leaf")
    block = data.block(np.arange(6), "test")
    assert np.array_equal(block.x, np.stack([c.x[-1] for c in written[1]]))


def test_it_pickles_as_its_arguments(written):
    data = Store(written[0].path, seed=5, test_share=0.3, val_share=0.1)
    ids = np.arange(6)
    before = data.block(ids, "train")
    text = pickle.dumps(data)
    assert len(text) < 500
    assert np.array_equal(pickle.loads(text).block(ids, "train").x, before.x)


def test_many_batches_read_like_one(tmp_path, monkeypatch):
    write_store(tmp_path / "one", _clients(), **FACTS)
    monkeypatch.setattr(writing, "_BATCH_BYTES", 1)
    write_store(tmp_path / "many", _clients(), **FACTS)
    one, many = Store(tmp_path / "one"), Store(tmp_path / "many")
    assert len(many._batches) == 6 and len(one._batches) == 1
    ids = np.array([5, 2, 3])
    for part in ("train", "test", "all"):
        for chosen in (ids, np.sort(ids), ids[:1], ids[:0]):
            for a, b in zip(one.block(chosen, part), many.block(chosen, part), strict=True):
                assert np.array_equal(a, b)
    numbers = np.array([32, 0, 5, 5, 17])
    assert np.array_equal(one.rows(numbers), many.rows(numbers))
    assert np.array_equal(one.labels(), many.labels())


def test_rows_come_by_number(written):
    data, clients = written
    x, y = (np.concatenate([getattr(c, name) for c in clients]) for name in ("x", "y"))
    numbers = np.array([32, 0, 5, 5, 17])
    assert np.array_equal(data.rows(numbers), x[numbers]) and data.rows(numbers).dtype == x.dtype
    assert data.rows(np.array([], np.int64)).shape == (0, 2, 3)
    assert np.array_equal(data.labels(), y)
    assert np.array_equal(data.from_test(), np.concatenate([c.from_test for c in clients]))


def test_a_validation_part_is_drawn_from_what_trains(written):
    plain, data = Store(written[0].path), Store(written[0].path, val_share=0.2)
    ids = np.arange(6)
    assert plain.sizes(ids, "val").tolist() == [0] * 6
    assert np.array_equal(plain.block(ids, "test").x, data.block(ids, "test").x)
    # Client 0 has two different rows only, and the test part comes first.
    assert data.sizes(ids, "val").tolist()[0] == 0 and np.all(data.sizes(ids, "val")[1:] >= 1)
    both = data.label_counts(ids, "train") + data.label_counts(ids, "val")
    assert np.array_equal(both, plain.label_counts(ids, "train"))
    assert len(data.block(ids, "val").y) == data.sizes(ids, "val").sum()


def test_a_temporal_split_leaves_the_overlap_out(tmp_path):
    write_store(tmp_path / "toy", _clients(), **FACTS | {"layout": replace(LAYOUT, overlap=1)})
    data = Store(tmp_path / "toy", split="temporal", test_share=0.4)
    ids, clients = np.arange(6), list(_clients())
    assert data.sizes(ids, "train").tolist() == [1, 2, 3, 3, 4, 4]
    assert data.sizes(ids, "test").tolist() == [1, 1, 1, 2, 2, 3]
    for client, rows in enumerate(clients):
        one = data.block(ids[[client]], "train").x, data.block(ids[[client]], "test").x
        assert np.array_equal(one[0], rows.x[: len(one[0])])
        assert np.array_equal(one[1], rows.x[len(one[0]) + 1 :])
    assert (
        data.report["rows_in_no_part"] == 6
        and "6 rows are in no part" in data.report["warnings"][0]
    )
    assert data.sizes(ids, "all").tolist() == [3, 4, 5, 6, 7, 8]


def test_columns_are_views_of_the_file(written):
    x, y = written[0]._columns[0]
    assert not x.flags.owndata and not x.flags.writeable and not y.flags.writeable


def test_histogram_takes_the_smallest_type(written):
    assert np.load(written[0].path / "labels.npy").dtype == np.uint8


def test_clients_of_one_row_are_left_out_and_named(tmp_path):
    lone = ClientRows("lone", np.zeros((1, 2, 3), np.uint8), np.array([0]), np.array([False]))
    write_store(tmp_path / "toy", [*_clients(), lone], **FACTS)
    data = Store(tmp_path / "toy")
    assert data.num_clients == 6 and data.dropped == ["lone"]
    with pytest.raises(InputError, match="none of the 1 users has 2 samples"):
        write_store(tmp_path / "none", [lone], **FACTS)
    assert [p.name for p in tmp_path.iterdir()] == ["toy"]


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    def broken():
        yield from _clients()
        raise InputError("the last user is wrong")

    with pytest.raises(InputError, match="last user"):
        write_store(tmp_path / "toy", broken(), **FACTS)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_failed_run_that_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing, "_sync", full)
    with pytest.raises(RunFailed, match=r"disk that holds .* is full"):
        write_store(tmp_path / "toy", _clients(), **FACTS)
    assert list(tmp_path.iterdir()) == []


def test_a_sound_store_that_is_there_already_stays(tmp_path):
    write_store(tmp_path / "toy", _clients(), **FACTS)
    write_store(tmp_path / "toy", _clients(count=2), **FACTS)
    assert Store(tmp_path / "toy").num_clients == 6


def test_damage_is_found(tmp_path):
    write_store(tmp_path / "toy", _clients(), **FACTS)
    file = tmp_path / "toy" / "offsets.npy"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"offsets\.npy has .* bytes, not"):
        Store(tmp_path / "toy")
    write_store(tmp_path / "toy", _clients(count=2), **FACTS)
    assert Store(tmp_path / "toy").num_clients == 2


def test_wrong_arguments_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="holds no prepared data"):
        Store(tmp_path)
    with pytest.raises(InputError, match="split='lief' is unknown; did you mean 'leaf'"):
        Store(tmp_path, split="lief")
    write_store(tmp_path / "toy", _clients(), **FACTS)
    manifest = json.loads((tmp_path / "toy" / "manifest.json").read_text())
    (tmp_path / "toy" / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    with pytest.raises(InputError, match="store version 0, needed is 2"):
        Store(tmp_path / "toy")


def test_leaf_split_needs_a_test_part(tmp_path):
    clients = [c._replace(from_test=np.zeros(len(c.y), bool)) for c in _clients()]
    write_store(tmp_path / "toy", clients, **FACTS)
    with pytest.raises(InputError, match="has no test part"):
        Store(tmp_path / "toy", split="leaf").sizes(np.array([0]), "train")
