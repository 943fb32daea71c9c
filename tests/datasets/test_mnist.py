"""MNIST's idx files: the complete real ones, and every way in which a file can be wrong."""

import gzip
import hashlib
import struct
import warnings

import numpy as np
import pytest

from subfleet.core.errors import InputError
from subfleet.datasets.mnist import SUMS, Mnist
from subfleet.datasets.reader import Faults

TRAIN, TRAIN_Y, TEST, TEST_Y = SUMS
pytestmark = pytest.mark.filterwarnings("ignore:.*MD5 sum is", "ignore:.* lacks ")


def read(source, faults=None, reader=None):
    reader = reader or Mnist()
    shards = reader.shards(source)
    return [row for shard in shards for row in reader.read(shard, faults or Faults())]


def test_the_real_files(real_data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test = read(real_data / "mnist", reader=Mnist(check=True))
    assert (train.name, test.name) == ("train", "test")
    assert train.x.shape == (60_000, 1, 28, 28) and test.x.shape == (10_000, 1, 28, 28)
    assert train.y[:5].tolist() == [5, 0, 4, 1, 9] and test.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert test.from_test.all() and not train.from_test.any()
    # Known of MNIST: mean and deviation of the train pixels.
    pixels = train.x.astype(np.float32) / 255
    assert abs(pixels.mean() - 0.1307) < 1e-4 and abs(pixels.std() - 0.3081) < 1e-4


def test_the_sums_belong_to_the_files_whose_gz_torchvision_knows(real_data):
    from torchvision.datasets import MNIST

    known = 0
    for name, md5 in MNIST.resources:
        packed = (real_data / "mnist" / name).read_bytes()
        assert hashlib.md5(gzip.decompress(packed)).hexdigest() == SUMS[name.removesuffix(".gz")]
        known += hashlib.md5(packed).hexdigest() == md5
    assert known == 3  # the fourth of the sample was packed anew


def idx(values, kind=8):
    values = np.asarray(values, np.uint8)
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape)
    return header + values.tobytes()


X = np.arange(3 * 784).reshape(3, 28, 28) % 256
GOOD = {TRAIN: idx(X), TRAIN_Y: idx([1, 0, 9]), TEST: idx(X[:1]), TEST_Y: idx([7])}


def write(folder, files, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder


@pytest.mark.parametrize("below", ["", "MNIST/raw", "raw"])
@pytest.mark.parametrize("packed", [False, True])
def test_layouts_of_folders(tmp_path, below, packed):
    write(tmp_path / below, GOOD, packed)
    train, test = read(tmp_path)
    assert train.y.tolist() == [1, 0, 9] and test.y.tolist() == [7]
    np.testing.assert_array_equal(train.x[:, 0], X)
    layout = Mnist().layout(tmp_path)
    assert (layout.num_classes, layout.input_shape, layout.natural) == (10, (1, 28, 28), False)


def test_names_with_a_dot(tmp_path):
    write(tmp_path, {name.replace("-idx", ".idx"): data for name, data in GOOD.items()})
    assert [len(rows.y) for rows in read(tmp_path)] == [3, 1]


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="lacks MNIST's idx files"):
        Mnist().shards(tmp_path)
    write(tmp_path, {TRAIN: GOOD[TRAIN]})
    with pytest.raises(InputError, match=TRAIN_Y):
        Mnist().shards(tmp_path)
    write(tmp_path, {TRAIN_Y: GOOD[TRAIN_Y]})
    with pytest.warns(UserWarning, match="lacks t10k-images.*t10k-labels"):
        assert [shard.name for shard in Mnist().shards(tmp_path)] == ["train"]


def test_a_wrong_sum_is_warned_of_or_refused(tmp_path):
    write(tmp_path, GOOD)
    with pytest.warns(UserWarning, match="train-labels.*MD5 sum is .*not the published a25bea73"):
        assert len(read(tmp_path)) == 2
    with pytest.raises(InputError, match=r"train-images.*MD5 sum"):
        read(tmp_path, reader=Mnist(check=True))


BAD = {
    "cut": (TRAIN, GOOD[TRAIN][:-5], "cut file", "3 x 28 x 28 values and has 2347"),
    "head": (TRAIN, GOOD[TRAIN][:7], "cut file", "has 7 bytes"),
    "empty": (TRAIN_Y, b"", "cut file", "has 0 bytes"),
    "longer": (TRAIN_Y, GOOD[TRAIN_Y] + b"1", "cut file", "says 3 values and has 4"),
    "magic": (TRAIN_Y, GOOD[TRAIN], "wrong columns", "0x00000803, not 0x00000801"),
    "type": (TRAIN, idx(X, kind=13), "wrong columns", "begins with 0x00000d03"),
    "text": (TRAIN, b"<html>not found</html>", "wrong columns", "no idx file"),
    "size": (TRAIN, idx(X[:, :14]), "wrong columns", r"images of \(14, 28\)"),
    "lengths": (TRAIN_Y, idx([1, 2]), "wrong lengths", "3 images, .* 2 labels"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_told_or_its_part_left_out(tmp_path, case):
    name, data, kind, message = BAD[case]
    write(tmp_path, GOOD | {name: data})
    with pytest.raises(InputError, match=message):
        read(tmp_path)
    faults = Faults(skip=True)
    (test,) = read(tmp_path, faults)
    assert test.name == "test" and faults.counts == {kind: 1}


def test_a_cut_or_damaged_gz(tmp_path):
    write(tmp_path, GOOD, packed=True)
    file = tmp_path / f"{TRAIN}.gz"
    whole = file.read_bytes()
    for data in (whole[:-9], whole[:40], b"text", whole[:60] + bytes(20) + whole[80:]):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz"):
            read(tmp_path)


def test_an_unknown_label_leaves_out_its_row(tmp_path):
    write(tmp_path, GOOD | {TRAIN_Y: idx([1, 10, 9])})
    with pytest.raises(InputError, match=r"train-labels.*item 1: label 10 is not in 0\.\.9"):
        read(tmp_path)
    faults = Faults(skip=True)
    train, _ = read(tmp_path, faults)
    assert train.y.tolist() == [1, 9] and faults.counts == {"unknown label": 1}
    np.testing.assert_array_equal(train.x[:, 0], X[[0, 2]])


def test_shards_depend_on_the_labels(tmp_path):
    write(tmp_path, GOOD)
    assert [shard.files for shard in Mnist().shards(tmp_path)] == [
        (tmp_path / TRAIN_Y,),
        (tmp_path / TEST_Y,),
    ]
