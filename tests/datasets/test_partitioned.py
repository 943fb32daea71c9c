"""A pool dealt to clients is a federation: whole, deterministic, small when pickled."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest

from subfleet.core.errors import InputError
from subfleet.core.scaling import PIXELS
from subfleet.datasets import ClientRows, Federation, Store, write_store
from subfleet.datasets.federation import identity
from subfleet.datasets.partition import KINDS, total_variation
from subfleet.datasets.partitioned import Partitioned
from subfleet.datasets.reader import TEST_POOL, TRAIN_POOL, Layout

ROWS, TESTS, CLASSES = 3000, 600, 10
LAYOUT = Layout(num_classes=CLASSES, input_shape=(1, 2), scale=PIXELS, natural=False, spread=True)


def _rows(name, count, from_test, seed):
    """Rows whose two bytes are their number."""
    x = np.arange(count, dtype=np.uint16).view(np.uint8).reshape(count, 1, 2)
    y = np.random.default_rng(seed).permutation(np.arange(count) % CLASSES)
    return ClientRows(name, x, y, np.full(count, from_test))


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "toy"
    clients = [_rows(TEST_POOL, TESTS, True, 1), _rows(TRAIN_POOL, ROWS, False, 0)]
    write_store(path, clients, name="toy", layout=LAYOUT, source={})
    return Store(path)


def numbers(block):
    return np.ascontiguousarray(block.x.reshape(len(block.x), 2)).view(np.uint16).reshape(-1)


EVERYONE = np.arange(50)


@pytest.mark.parametrize("split", ["seeded", "official"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_share_no_row_and_cover_the_pool(pool, kind, split):
    data = Partitioned(pool, 3, kind=kind, clients=50, split=split, val_share=0.1)
    assert isinstance(data, Federation)
    assert (data.name, data.num_clients, data.num_classes) == ("toy", 50, CLASSES)
    assert (data.input_shape, data.scale) == ((1, 2), PIXELS)
    blocks = {part: data.block(EVERYONE, part) for part in ("train", "val", "test", "all")}
    seen = {part: numbers(block) for part, block in blocks.items()}
    own = ["train", "val"] if split == "official" else ["train", "val", "test"]
    held = np.concatenate([seen[part] for part in own])
    assert np.array_equal(np.sort(held), np.arange(ROWS))
    if split == "official":
        assert np.array_equal(np.sort(seen["test"]), np.arange(TESTS))
    assert len(seen["all"]) == sum(len(seen[part]) for part in ("train", "val", "test"))
    for part, block in blocks.items():
        assert np.array_equal(np.diff(block.offsets), data.sizes(EVERYONE, part))
        per_client = np.split(block.y, block.offsets[1:-1])
        counts = np.stack([np.bincount(y, minlength=CLASSES) for y in per_client])
        assert np.array_equal(counts, data.label_counts(EVERYONE, part))
    assert blocks["train"].y[0] == _rows("", ROWS, False, 0).y[seen["train"][0]]


def test_clients_come_in_the_order_asked_for(pool):
    data = Partitioned(pool, clients=50)
    both, one = data.block(np.array([7, 2]), "train"), data.block(np.array([2]), "train")
    assert np.array_equal(both.x[both.offsets[1] :], one.x)
    with pytest.raises(InputError, match=r"client 50 is outside 0\.\.49"):
        data.sizes(np.array([50]), "train")


def test_it_pickles_small_and_comes_back_the_same(pool):
    data = Partitioned(pool, 4, kind="dirichlet", clients=50, alpha=0.2, split="official")
    before = data.block(EVERYONE, "test")
    text = pickle.dumps(data)
    assert len(text) < 1000
    after = pickle.loads(text)
    assert np.array_equal(after.block(EVERYONE, "test").x, before.x)
    assert identity(after) == identity(data) == json.loads(json.dumps(identity(data)))


def test_every_parameter_that_counts_tells_data_apart(pool):
    data = Partitioned(pool, kind="pathological", clients=50)
    same = replace(data, alpha=0.7)  # pathological partitions have no alpha
    assert same.fingerprint == data.fingerprint
    for change in (
        {"seed": 1},
        {"clients": 40},
        {"kind": "shards"},
        {"classes_per_client": 3},
        {"form": "random"},
        {"split": "official"},
        {"test_share": 0.3},
        {"val_share": 0.1},
        {"pool": Store(pool.path, split="seeded")},
    ):
        differs = replace(data, **change).fingerprint != data.fingerprint
        assert differs == ("pool" not in change)


def test_the_official_test_part_is_distributed_as_the_train_part(pool):
    data = Partitioned(pool, kind="dirichlet", clients=10, alpha=0.5, split="official")
    ids = np.arange(10)
    tested = data.label_counts(ids, "test")
    apart = total_variation(data.label_counts(ids, "train"), tested)
    assert apart[tested.sum(axis=1) >= 20].mean() < 0.1


def test_the_report_says_what_was_moved_and_left_out(pool):
    data = Partitioned(pool, kind="dirichlet", clients=100, alpha=0.01)
    report = json.loads(json.dumps(data.report))
    assert report["partition"]["kind"] == "dirichlet" and report["partition"]["moved"] > 0
    assert report["left_out"] == {
        "the publisher's test rows, which split='official' would deal": TESTS
    }
    assert "clients had fewer than 10 rows after 10 draws" in report["warnings"][0]
    assert f"{TESTS} rows are left out" in report["warnings"][1]
    few = Partitioned(pool, kind="pathological", form="pfedme", clients=3, split="official")
    assert few.report["left_out"]["class 9 has no holder"] == ROWS // CLASSES
    assert few.report["left_out"]["class 9 has no train rows"] == TESTS // CLASSES


def test_wrong_options_are_input_errors(pool, tmp_path):
    for options, message in (
        ({"kind": "dirichlett"}, "did you mean 'dirichlet'"),
        ({"split": "offical"}, "did you mean 'official'"),
        ({"clients": 0}, "clients=0"),
        ({"test_share": 1.0}, "test_share=1.0"),
    ):
        with pytest.raises(InputError, match=message):
            Partitioned(pool, **options)
    with pytest.raises(InputError, match="clients=3001 are more than the 3000 rows"):
        Partitioned(pool, clients=3001).sizes(np.array([0]), "train")
    clients = [_rows(TRAIN_POOL, 100, False, 0)]
    write_store(tmp_path / "toy", clients, name="toy", layout=LAYOUT, source={})
    with pytest.raises(InputError, match="toy has no test rows"):
        Partitioned(Store(tmp_path / "toy"), clients=5, split="official").sizes(
            np.array([0]), "test"
        )
