"""CINIC-10's folders of images: parts, classes, and what cannot be used."""

import numpy as np
import pytest
from PIL import Image

from subfleet.core.errors import InputError
from subfleet.datasets.cinic10 import CLASSES, Cinic10
from subfleet.datasets.reader import Faults


def write(path, value, size=32):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(path)


@pytest.fixture
def source(tmp_path):
    """Two images of each class in each part; red, green and blue are 10 x class + part."""
    for part, name in enumerate(("train", "valid", "test")):
        for label, kind in enumerate(CLASSES):
            for number in range(2):
                write(tmp_path / name / kind / f"cifar10-{name}-{number}.png", 10 * label + part)
    return tmp_path


def read(reader, source, faults=None):
    return [r for s in reader.shards(source) for r in reader.read(s, faults or Faults())]


@pytest.mark.parametrize(
    "valid, train, test", [("train", {0, 1}, {2}), ("test", {0}, {1, 2}), ("none", {0}, {2})]
)
def test_parts_and_labels(source, valid, train, test):
    rows = read(Cinic10(valid=valid), source)
    found = {"train": set(), "test": set()}
    for piece in rows:
        assert piece.x.shape[1:] == (3, 32, 32) and piece.from_test.all() == (piece.name == "test")
        np.testing.assert_array_equal(piece.x[:, 0, 0, 0] // 10, piece.y)
        found[piece.name] |= set((piece.x[:, 2, 31, 31] % 10).tolist())
    assert found == {"train": train, "test": test}
    assert sum(len(piece.y) for piece in rows) == 20 * len(train | test)


def test_layout_sizes_and_the_parent_folder(source, tmp_path):
    layout = Cinic10(size=16).layout(source)
    assert (layout.num_classes, layout.input_shape, layout.natural) == (10, (3, 16, 16), False)
    assert read(Cinic10(size=16), source)[0].x.shape == (2, 3, 16, 16)
    (source / "CINIC-10").mkdir()
    for part in ("train", "valid", "test"):
        (source / part).rename(source / "CINIC-10" / part)
    assert len(Cinic10().shards(source)) == 30


def test_shards_hold_a_thousand_images_and_keep_their_names(source):
    for number in range(1100):
        (source / "train" / "cat" / f"x{number:04}.png").touch()
    names = [s.name for s in Cinic10().shards(source) if s.name.startswith("train/cat")]
    assert names == ["train/cat/0-1000", "train/cat/1000-1102"]


def test_what_cannot_be_used(source):
    (source / "train" / "cat" / "a.png").write_bytes(b"no image")
    whole = (source / "train" / "dog" / "cifar10-train-0.png").read_bytes()
    (source / "train" / "dog" / "a.png").write_bytes(whole[:-30])
    write(source / "train" / "horsefly" / "a.png", 3)
    write(source / "train" / "horsefly" / "b.png", 3)
    (source / "train" / "cat" / "Thumbs.db").write_bytes(b"")
    with pytest.raises(InputError, match=r"train/cat/a\.png: unreadable image"):
        read(Cinic10(), source)
    faults = Faults(skip=True)
    assert sum(len(piece.y) for piece in read(Cinic10(), source, faults)) == 60
    assert faults.counts == {"unreadable image": 2, "unknown label": 2}
    assert "horsefly" in faults.examples["unknown label"]


def test_missing_classes_are_warned_of(source):
    for file in (source / "test" / "ship").iterdir():
        file.unlink()
    (source / "test" / "ship").rmdir()
    with pytest.warns(UserWarning, match="lacks test/ship; the rest is read"):
        assert len(Cinic10().shards(source)) == 29


def test_wrong_folders_and_options(tmp_path):
    with pytest.raises(InputError, match=r"no images in train/.*CINIC-10\.tar\.gz"):
        Cinic10().shards(tmp_path)
    with pytest.raises(InputError, match=r"data\.valid = 'half'"):
        Cinic10(valid="half")
    with pytest.raises(InputError, match=r"data\.size = 0"):
        Cinic10(size=0)
