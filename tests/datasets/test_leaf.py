"""LEAF's JSON: files found, users decoded one by one, every way in which a file can be wrong."""

import gzip
import json
import tracemalloc

import pytest

from subfleet.core.errors import InputError
from subfleet.datasets import leaf
from subfleet.datasets.reader import Faults

GOOD = {
    "users": ["b", "a"],
    "num_samples": [1, 2],
    "user_data": {"a": {"x": ["p", "q"], "y": [0, 1]}, "b": {"x": ["r"], "y": [1]}},
}


@pytest.fixture
def read(tmp_path):
    """Writes a value, a text or bytes as a LEAF file, and reads its users."""

    def read(content, faults=None, name="all.json"):
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        data = text.encode() if isinstance(text, str) else text
        (tmp_path / name).write_bytes(data)
        return list(leaf.read_users(tmp_path / name, faults or Faults()))

    return read


def _with(**changes):
    return GOOD | {"user_data": GOOD["user_data"] | changes}


def test_users_come_in_the_order_of_their_data(read):
    users = read(GOOD)
    assert [(user.name, user.x, user.y) for user in users] == [
        ("a", ["p", "q"], [0, 1]),
        ("b", ["r"], [1]),
    ]
    assert users[0].where.endswith("all.json: user 'a'")


def test_the_order_of_keys_white_space_and_a_byte_order_mark_do_not_matter(read):
    turned = {key: GOOD[key] for key in ("user_data", "num_samples", "users")}
    expected = read(GOOD)
    assert read(json.dumps(turned, indent=2)) == expected
    assert read("\ufeff \n" + json.dumps(GOOD) + "\n ") == expected
    assert read(GOOD | {"hierarchies": ["play"], "version": 12}) == expected
    packed = gzip.compress(json.dumps(GOOD).encode())
    assert [user.name for user in read(packed, name="all.json.gz")] == ["a", "b"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
def test_values_may_end_anywhere_in_what_is_read_at_a_time(read, monkeypatch, chunk):
    monkeypatch.setattr(leaf, "_CHUNK", chunk)
    data = {"version": 123456, **GOOD, "last": 1.25}
    assert read(data) == read(GOOD)
    with pytest.raises(InputError, match="cut short"):
        read(json.dumps(data)[:-3])


def test_only_listed_users_are_read(read):
    assert [user.name for user in read(GOOD | {"users": ["a"]})] == ["a"]


def test_memory_holds_one_user_not_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(leaf, "_CHUNK", 1 << 16)
    rows = {"x": [[0.125] * 500] * 10, "y": [0] * 10}
    users = [str(number) for number in range(60)]
    text = json.dumps({"users": users, "user_data": {user: rows for user in users}})
    (tmp_path / "all.json").write_text(text)
    tracemalloc.start()
    assert sum(len(user.y) for user in leaf.read_users(tmp_path / "all.json", Faults())) == 600
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) > 2e6 and peak < 1e6


BAD = {
    "cut": (json.dumps(GOOD)[:90], "damaged file", r"all\.json is no whole JSON .* cut short"),
    "no json": ("hello", "damaged file", "no whole JSON"),
    "nothing": ("", "damaged file", "no whole JSON"),
    "more after it": (json.dumps(GOOD) + "{}", "damaged file", "something follows the object"),
    "no comma": ('{"users": [] "user_data": {}}', "damaged file", "a comma is missing"),
    "no colon": ('{"users" []}', "damaged file", "a colon is missing"),
    "no key": ('{"users": [], 3: 4}', "damaged file", "a key is missing"),
    "not UTF-8": (b'{"users": ["\xff"]}', "damaged file", "cannot be decoded"),
    "deep": ('{"users": ' + "[" * 10_000_000, "damaged file", "cannot be decoded|no whole JSON"),
    "a list": ([1, 2], "damaged file", "holds a list, not LEAF's object"),
    "no user_data": ({"users": ["a"]}, "damaged file", "lacks LEAF's 'users'"),
    "user_data a list": ({"users": ["a"], "user_data": []}, "damaged file", "lacks LEAF's"),
    "no users": ({"user_data": GOOD["user_data"]}, "damaged file", "lacks LEAF's 'users'"),
    "a number": (GOOD | {"users": ["a", "b", 7]}, "wrong name", "user 7 is no string"),
    "twice": (GOOD | {"users": ["b", "a", "a"]}, "duplicate user", "user 'a' is listed twice"),
    "missing": (
        GOOD | {"users": ["b", "a", "c"]},
        "user without data",
        "user 'c' is in 'users' but not in 'user_data'",
    ),
    "no x": (_with(b={"y": [1]}), "user without data", "user 'b' has no lists 'x' and 'y'"),
    "lengths": (
        _with(b={"x": ["r", "s"], "y": [1]}),
        "unequal x and y",
        "user 'b' has 2 samples in x but 1 labels in y",
    ),
    "empty": (_with(b={"x": [], "y": []}), "empty user", "user 'b' has no samples"),
    "given twice": (
        '{"users": ["a"], "user_data": {"a": {"x": [1], "y": [1]}, "a": {"x": [2], "y": [2]}}}',
        "duplicate user",
        "user 'a' is twice in 'user_data'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_fault_names_file_and_user_or_is_counted(read, case):
    content, kind, message = BAD[case]
    with pytest.raises(InputError, match=message):
        read(content)
    faults = Faults(skip=True)
    read(content, faults)
    assert faults.counts == {kind: 1}


def test_users_before_a_cut_are_kept(read):
    faults = Faults(skip=True)
    text = json.dumps(GOOD)
    assert [user.name for user in read(text[: text.index('"b": {')], faults)] == ["a"]
    assert faults.counts == {"damaged file": 1}


def test_a_cut_or_false_gz_is_a_fault(read):
    packed = gzip.compress(json.dumps(GOOD).encode())
    for content in (packed[: len(packed) // 2], b"no gzip at all"):
        with pytest.raises(InputError, match=r"a\.json\.gz cannot be decoded .* cut short"):
            read(content, name="a.json.gz")


def test_labels_are_checked_one_by_one(read):
    (user,) = read({"users": ["a"], "user_data": {"a": {"x": [1] * 4, "y": [1, "1", True, 0]}}})
    faults = Faults(skip=True)
    y, sound = leaf.labels_of(user, leaf.integer_below(2), "0 or 1", faults)
    assert y[sound].tolist() == [1, 0] and sound.tolist() == [True, False, False, True]
    assert faults.counts == {"unknown label": 2}
    with pytest.raises(InputError, match="user 'a', sample 1 has label '1', not 0 or 1"):
        leaf.labels_of(user, leaf.integer_below(2), "0 or 1", Faults())


def test_shards_are_the_files_of_either_part(tmp_path):
    for name in ("train/1.json", "train/0.json.gz", "test/0.json", "notes.txt", "x_test_9.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = [(shard.name, shard.from_test) for shard in leaf.shards(tmp_path)]
    assert found == [("train/0.json.gz", False), ("train/1.json", False), ("test/0.json", True)]
    for folder in ("train", "test"):
        for file in (tmp_path / folder).iterdir():
            file.unlink()
    assert [(s.name, s.from_test) for s in leaf.shards(tmp_path)] == [("x_test_9.json", True)]
    assert leaf.shards(tmp_path / "x_test_9.json")[0].path == tmp_path / "x_test_9.json"


def test_a_folder_without_files_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"has no \.json"):
        leaf.shards(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        leaf.shards(tmp_path / "nowhere")


@pytest.mark.parametrize("digits", [4_300, 5_000])
def test_an_integer_of_thousands_of_digits_is_damage(read, digits):
    text = json.dumps(_with()).replace("[0, 1]", f"[0, {'9' * digits}]")
    if digits == 4_300:  # as long as Python still converts
        assert [user.name for user in read(text)] == ["a", "b"]
        return
    with pytest.raises(InputError, match=r"all\.json cannot be decoded .*digits"):
        read(text)
    faults = Faults(skip=True)
    assert read(text, faults) == [] and faults.counts == {"damaged file": 1}
