"""mini-ImageNet as lists with images and as caches: the real lists, and what cannot be used."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from subfleet.core.errors import InputError
from subfleet.datasets.mini_imagenet import PARTS, MiniImagenet
from subfleet.datasets.reader import Faults

# Sorted over all lists they are not in the order of the lists.
CLASSES = {"train": ["n00000003", "n00000001"], "val": ["n00000004"], "test": ["n00000002"]}


def read(reader, source, faults=None):
    rows = [r for s in reader.shards(source) for r in reader.read(s, faults or Faults())]
    assert all(row.name == "train" and not row.from_test.any() for row in rows)
    return np.concatenate([row.x for row in rows]), np.concatenate([row.y for row in rows])


@pytest.mark.parametrize("order", ["", "imagenet_names"])
def test_the_real_lists(real_data, order):
    folder = real_data / "mini-imagenet" / order
    classes = [MiniImagenet(parts=(part,)).layout(folder).num_classes for part in PARTS]
    assert classes == [64, 16, 20]
    layout = MiniImagenet().layout(folder)
    assert (layout.num_classes, layout.input_shape, layout.natural) == (100, (3, 84, 84), False)
    with pytest.raises(InputError, match="no folder images/"):
        MiniImagenet().shards(folder)


@pytest.mark.parametrize("order", ["", "imagenet_names"])
def test_the_real_lists_with_one_image(real_data, tmp_path, order):
    for part in PARTS:
        (tmp_path / f"{part}.csv").symlink_to(real_data / "mini-imagenet" / order / f"{part}.csv")
    name = "n01532829_20457.JPEG" if order else "n0153282900000005.jpg"
    write_image(tmp_path / "images" / name, 7)
    shards = MiniImagenet().shards(tmp_path)
    assert len(shards) == 39 + 10 + 12  # 38,400, 9,600 and 12,000 rows in thousands
    faults = Faults(skip=True)
    (rows,) = MiniImagenet().read(shards[0], faults)
    # n01532829 is the first of the train list and the first of all classes, sorted.
    assert rows.y.tolist() == [0] and faults.counts == {"missing image": 999}


def write_image(file, value, size=84):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(file, "PNG")


def write_lists(folder, header="filename,label", nested=False):
    """Two images of each class, of 10 x its label."""
    for part, names in CLASSES.items():
        lines = [header]
        for wnid in names:
            for number in range(2):
                file = f"{wnid}0000000{number}.jpg"
                below = f"{wnid}/{file}" if nested else file
                write_image(folder / "images" / below, 10 * (int(wnid[1:]) - 1))
                lines.append(f"{file},{wnid}" if header[0] == "f" else f"{wnid},{file}")
        (folder / f"{part}.csv").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("header", ["filename,label", "class_name,image_name"])
@pytest.mark.parametrize("nested", [False, True])
def test_lists_with_images(tmp_path, header, nested):
    write_lists(tmp_path, header, nested)
    x, y = read(MiniImagenet(), tmp_path)
    assert y.tolist() == [2, 2, 0, 0, 3, 3, 1, 1]
    np.testing.assert_array_equal(x[:, 0, 40, 40], 10 * y)
    assert x.shape == (8, 3, 84, 84)


def test_parts_and_sizes(tmp_path):
    write_lists(tmp_path)
    reader = MiniImagenet(size=32, parts=("train", "test"))
    assert reader.layout(tmp_path).num_classes == 3
    x, y = read(reader, tmp_path)
    assert y.tolist() == [2, 2, 0, 0, 1, 1] and x.shape == (6, 3, 32, 32)
    for parts in ((), ("train", "valid")):
        with pytest.raises(InputError, match=r"data\.parts"):
            MiniImagenet(parts=parts)


def test_lists_beside_images(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "lists").mkdir()
    for part in PARTS:
        (tmp_path / f"{part}.csv").rename(tmp_path / "lists" / f"{part}.csv")
    assert len(read(MiniImagenet(), tmp_path / "lists")[1]) == 8


def test_missing_lists(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "val.csv").unlink()
    with pytest.raises(InputError, match=r"lacks .*val\.csv.*choose fewer parts"):
        MiniImagenet().shards(tmp_path)
    assert len(MiniImagenet(parts=("test",)).shards(tmp_path)) == 1


@pytest.mark.parametrize("header", ["label,filename", "a.jpg,n00000001", "filename", ""])
def test_wrong_columns_of_a_list(tmp_path, header):
    write_lists(tmp_path)
    (tmp_path / "val.csv").write_text(f"{header}\na.jpg,n00000001\n")
    with pytest.raises(InputError, match=r"val\.csv, line 1 is .*not filename,label or class_name"):
        read(MiniImagenet(), tmp_path)
    faults = Faults(skip=True)
    assert read(MiniImagenet(), tmp_path, faults)[1].tolist() == [2, 2, 0, 0, 1, 1]
    assert faults.counts == {"wrong columns": 1}
    with pytest.raises(InputError, match=r"val\.csv, line 1 is"):
        MiniImagenet(parts=("val",)).shards(tmp_path)


@pytest.mark.parametrize("bad", [b"\xff\xfe,n00000004", b'"n0000000400000000.jpg', b"\x00"])
def test_a_line_that_cannot_be_read_spoils_itself_alone(tmp_path, bad):
    write_lists(tmp_path)
    first, *rest = (tmp_path / "val.csv").read_bytes().splitlines()
    bom = b"\xef\xbb\xbf"
    (tmp_path / "val.csv").write_bytes(bom + b"\r\n".join([first, bad, *rest, b""]))
    with pytest.raises(InputError, match=r"val\.csv, line 2 is .*not an image's name"):
        read(MiniImagenet(), tmp_path)
    faults = Faults(skip=True)
    assert len(read(MiniImagenet(), tmp_path, faults)[1]) == 8
    assert faults.counts == {"wrong columns": 1}


def test_shards_of_lists_depend_on_the_images_folders(tmp_path):
    write_lists(tmp_path, nested=True)
    shard = MiniImagenet().shards(tmp_path)[0]
    folders = [tmp_path / "images" / name for name in ("", "n00000001", "n00000003")]
    assert shard.path.name == "train.csv" and list(shard.files) == folders


def test_rows_of_a_list_that_cannot_be_used(tmp_path):
    write_lists(tmp_path)
    bad = ["none.jpg,n00000003", "x.jpg,bird", "x.jpg", "a,b,n00000003", "../x.jpg,n00000003"]
    with (tmp_path / "train.csv").open("a") as out:
        out.write("\n".join(bad) + "\n")
    (tmp_path / "images" / "n000000010000000.jpg").write_bytes(b"no image")
    first = tmp_path / "images" / "n0000000100000000.jpg"
    first.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"images/n0000000100000000\.jpg: unreadable image"):
        read(MiniImagenet(), tmp_path)
    faults = Faults(skip=True)
    _, y = read(MiniImagenet(), tmp_path, faults)
    assert y.tolist() == [2, 2, 0, 3, 3, 1, 1]
    assert faults.counts == {
        **{"unreadable image": 1, "missing image": 1},
        **{"unknown label": 1, "wrong columns": 3},
    }
    assert "train.csv, line 7: 'bird'" in faults.examples["unknown label"]
    assert "train.csv, line 8 is 'x.jpg'" in faults.examples["wrong columns"]


def caches(count=3, size=84):
    """Caches of `count` images of each class, of 10 x its label + the number's last digit."""
    made = {}
    for part, names in CLASSES.items():
        pixels = [
            np.full((size, size, 3), 10 * (int(wnid[1:]) - 1) + number % 10, np.uint8)
            for wnid in names
            for number in range(count)
        ]
        rows = {wnid: list(range(k * count, (k + 1) * count)) for k, wnid in enumerate(names)}
        made[part] = {"image_data": np.stack(pixels), "class_dict": rows}
    return made


def write_caches(folder, made, protocol=4):
    for part, data in made.items():
        content = data if isinstance(data, bytes) else pickle.dumps(data, protocol)
        (folder / f"mini-imagenet-cache-{part}.pkl").write_bytes(content)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_caches(tmp_path, protocol):
    write_caches(tmp_path, caches(), protocol)
    assert MiniImagenet().layout(tmp_path).num_classes == 4
    x, y = read(MiniImagenet(), tmp_path)
    assert y.tolist() == [2] * 3 + [0] * 3 + [3] * 3 + [1] * 3
    np.testing.assert_array_equal(x[:, 1, 3, 80], 10 * y + np.tile([0, 1, 2], 4))
    assert read(MiniImagenet(size=20, parts=("val",)), tmp_path)[0].shape == (3, 3, 20, 20)


def test_a_cache_is_read_a_thousand_rows_at_a_time(tmp_path):
    write_caches(tmp_path, caches(1050, size=8))
    reader = MiniImagenet(parts=("train", "val"), size=8)
    shards = reader.shards(tmp_path)
    assert [shard.name.split("-")[-1] for shard in shards] == [
        *("train/0", "train/1000", "train/2000"),
        *("val/0", "val/1000"),
    ]
    sizes = [sum(len(row.y) for row in reader.read(shard, Faults())) for shard in shards]
    assert sizes == [1000, 1000, 100, 1000, 50]
    assert np.bincount(read(reader, tmp_path)[1]).tolist() == [1050] * 3


class _Runs:
    def __reduce__(self):
        return os.system, ("true",)


def changed(**values):
    return caches()["val"] | values


BAD_CACHES = {
    "forbidden": (changed(more=_Runs()), "forbidden pickle", r"asks for 'posix\.system'"),
    "cut": (pickle.dumps(caches()["val"], 4)[:-100], "cut file", "cut short"),
    "cut pixels": (pickle.dumps(caches(60)["val"], 4)[:1_000_000], "cut file", "cut short"),
    "empty": (b"", "cut file", "cut short"),
    "a list": ([1], "wrong columns", "no array 'image_data'"),
    "no classes": (
        {"image_data": np.zeros((1, 84, 84, 3), np.uint8)},
        "wrong columns",
        "no 'class_dict'",
    ),
    "grey": (
        changed(image_data=np.zeros((3, 84, 84), np.uint8)),
        "wrong columns",
        r"uint8 \[3, 84, 84\]",
    ),
    "floats": (changed(image_data=np.zeros((3, 84, 84, 3))), "wrong columns", "float64"),
    "beyond": (
        changed(class_dict={"n00000004": [3]}),
        "wrong columns",
        r"not whole numbers in 0\.\.2",
    ),
    "below": (
        changed(class_dict={"n00000004": [-1]}),
        "wrong columns",
        r"not whole numbers in 0\.\.2",
    ),
    "words": (changed(class_dict={"n00000004": ["a"]}), "wrong columns", "not whole numbers"),
    "no list": (changed(class_dict={"n00000004": 3}), "wrong columns", "not whole numbers"),
    "names": (
        changed(class_dict={4: [0]}),
        "wrong columns",
        "class 4 of 'class_dict' is no string",
    ),
}


@pytest.mark.parametrize("case", BAD_CACHES)
def test_bad_caches_are_told_or_left_out(tmp_path, case):
    cache, kind, message = BAD_CACHES[case]
    write_caches(tmp_path, caches() | {"val": cache})
    message = rf"mini-imagenet-cache-val\.pkl.*{message}"
    with pytest.raises(InputError, match=message):
        read(MiniImagenet(), tmp_path)
    faults = Faults(skip=True)
    assert read(MiniImagenet(), tmp_path, faults)[1].tolist() == [2] * 3 + [0] * 3 + [1] * 3
    assert faults.counts == {kind: 1} and MiniImagenet().layout(tmp_path).num_classes == 3
    alone = MiniImagenet(parts=("val",))
    for look in (alone.shards, alone.layout):
        with pytest.raises(InputError, match=message):
            look(tmp_path)


def test_a_cache_damaged_after_it_was_listed_is_a_fault(tmp_path):
    write_caches(tmp_path, caches())
    shard = MiniImagenet().shards(tmp_path)[0]
    os.truncate(shard.path, 1000)
    with pytest.raises(InputError, match="cut short"):
        list(MiniImagenet().read(shard, Faults()))


def test_an_image_of_two_classes_is_left_out(tmp_path):
    twice = {"n00000004": [0, 0, 1], "n00000009": [1, 2]}
    write_caches(tmp_path, {"val": changed(class_dict=twice)})
    reader = MiniImagenet(parts=("val",))
    with pytest.raises(InputError, match="image 1 is in the classes 'n00000004' and 'n00000009'"):
        read(reader, tmp_path)
    faults = Faults(skip=True)
    x, y = read(reader, tmp_path, faults)
    assert y.tolist() == [0, 1] and x[:, 0, 0, 0].tolist() == [30, 32]
    assert faults.counts == {"duplicate image": 1}


def test_an_image_of_no_class_is_left_out(tmp_path):
    write_caches(tmp_path, {"val": changed(class_dict={"n00000004": [0, 2], "n00000009": []})})
    reader = MiniImagenet(parts=("val",))
    with pytest.raises(InputError, match=r"image 1 is in no class"):
        read(reader, tmp_path)
    faults = Faults(skip=True)
    x, y = read(reader, tmp_path, faults)
    assert y.tolist() == [0, 0] and x[:, 0, 0, 0].tolist() == [30, 32]
    assert faults.counts == {"unknown label": 1}
