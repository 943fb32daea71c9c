"""LEAF's FEMNIST: the real sample, and every way in which input can be wrong."""

import copy
import gzip
import json
import os
import time

import numpy as np
import pytest

from subfleet.core.errors import InputError
from subfleet.datasets import Store
from subfleet.datasets.femnist import Femnist
from subfleet.datasets.published import cache_folder, open_set
from subfleet.datasets.reader import Faults

IMAGE = [1.0] * 392 + [0.0] * 391 + [3 / 255]
GOOD = {
    "users": ["b", "a"],
    "num_samples": [3, 2],
    "user_data": {
        "a": {"x": [IMAGE, IMAGE[::-1]], "y": [0, 61]},
        "b": {"x": [IMAGE, IMAGE[::-1], [0.5] * 784], "y": [3, 4, 5]},
    },
}


def read(source, faults=None):
    """(client, is of the test part) of all files of `source`."""
    faults = faults or Faults()
    reader = Femnist()
    return [
        (client, shard.from_test)
        for shard in reader.shards(source)
        for client in reader.read(shard, faults)
    ]


def test_the_reader_on_the_real_sample(real_data):
    clients = read(real_data / "femnist")
    parts = {part: [c for c, is_test in clients if is_test == part] for part in (False, True)}
    sizes = {part: np.array([len(client.y) for client in parts[part]]) for part in parts}
    assert [len({client.name for client in parts[part]}) for part in parts] == [89, 89]
    assert (sizes[False].sum(), sizes[True].sum()) == (12_441, 1_425)
    assert (round(sizes[False].mean(), 2), round(sizes[False].std(), 2)) == (139.79, 32.74)
    x = np.concatenate([client.x for client, _ in clients])
    assert x.dtype == np.uint8 and x.shape[1:] == (1, 28, 28) and np.median(x) == 255
    assert all(client.from_test.all() == is_test for client, is_test in clients)
    layout = Femnist().layout(real_data)
    assert (layout.num_classes, layout.natural, layout.spread) == (62, True, False)


def opened(source, cache, **options) -> Store:
    """FEMNIST as `[data]` opens it."""
    data = open_set(Femnist(), str(source), cache=str(cache), **options)
    assert isinstance(data, Store)
    return data


@pytest.fixture(scope="module")
def sample(real_data, tmp_path_factory):
    return real_data / "femnist", tmp_path_factory.mktemp("cache")


def test_the_real_sample(sample):
    data = opened(*sample)
    ids = np.arange(data.num_clients)
    block = data.block(ids, "all")
    assert (data.num_clients, data.num_classes, len(block.y)) == (89, 62, 12_441 + 1_425)
    assert len(np.unique(block.y)) == 62 and data.dropped == []
    assert block.x.dtype == np.uint8 and np.median(block.x) == 255
    assert data.client_names == sorted(data.client_names)
    sizes = data.sizes(ids, "all")
    assert (sizes.min(), sizes.max()) == (5, 184) and abs(sizes.std() - 36.40) < 0.005


@pytest.mark.parametrize("split", ["seeded", "leaf"])
def test_repeats_in_the_real_sample_stay_on_one_side(sample, split):
    data = opened(*sample, split=split)
    repeated = 0
    for client in range(data.num_clients):
        train, test = (data.block(np.array([client]), part) for part in ("train", "test"))
        seen = {row.tobytes() for row in train.x}
        assert not any(row.tobytes() in seen for row in test.x)
        assert len(train.y) >= 1 and len(test.y) >= 1
        repeated += len(train.y) - len(seen)
    # The sample's notes count 68 repeats in the train part and 20 across the parts.
    assert repeated > 50
    total = data.sizes(np.arange(89), "test").sum()
    assert total == 2808 if split == "seeded" else 1400 < total <= 1_425 - 20 + 5


def test_the_second_opening_takes_milliseconds(sample):
    opened(*sample)
    calls = []
    start = time.perf_counter()
    opened(*sample, progress=lambda *call: calls.append(call))
    assert time.perf_counter() - start < 0.2 and calls == []


def _write(folder, data, name="all_data_0.json"):
    folder.mkdir(parents=True, exist_ok=True)
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)


@pytest.fixture
def place(tmp_path):
    """(source folder, cache folder)"""
    return tmp_path / "source", tmp_path / "cache"


@pytest.mark.parametrize("name", ["all_data_0.json", "all_data_0.json.gz"])
def test_a_folder_of_files_and_exact_pixels(place, name):
    _write(place[0], GOOD, name)
    data = opened(*place)
    assert data.client_names == ["a", "b"]
    block = data.block(np.array([0]), "all")
    assert block.y.tolist() == [0, 61]
    assert block.x[0].reshape(-1)[[0, 391, 392, 783]].tolist() == [255, 255, 0, 3]


def test_train_and_test_files_are_joined(place):
    test = {"users": ["a", "c"], "user_data": {"a": {"x": [[0.2] * 784], "y": [7]}}}
    test["user_data"]["c"] = {"x": [IMAGE], "y": [1]}
    _write(place[0] / "train", GOOD)
    _write(place[0] / "test", test)
    calls = []
    data = opened(*place, split="leaf", progress=lambda *call: calls.append(call))
    assert data.client_names == ["a", "b"] and data.dropped == ["c"]
    assert data.block(np.array([0]), "test").y.tolist() == [7]
    assert calls[0] == ("read", 0, 2) and calls[-1] == ("write", 3, 3)


def test_test_files_beside_train_files_are_told_by_their_names(place):
    _write(place[0], GOOD, "x_train_9.json")
    _write(
        place[0],
        {"users": ["a"], "user_data": {"a": {"x": [[0.2] * 784], "y": [7]}}},
        "x_test_9.json",
    )
    assert opened(*place, split="leaf").block(np.array([0]), "test").y.tolist() == [7]


def test_a_changed_source_is_read_again(place):
    _write(place[0], GOOD)
    assert opened(*place).num_clients == 2
    less = copy.deepcopy(GOOD)
    less["users"] = ["b"]
    _write(place[0], less)
    assert opened(*place).num_clients == 1


def test_a_damaged_cache_is_made_again(place):
    _write(place[0], GOOD)
    path = opened(*place).path
    os.truncate(path / "rows.arrow", 100)
    assert opened(*place).block(np.array([0]), "all").y.tolist() == [0, 61]


def test_the_cache_folder_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBFLEET_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SUBFLEET_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "subfleet")


def _changed(change):
    data = copy.deepcopy(GOOD)
    change(data)
    return data


def _set(user, key, index, value):
    def change(data):
        data["user_data"][user][key][index] = value

    return _changed(change)


BAD = {
    "label 62": (_set("b", "y", 2, 62), r"user 'b', sample 2 has label 62, .*0\.\.61"),
    "label -1": (_set("b", "y", 0, -1), r"user 'b', sample 0 has label -1"),
    "label 1.5": (_set("b", "y", 0, 1.5), r"has label 1\.5, not an integer"),
    "label text": (_set("b", "y", 0, "7"), r"has label '7', not an integer"),
    "783 pixels": (_set("a", "x", 1, [1.0] * 783), "user 'a', sample 1 has 783 pixels, not 784"),
    "no pixels": (_set("a", "x", 1, 5), "sample 1 has no pixels"),
    "NaN": (_set("a", "x", 0, [float("nan")] * 784), "sample 0, pixel 0 is nan, outside"),
    "above 1": (_set("a", "x", 1, [1.0] * 783 + [255.0]), r"pixel 783 is 255\.0, outside \[0, 1\]"),
    "text": (_set("a", "x", 1, ["dark"] * 784), "pixel that is no number"),
    "truth": (_set("a", "x", 1, [1.0] * 783 + [True]), r"no number \(True at 783\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_faults(place, case):
    content, message = BAD[case]
    _write(place[0], content)
    with pytest.raises(InputError, match=message):
        read(place[0])
    faults = Faults(skip=True)
    clients = {client.name: client for client, _ in read(place[0], faults)}
    kind = "unknown label" if "label" in case else "wrong image"
    assert faults.counts == {kind: 1}
    assert sum(len(client.y) for client in clients.values()) == 4
    assert all(
        len(client.x) == len(client.y) == len(client.from_test) for client in clients.values()
    )


def test_the_right_rows_are_left_out(place):
    data = _set("b", "y", 0, 99)
    data["user_data"]["b"]["x"][1] = [2.0] * 784
    _write(place[0], data)
    clients = {client.name: client for client, _ in read(place[0], Faults(skip=True))}
    assert clients["b"].y.tolist() == [5] and clients["b"].x.min() == 128


def test_a_user_without_a_sound_row_is_left_out(place):
    data = _set("a", "y", 0, 99)
    data["user_data"]["a"]["y"][1] = 99
    _write(place[0], data)
    assert [client.name for client, _ in read(place[0], Faults(skip=True))] == ["b"]


BAD_FILES = {
    "cut": (json.dumps(GOOD).encode()[:900], r"all_data_0\.json is no whole JSON .* cut short"),
    "no users": ({"users": [], "user_data": {}}, "has no rows that can be used"),
    "empty": (
        _changed(lambda d: d["user_data"].update(b={"x": [], "y": []})),
        "user 'b' has no samples",
    ),
    "lengths": (
        _changed(lambda d: d["user_data"]["a"]["y"].pop()),
        "user 'a' has 2 samples in x but 1 labels in y",
    ),
    "label 62": BAD["label 62"],
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_input_errors_and_leave_nothing(place, case):
    content, message = BAD_FILES[case]
    _write(place[0], content)
    with pytest.raises(InputError, match=message):
        opened(*place)
    assert not place[1].exists() or list(place[1].iterdir()) == []


def test_a_user_twice_in_one_part_is_an_input_error(place):
    _write(place[0] / "train", GOOD, "0.json")
    _write(place[0] / "train", GOOD, "1.json")
    with pytest.raises(InputError, match=r"user '[ab]' is in .*0\.json and again in .*1\.json"):
        opened(*place)


def test_wrong_folders_are_input_errors(place):
    with pytest.raises(InputError, match=r"data.source = .* does not exist"):
        opened(*place)
    place[0].mkdir()
    with pytest.raises(InputError, match=r"has no \.json"):
        opened(*place)


def test_a_cache_that_cannot_be_written_is_an_input_error(place, tmp_path):
    _write(place[0], GOOD)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match=r"cannot be written .* SUBFLEET_CACHE"):
        opened(place[0], blocked)
