"""Tiny ImageNet as folder and zip: the real sample, and what cannot be used."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from subfleet.core.errors import InputError
from subfleet.datasets.reader import Faults
from subfleet.datasets.tiny_imagenet import TinyImagenet

pytestmark = pytest.mark.filterwarnings("ignore:.*have no labels")
WNIDS = ["n03", "n01", "n02"]


def read(source, faults=None, size=64):
    reader = TinyImagenet(size)
    shards = reader.shards(source)
    return [row for shard in shards for row in reader.read(shard, faults or Faults())]


def test_the_real_zip(real_data):
    source = real_data / "tiny-imagenet"
    assert TinyImagenet().layout(source).num_classes == 25
    with pytest.warns(UserWarning, match="20 images of test/ have no labels and are left out"):
        shards = TinyImagenet().shards(source)
    assert [shard.name for shard in shards] == ["train/0-1000", "val/0-500"]
    train, test = read(source / "tiny-imagenet-200.zip", size=32)
    assert train.x.shape == (1_000, 3, 32, 32) and test.x.shape == (500, 3, 32, 32)
    assert np.bincount(train.y).tolist() == [40] * 25
    assert np.bincount(test.y).tolist() == [20] * 25
    grey = (train.x == train.x[:, :1]).all((1, 2, 3)).sum()
    grey += (test.x == test.x[:, :1]).all((1, 2, 3)).sum()
    assert grey >= 20  # 26 of all files are grey, some of them in test/


def test_the_real_zip_and_its_folder_are_read_alike(real_data, tmp_path):
    packed = real_data / "tiny-imagenet" / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(packed) as whole:
        whole.extractall(tmp_path, [n for n in whole.namelist() if "/val/" in n or "wnids" in n])
    (found,) = read(tmp_path / "tiny-imagenet-200")
    _, theirs = read(packed)
    assert len(found.y) == 500
    np.testing.assert_array_equal(found.x, theirs.x)
    np.testing.assert_array_equal(found.y, theirs.y)


def image(value, mode="RGB"):
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (value, value, value)).convert(mode).save(out, "PNG")
    return out.getvalue()


def files(**changed):
    """A small data set: name -> bytes. Pixels are 10 x place in wnids.txt (+ 1 in val)."""
    made = {"wnids.txt": "\n".join(WNIDS).encode() + b"\n"}
    for label, wnid in enumerate(WNIDS):
        for number in range(2):
            mode = "L" if number else "RGB"
            made[f"train/{wnid}/images/{wnid}_{number}.JPEG"] = image(10 * label, mode)
        made[f"train/{wnid}/{wnid}_boxes.txt"] = b"x\t0\t0\t1\t1\n"
        made[f"val/images/val_{label}.JPEG"] = image(10 * label + 1)
    lines = [f"val_{label}.JPEG\t{wnid}\t0\t0\t62\t62" for label, wnid in enumerate(WNIDS)]
    made["val/val_annotations.txt"] = "\n".join(lines).encode() + b"\n"
    made["test/images/test_0.JPEG"] = image(200)
    return made | {name.replace("__", "/"): data for name, data in changed.items()}


def as_folder(path, made):
    for name, data in made.items():
        file = path / "tiny-imagenet-200" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return path


def as_zip(path, made):
    with zipfile.ZipFile(path / "tiny-imagenet-200.zip", "w") as out:
        for name, data in made.items():
            out.writestr(f"tiny-imagenet-200/{name}", data)
    return path


@pytest.fixture(params=[as_folder, as_zip])
def write(request, tmp_path):
    return lambda made: request.param(tmp_path, made)


def test_labels_are_places_in_wnids(write):
    source = write(files())
    train, test = read(source)
    assert train.y.tolist() == [1, 1, 2, 2, 0, 0] and test.y.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(train.x[:, :, 5, 5], 10 * train.y[:, None].repeat(3, 1))
    np.testing.assert_array_equal(test.x[:, 0, 0, 0], 10 * test.y + 1)
    assert train.x.shape[1:] == TinyImagenet().layout(source).input_shape == (3, 64, 64)
    assert test.name == "test" and test.from_test.all() and not train.from_test.any()


def test_what_cannot_be_used(write):
    made = files()
    made["train/n01/images/n01_0.JPEG"] = b"no image"
    made["train/n02/images/n02_0.JPEG"] = image(0)[:-40]
    made["train/n99/images/n99_0.JPEG"] = image(0)
    del made["val/images/val_1.JPEG"]
    made["val/val_annotations.txt"] += b"val_7.JPEG\tn77\t0\t0\t1\t1\nno tabs\n../x.JPEG\tn01\n"
    source = write(made)
    with pytest.raises(InputError, match=r"train/n01/images/n01_0\.JPEG: unreadable image"):
        read(source)
    faults = Faults(skip=True)
    train, test = read(source, faults)
    assert train.y.tolist() == [1, 2, 0, 0] and test.y.tolist() == [0, 2]
    assert faults.counts == {
        **{"unreadable image": 2, "unknown label": 2},
        **{"missing image": 1, "wrong columns": 2},
    }
    assert "n99" in faults.examples["unknown label"]
    assert "line 5 is 'no tabs'" in faults.examples["wrong columns"]


def test_unlisted_and_test_images_are_said_to_be_left_out(write):
    source = write(files(val__images__more=b"") | {"val/images/extra.JPEG": image(1)})
    with pytest.warns(UserWarning) as caught:
        TinyImagenet().shards(source)
    told = " ".join(str(warning.message) for warning in caught)
    assert "1 images of test/ have no labels" in told and "1 images of val/" in told


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"wnids.txt": b""}, "wnids.txt is empty"),
        ({"wnids.txt": b"n01\nn02\nn01\n"}, "names a class twice"),
        ({"wnids.txt": b"\xff\xfe"}, "cannot be read"),
    ],
)
def test_bad_lists_of_classes(write, changed, message):
    source = write(files() | changed)
    with pytest.raises(InputError, match=message):
        TinyImagenet().layout(source)


def test_missing_lists(write):
    made = files()
    del made["val/val_annotations.txt"]
    with pytest.raises(InputError, match=r"val_annotations\.txt cannot be read"):
        TinyImagenet().shards(write(made))


def test_no_images(write):
    with pytest.raises(InputError, match=r"no images in train|no wnids"):
        TinyImagenet().shards(write({"wnids.txt": b"n01\n"}))


@pytest.mark.parametrize("name", ["/etc/x.JPEG", "../x.JPEG", "tiny-imagenet-200/../../x.JPEG"])
def test_a_zip_with_paths_outside_is_refused(tmp_path, name):
    as_zip(tmp_path, files())
    with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "a") as out:
        out.writestr(name, image(0))
    with pytest.raises(InputError, match="path outside its folder, and is refused"):
        TinyImagenet().shards(tmp_path)


def test_a_cut_zip_and_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match=r"nor tiny-imagenet-200\.zip"):
        TinyImagenet().shards(tmp_path)
    packed = as_zip(tmp_path, files()) / "tiny-imagenet-200.zip"
    packed.write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(InputError, match="no whole zip"):
        TinyImagenet().shards(tmp_path)


def test_shards_of_a_folder_depend_on_its_lists_and_folders(tmp_path):
    root = as_folder(tmp_path, files()) / "tiny-imagenet-200"
    train, val = TinyImagenet().shards(tmp_path)
    folders = [f"train/{wnid}/images" for wnid in sorted(WNIDS)]
    assert train.files == tuple(root / name for name in ("wnids.txt", *folders))
    lists = ("wnids.txt", "val/val_annotations.txt", "val/images")
    assert val.files == tuple(root / name for name in lists)
    packed = as_zip(tmp_path, files()) / "tiny-imagenet-200.zip"
    assert [shard.files for shard in TinyImagenet().shards(packed)] == [(), ()]
