"""Pickles of data are read, of every protocol; anything that could run is refused."""

import builtins
import codecs
import io
import mmap
import os
import pickle
import subprocess
import time

import numpy as np
import pytest

from subfleet.datasets.pickles import BadPickle, load_pickle, map_file

LARGE = np.arange(3 << 20, dtype=np.uint8).reshape(-1, 3072)
DATA = {
    "data": LARGE,
    "labels": [1, 2],
    "names": ("a", b"b", b"", "ü"),
    "set": {1, 2},
    "big endian": np.array([1, 2], ">i4"),
    "both": [np.array([3, 4], "<i4"), np.array([5], ">i4")],
    "columns": np.asfortranarray(LARGE[:3, :4]),
    "empty": np.zeros((0, 3)),
    "number": np.float32(2.5),
    "deep": {"x": [None, True, 1.5, 10**30]},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_data_of_any_protocol(protocol):
    found = load_pickle(pickle.dumps(DATA, protocol), "a")
    assert found.keys() == DATA.keys()
    for key in ("data", "big endian", "columns", "empty", "number"):
        np.testing.assert_array_equal(found[key], DATA[key])
        assert found[key].dtype == DATA[key].dtype
    for key in ("labels", "names", "set", "deep"):
        assert found[key] == DATA[key]
    assert [a.tolist() for a in found["both"]] == [[3, 4], [5]]


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_large_arrays_are_views_of_the_mapped_file(tmp_path, protocol):
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps({"data": LARGE, "after": 7}, protocol))
    mapped = map_file(file)
    assert isinstance(mapped, mmap.mmap)
    found = load_pickle(mapped, file)
    assert np.shares_memory(found["data"], np.frombuffer(mapped, np.uint8))
    assert not found["data"].flags.writeable and found["after"] == 7
    np.testing.assert_array_equal(found["data"], LARGE)


def python_2(rows):
    """A batch as Python 2's cPickle wrote it: protocol 2, byte strings, the array's among them."""

    def string(data):
        return b"U" + bytes([len(data)]) + data if len(data) < 256 else long(data)

    def long(data):
        return b"T" + len(data).to_bytes(4, "little") + data

    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x02K\x00\x85"
    array += (
        string(b"b")
        + b"\x87Rq\x03(K\x01"
        + b"J%bJ%b\x86" % tuple(n.to_bytes(4, "little") for n in rows.shape)
    )
    array += b"cnumpy\ndtype\nq\x04" + string(b"u1") + b"K\x00K\x01\x87Rq\x05"
    array += b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array += b"\x89" + long(rows.tobytes()) + b"tb"
    labels = b"".join(b"K%c" % n for n in range(len(rows)))
    return (
        b"\x80\x02}q\x00(" + string(b"data") + array + string(b"labels") + b"](" + labels + b"eu."
    )


def test_python_2_byte_strings():
    rows = np.array([[1, 2, 255], [128, 0, 10]], np.uint8)
    found = load_pickle(python_2(rows), "a")
    assert found["labels"] == [0, 1]
    np.testing.assert_array_equal(found["data"], rows)
    theirs = pickle.loads(python_2(rows), encoding="latin1")
    np.testing.assert_array_equal(theirs["data"], rows)


class _Calls:
    def __init__(self, called, *args):
        self.reduced = called, args

    def __reduce__(self):
        return self.reduced


FORBIDDEN = {
    "system": (os.system, "touch {file}"),
    "eval": (builtins.eval, "open({file!r}, 'w')"),
    "getattr": (getattr, {}, "keys"),
    "Popen": (subprocess.Popen, ["touch", "{file}"]),
    "open": (io.open, "{file}", "w"),
    "bytes": (bytes, 10**12),
    "bytearray": (bytearray, 10**12),
    "encode": (codecs.encode, b"", "zip"),
    "ndarray": (np.ndarray, (10**9,)),
    "load": (np.load, "{file}"),
}


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("called", FORBIDDEN)
def test_what_is_not_data_is_refused(tmp_path, called, protocol):
    file = tmp_path / "made by a pickle"
    function, *args = FORBIDDEN[called]
    args = [a.format(file=str(file)) if isinstance(a, str) else a for a in args]
    data = pickle.dumps({"data": [1, _Calls(function, *args)]}, protocol)
    with pytest.raises(BadPickle, match=r"a\.pkl"):
        load_pickle(data, "a.pkl")
    assert not file.exists()


def test_the_forbidden_name_and_the_file_are_told():
    with pytest.raises(BadPickle, match=r"x/a\.pkl asks for '(posix|nt)\.system'") as caught:
        load_pickle(pickle.dumps(_Calls(os.system, "true")), "x/a.pkl")
    assert caught.value.kind == "forbidden pickle"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(pickle.dumps(np.array([1, "a"], object)), id="objects"),
        pytest.param(pickle.dumps(np.zeros(2, "i4,f4")), id="records"),
        pytest.param(pickle.dumps(np.ma.zeros(2)), id="subclass"),
        pytest.param(b"(ios\nsystem\n.", id="INST"),
        pytest.param(b"(S'true'\nios\nsystem\n.", id="INST with arguments"),
        pytest.param(b"\x80\x02]}b.", id="state for a list"),
        pytest.param(b"\x80\x02cnumpy\ndtype\n}b.", id="state for a function"),
        pytest.param(b"\x80\x02]\x85)R.", id="call of a tuple"),
    ],
)
def test_tricks_are_refused(data):
    with pytest.raises(BadPickle) as caught:
        load_pickle(data, "a")
    assert caught.value.kind == "forbidden pickle"


@pytest.mark.parametrize("data", [b"\x82\x01.", b"\x80\x02P1\n.", b"Pa\n.", b"\x80\x05\x97."])
def test_registries_and_outside_objects_are_refused(data):
    with pytest.raises(BadPickle):
        load_pickle(data, "a")


def test_large_arrays_of_python_2_are_views(tmp_path):
    rows = np.arange(200 * 6000, dtype=np.uint8).reshape(200, 6000)
    (tmp_path / "a").write_bytes(python_2(rows))
    mapped = map_file(tmp_path / "a")
    found = load_pickle(mapped, "a")["data"]
    assert np.shares_memory(found, np.frombuffer(mapped, np.uint8))
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_cut_pickle_is_told_at_any_length(protocol):
    small = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), "labels": [1, 2]}
    for whole in (pickle.dumps(small, protocol), python_2(small["data"])):
        for length in range(len(whole)):
            with pytest.raises(BadPickle):
                load_pickle(whole[:length], "a")


def test_a_cut_large_array_is_told(tmp_path):
    whole = pickle.dumps({"data": LARGE}, 4)
    for keep in (0, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a").write_bytes(whole[:keep])
        with pytest.raises(BadPickle, match="cut short") as caught:
            load_pickle(map_file(tmp_path / "a"), tmp_path / "a")
        assert caught.value.kind == "cut file"


def test_an_array_of_other_size_than_its_bytes_is_refused():
    data = pickle.dumps(np.arange(6, dtype=np.uint8), 2).replace(b"K\x06\x85", b"K\x07\x85")
    with pytest.raises(BadPickle, match="shape"):
        load_pickle(data, "a")


def test_damaged_bytes_never_do_anything_else():
    whole = bytearray(pickle.dumps({"data": np.arange(6, dtype=np.uint8), "labels": [1]}, 2))
    for place in range(len(whole)):
        for value in (0, ord("."), ord("R"), ord("b"), ord("c"), 0x81, 0xFF):
            damaged = bytes([*whole[:place], value, *whole[place + 1 :]])
            try:
                found = load_pickle(damaged, "a")
            except BadPickle:
                continue
            assert is_plain(found), f"byte {place} as {value}: {found!r}"


def is_plain(value) -> bool:
    """Whether it is made of data alone."""
    if isinstance(value, dict):
        return all(map(is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(is_plain, value))
    if isinstance(value, np.ndarray):
        return not value.dtype.hasobject
    data = bool | int | float | complex | str | bytes | np.generic | np.dtype
    return value is None or isinstance(value, data)


def test_many_arrays_take_time_in_proportion_to_their_number():
    def seconds(number):
        data = pickle.dumps([np.full(1, n % 256, np.uint8) for n in range(number)], 2)
        start = time.process_time()
        found = load_pickle(data, "a")
        taken = time.process_time() - start
        assert [array[0] for array in found[:: number // 3]] == [
            n % 256 for n in range(number)[:: number // 3]
        ]
        return taken

    # Twelve times as many take some twelve times as long, not a hundred and more.
    assert seconds(12_000) < 50 * max(seconds(1_000), 0.002)


def test_what_was_memoized_before_its_state_came_is_whole_afterwards():
    array = np.arange(3, dtype=np.uint8)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        first, second, kind = load_pickle(pickle.dumps([array, array, array.dtype], protocol), "a")
        assert first is second and kind == np.uint8
        np.testing.assert_array_equal(first, array)
