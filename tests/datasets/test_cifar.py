"""CIFAR-10 and CIFAR-100: real samples, archives, and every way in which a batch can be wrong."""

import hashlib
import io
import os
import pickle
import tarfile
import warnings

import numpy as np
import pytest

from subfleet.core.errors import InputError
from subfleet.core.scaling import SIGNED
from subfleet.datasets.cifar import FILES_10, FILES_100, Cifar10, Cifar100
from subfleet.datasets.reader import Faults, Reader

pytestmark = pytest.mark.filterwarnings("ignore:.*MD5 sum is", "ignore:.* lacks ")


def read(reader: Reader, source, faults=None):
    """(x, y, from_test) of all shards, in their order."""
    faults = faults or Faults()
    rows = [row for shard in reader.shards(source) for row in reader.read(shard, faults)]
    shape = (0, *reader.layout(source).input_shape)
    x = np.concatenate([np.empty(shape, np.uint8), *(row.x for row in rows)])
    y = np.concatenate([np.empty(0, np.int64), *(row.y for row in rows)])
    assert all(row.name == ("test" if row.from_test.all() else "train") for row in rows)
    return x, y, np.concatenate([np.empty(0, bool), *(row.from_test for row in rows)])


def test_the_real_sample_of_cifar10(real_data):
    with pytest.warns(UserWarning, match=r"lacks data_batch_5"):
        x, y, from_test = read(Cifar10(), real_data / "cifar10")
    assert (len(y), from_test.sum()) == (7_319 + 1_017, 1_017)
    assert x.shape == (8_336, 3, 32, 32) and x.dtype == np.uint8
    full = np.load(real_data / "cifar10" / "labels_full.npz")
    np.testing.assert_array_equal(y[:4_000], full["train_labels"][:4_000])
    np.testing.assert_array_equal(y[from_test], full["test_labels"][:1_017])


@pytest.mark.parametrize("coarse", [False, True])
def test_the_real_sample_of_cifar100(real_data, coarse):
    reader = Cifar100(coarse)
    with pytest.warns(UserWarning, match="MD5 sum is"):
        _, y, from_test = read(reader, real_data / "cifar100")
    assert (len(y), from_test.sum()) == (1_800, 800)
    classes = reader.layout(real_data / "cifar100").num_classes
    assert len(np.unique(y)) == classes == (20 if coarse else 100)
    full = np.load(real_data / "cifar100" / "labels_full.npz")
    name = f"train_{'coarse' if coarse else 'fine'}_labels"
    np.testing.assert_array_equal(y[:1_000], full[name][:1_000])


def test_the_sums_are_those_that_torchvision_publishes():
    from torchvision.datasets import CIFAR10, CIFAR100

    for files, theirs in ((FILES_10, CIFAR10), (FILES_100, CIFAR100)):
        assert files.train == dict(theirs.train_list) and files.test == dict(theirs.test_list)
        assert files.folder == theirs.base_folder


X = np.arange(3 * 3072, dtype=np.uint8).reshape(3, 3072)
GOOD = {"data": X, "labels": [0, 9, 3], "batch_label": "a batch", "filenames": ["a", "b", "c"]}


def write(folder, batches):
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in batches.items():
        data = batch if isinstance(batch, bytes) else pickle.dumps(batch, 2)
        (folder / name).write_bytes(data)
    return folder


def test_layout_and_pixels(tmp_path):
    write(tmp_path, {"data_batch_2": GOOD, "test_batch": GOOD})
    layout = Cifar10().layout(tmp_path)
    assert (layout.num_classes, layout.input_shape, layout.scale) == (10, (3, 32, 32), SIGNED)
    assert layout.spread and not layout.natural and layout.dtype == "uint8"
    x, y, from_test = read(Cifar10(), tmp_path)
    assert y.tolist() == [0, 9, 3] * 2 and from_test.tolist() == [False] * 3 + [True] * 3
    # The second image's green plane, its second row, third pixel.
    assert x[1, 1, 1, 2] == X[1, 1024 + 32 + 2]


def test_a_folder_its_parent_and_the_archive_hold_the_same(tmp_path):
    inner = write(tmp_path / "cifar-10-batches-py", {"data_batch_1": GOOD, "test_batch": GOOD})
    (tmp_path / "elsewhere").mkdir()
    archive = tmp_path / "elsewhere" / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as out:
        out.add(inner, "cifar-10-batches-py")
    names = [shard.name for shard in Cifar10().shards(tmp_path)]
    assert names == ["data_batch_1", "test_batch"]
    first = read(Cifar10(), tmp_path)
    for source in (inner, archive, archive.parent):
        assert [shard.name for shard in Cifar10().shards(source)] == names
        for ours, theirs in zip(read(Cifar10(), source), first, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_an_archive_with_paths_outside_is_refused(tmp_path):
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as out:
        member = tarfile.TarInfo("../cifar-10-batches-py/data_batch_1")
        out.addfile(member, io.BytesIO())
    with pytest.raises(InputError, match="path outside its folder"):
        Cifar10().shards(tmp_path)


def test_no_batches_and_missing_ones(tmp_path):
    for source in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="no batch of cifar-10-batches-py"):
            Cifar10().shards(source)
    write(tmp_path, {"train": GOOD})
    with pytest.raises(InputError, match="no batch"):
        Cifar10().shards(tmp_path)
    with pytest.warns(UserWarning, match="lacks test; the rest is read"):
        assert len(Cifar100().shards(tmp_path)) == 1


def test_a_wrong_sum_is_warned_of_or_refused(tmp_path):
    write(tmp_path, {"data_batch_1": GOOD})
    with pytest.warns(UserWarning, match="MD5 sum is .*not the published c99cafc1"):
        assert len(read(Cifar10(), tmp_path)[1]) == 3
    with pytest.raises(InputError, match=r"data_batch_1: its MD5 sum .*--skip-bad"):
        read(Cifar10(check=True), tmp_path)
    faults = Faults(skip=True)
    assert len(read(Cifar10(check=True), tmp_path, faults)[1]) == 0
    assert faults.counts == {"wrong sum": 1}


def test_a_right_sum_is_silent(tmp_path, monkeypatch):
    write(tmp_path, {name: GOOD for name in [*FILES_10.train, *FILES_10.test]})
    right = hashlib.md5((tmp_path / "test_batch").read_bytes()).hexdigest()
    for sums in (FILES_10.train, FILES_10.test):
        for name in sums:
            monkeypatch.setitem(sums, name, right)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read(Cifar10(check=True), tmp_path)[1]) == 18


class _Runs:
    def __reduce__(self):
        return os.system, ("true",)


BAD = {
    "cut": (pickle.dumps(GOOD, 2)[:5000], "cut file", "cut short"),
    "empty": (b"", "cut file", "cut short"),
    "forbidden": ({**GOOD, "x": _Runs()}, "forbidden pickle", r"posix\.system"),
    "no labels": ({"data": X}, "wrong columns", "no 'labels'"),
    "a list": ([1, 2], "wrong columns", "no 'data'"),
    "narrow": ({**GOOD, "data": X[:, :3000]}, "wrong columns", r"uint8 \[3, 3000\]"),
    "floats": ({**GOOD, "data": X.astype(np.float32)}, "wrong columns", "float32"),
    "pixels in a list": ({**GOOD, "data": [1]}, "wrong columns", "'data' is list"),
    "lengths": ({**GOOD, "labels": [1, 2]}, "wrong lengths", "3 images but 2 labels"),
    "words": ({**GOOD, "labels": ["a", "b", "c"]}, "wrong columns", "no list of whole numbers"),
    "huge": ({**GOOD, "labels": [1, 2, 10**30]}, "wrong columns", "no list of whole numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_told_or_left_out(tmp_path, case):
    batch, kind, message = BAD[case]
    write(tmp_path, {"data_batch_1": batch, "data_batch_2": GOOD})
    with pytest.raises(InputError, match=rf"data_batch_1.*{message}"):
        read(Cifar10(), tmp_path)
    faults = Faults(skip=True)
    assert len(read(Cifar10(), tmp_path, faults)[1]) == 3
    assert faults.counts == {kind: 1}


def test_an_unknown_label_leaves_out_its_row(tmp_path):
    write(tmp_path, {"data_batch_1": {**GOOD, "labels": [5, 10, -1]}})
    with pytest.raises(InputError, match=r"image 1: label 10 is not in 0\.\.9"):
        read(Cifar10(), tmp_path)
    faults = Faults(skip=True)
    x, y, _ = read(Cifar10(), tmp_path, faults)
    assert y.tolist() == [5] and faults.counts == {"unknown label": 2}
    np.testing.assert_array_equal(x[0].reshape(-1), X[0])


@pytest.fixture
def pieces(tmp_path, monkeypatch):
    """A folder whose train part is cut into four shards, of eleven rows together."""
    rows = np.arange(11 * 3072, dtype=np.uint32).astype(np.uint8).reshape(11, 3072)
    write(tmp_path, {"train": {"data": rows, "fine_labels": list(range(90, 101))}})
    size = (tmp_path / "train").stat().st_size
    monkeypatch.setattr("subfleet.datasets.cifar._PIECE", -(-size // 4))
    return tmp_path, rows


def test_a_large_batch_comes_in_shards_of_some_rows(pieces):
    folder, rows = pieces
    shards = Cifar100().shards(folder)
    assert [shard.name for shard in shards] == [f"train {piece} of 4" for piece in range(4)]
    with pytest.raises(InputError, match=r"train, image 10: label 100 is not in 0\.\.99"):
        list(Cifar100().read(shards[3], Faults()))
    faults = Faults(skip=True)
    parts = [list(Cifar100().read(shard, faults)) for shard in shards]
    assert [len(row.y) for part in parts for row in part] == [2, 3, 3, 2]
    x, y, _ = read(Cifar100(), folder, Faults(skip=True))
    assert y.tolist() == list(range(90, 100)) and faults.counts == {"unknown label": 1}
    np.testing.assert_array_equal(x.reshape(10, -1), rows[:10])


def test_a_batch_of_no_such_size_is_not_read(tmp_path, monkeypatch):
    write(tmp_path, {"data_batch_1": GOOD})
    monkeypatch.setattr("subfleet.datasets.cifar._LIMIT", 100)
    with pytest.raises(InputError, match=r"data_batch_1 cannot be read .* more than 100"):
        read(Cifar10(), tmp_path)


def test_the_first_shard_tells_of_a_batch_as_a_whole(pieces):
    folder, _ = pieces
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read(Cifar100(), folder, Faults(skip=True))
    assert sum("MD5 sum is" in str(warning.message) for warning in caught) == 1
    for reader, kind in ((Cifar100(check=True), "wrong sum"), (Cifar100(), "cut file")):
        if kind == "cut file":
            os.truncate(folder / "train", (folder / "train").stat().st_size - 9)
        with pytest.raises(InputError, match=r"train.*--skip-bad"):
            read(reader, folder)
        faults = Faults(skip=True)
        assert len(read(reader, folder, faults)[1]) == 0
        assert faults.counts == {kind: 1}
