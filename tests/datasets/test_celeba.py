"""CelebA: the real lists and images, both ways to clients, and what cannot be used."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from subfleet.core.errors import InputError
from subfleet.datasets.celeba import CelebA
from subfleet.datasets.reader import Faults


def read(reader, source, faults=None):
    faults = faults or Faults()
    return [client for shard in reader.shards(source) for client in reader.read(shard, faults)]


def _people(shards):
    return [person for shard in shards for person in shard.items if hasattr(person, "files")]


def _images(folder, *numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.full((6, 4, 3), number * 10, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=95)


def _json(folder, users, name="all_data.json"):
    folder.mkdir(parents=True, exist_ok=True)
    data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
    (folder / name).write_text(json.dumps({"users": list(users), "user_data": data}))


def _lists(folder, identities, attributes, count=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "identity_CelebA.txt").write_text("".join(f"{line}\n" for line in identities))
    head = [str(count or len(attributes)), "Male Smiling Young "]
    (folder / "list_attr_celeba.txt").write_text("\n".join([*head, *attributes, ""]))


IDENTITIES = ["000001.jpg 7", "000002.jpg 30", "000003.jpg 7", "000004.jpg 30", "000005.jpg 8"]
ATTRIBUTES = [f"00000{n}.jpg -1 {'1' if n % 2 else '-1':>2}  1" for n in range(1, 6)]


@pytest.fixture
def lists(tmp_path):
    _lists(tmp_path, IDENTITIES, ATTRIBUTES)
    _images(tmp_path / "img_align_celeba", 1, 2, 3, 4, 5)
    return tmp_path


def test_the_real_json(real_data, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).symlink_to(real_data / "celeba" / part)
    one = real_data / "celeba" / "img_align_celeba" / "000001.jpg"
    images = tmp_path / "img_align_celeba"
    images.mkdir()
    for file in (tmp_path / "train").iterdir(), (tmp_path / "test").iterdir():
        for data in json.loads(next(file).read_text())["user_data"].values():
            for name in data["x"]:
                (images / name).symlink_to(one)
    shards = CelebA().shards(tmp_path)
    train, test = (_people(s for s in shards if s.from_test == part) for part in (False, True))
    assert len({p.name for p in train}) == len({p.name for p in test}) == 515
    assert sum(len(p.files) for p in train) == 9_060 and sum(len(p.files) for p in test) == 2_399
    assert all(300 < sum(len(p.files) for p in _people([s])) < 540 for s in shards[1:19])
    faults = Faults()
    for shard in shards:
        if not shard.items:
            assert list(CelebA().read(shard, faults)) == []
    first = list(CelebA(size=32).read(shards[1], faults))
    assert sum(map(len, (c.y for c in first))) >= 500 and first[0].x.shape[1:] == (3, 32, 32)


def test_the_real_images_by_identity(real_data, tmp_path):
    for name in ("identity_CelebA.txt", "list_attr_celeba.txt", "img_align_celeba"):
        (tmp_path / name).symlink_to(real_data / "celeba" / name)
    faults = Faults()
    clients = read(CelebA(min_images=1), tmp_path, faults)
    assert len(clients) == 24 and all(len(client.y) == 1 for client in clients)
    x = np.concatenate([client.x for client in clients])
    assert x.shape == (24, 3, 112, 112) and x.dtype == np.uint8
    assert 60 < x.mean() < 180 and x.std() > 40
    assert faults.counts == {"listed image not there": 202_599 - 24}
    labels = {client.name: client.y.tolist() for client in clients}
    assert (labels["2880"], labels["2937"]) == ([1], [1])  # 000001.jpg and 000002.jpg smile


def test_real_images_absent_is_said_at_once(real_data):
    with pytest.raises(
        InputError, match=r"none of the 11459 images .* is among the 24 in .*img_al"
    ):
        CelebA().shards(real_data / "celeba")


def test_clients_of_the_lists(lists):
    reader, faults = CelebA(size=8, min_images=2), Faults()
    clients = read(reader, lists, faults)
    assert [(c.name, c.y.tolist()) for c in clients] == [("7", [1, 1]), ("30", [0, 0])]
    np.testing.assert_allclose(clients[0].x[1], 30, atol=1)
    assert clients[0].x.shape == (2, 3, 8, 8) and not clients[0].from_test.any()
    assert faults.counts == {"image of a rare identity": 1}
    layout = reader.layout(lists)
    assert (layout.num_classes, layout.input_shape, layout.dtype) == (2, (3, 8, 8), "uint8")


def test_images_are_resized_bilinearly_and_grey_ones_made_colour(lists):
    grey = np.arange(24, dtype=np.uint8).reshape(6, 4) * 10
    Image.fromarray(grey).save(lists / "img_align_celeba" / "000001.jpg", quality=100)
    client = read(CelebA(size=12, min_images=2), lists)[0]
    expected = Image.fromarray(grey).resize((12, 12), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(client.x[0, 1], np.asarray(expected), atol=4)
    np.testing.assert_array_equal(client.x[0, 0], client.x[0, 2])


@pytest.mark.parametrize(
    "place", ["img_align_celeba", "raw/img_align_celeba", "../raw/img_align_celeba"]
)
def test_leafs_json_with_images_in_several_places(tmp_path, place):
    source = tmp_path / "data"
    _json(source / "train", {"9": (["000001.jpg", "000002.jpg"], [0, 1])})
    _json(source / "test", {"9": (["000003.jpg"], [1])})
    _images(source / place, 1, 2, 3)
    clients = read(CelebA(size=4), source)
    assert [(c.name, c.y.tolist(), c.from_test.tolist()) for c in clients] == [
        ("9", [0, 1], [False, False]),
        ("9", [1], [True]),
    ]


def test_shards_hold_whole_people(tmp_path):
    _json(tmp_path, {str(n): (["000001.jpg"] * 300, [0] * 300) for n in range(5)})
    _images(tmp_path / "img_align_celeba", 1)
    shards = CelebA().shards(tmp_path)
    assert [[p.name for p in _people([s])] for s in shards] == [[], ["0", "1"], ["2", "3"], ["4"]]
    assert len({shard.name for shard in shards}) == 4


BAD_JSON = {
    "label": ((["000001.jpg", "000002.jpg"], [0, 2]), "unknown label", "label 2, not 0 or 1"),
    "path": ((["../000001.jpg", "000002.jpg"], [0, 1]), "wrong image name", "not an image's file"),
    "number": (([3, "000002.jpg"], [0, 1]), "wrong image name", "x 3, not an image's file name"),
    "missing": ((["000001.jpg", "000009.jpg"], [0, 1]), "missing image", r"000009\.jpg is not"),
    "cut": ((["000001.jpg", "cut.jpg"], [0, 1]), "unreadable image", r"cut\.jpg cannot be dec"),
    "text": ((["000001.jpg", "text.jpg"], [0, 1]), "unreadable image", r"text\.jpg cannot be"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_rows_of_json_are_faults(tmp_path, case):
    rows, kind, message = BAD_JSON[case]
    folder = tmp_path / "img_align_celeba"
    _images(folder, 1, 2)
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "cut.jpg")
    os.truncate(folder / "cut.jpg", 1500)
    (folder / "text.jpg").write_text("no image")
    _json(tmp_path, {"9": rows})
    with pytest.raises(InputError, match=message):
        read(CelebA(size=4), tmp_path)
    faults = Faults(skip=True)
    (client,) = read(CelebA(size=4), tmp_path, faults)
    assert len(client.y) == len(client.x) == 1 and faults.counts == {kind: 1}


def _eps(file):
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n")


@pytest.mark.parametrize("kind", ["EPS", "TIFF", "large"])
def test_other_formats_and_huge_images_are_not_decoded(tmp_path, monkeypatch, kind):
    folder = tmp_path / "img_align_celeba"
    _images(folder, 1)
    if kind == "EPS":
        _eps(folder / "000002.jpg")
    else:
        pixels = np.zeros((9, 9, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "000002.jpg", "TIFF" if kind == "TIFF" else "PNG")
    monkeypatch.setattr("subfleet.datasets.images.MAX_PIXELS", 80)
    _json(tmp_path, {"9": (["000001.jpg", "000002.jpg"], [0, 1])})
    with pytest.raises(
        InputError, match=r"000002\.jpg cannot be decoded \((no image|9 x 9 pixels)"
    ):
        read(CelebA(size=4), tmp_path)
    faults = Faults(skip=True)
    assert len(read(CelebA(size=4), tmp_path, faults)[0].y) == 1
    assert faults.counts == {"unreadable image": 1}


def test_shards_of_images_depend_on_the_lists(lists, tmp_path):
    folder = tmp_path / "img_align_celeba"
    files = (tmp_path / "identity_CelebA.txt", tmp_path / "list_attr_celeba.txt", folder)
    listed, images = CelebA(min_images=2).shards(lists)
    assert (listed.path, listed.files) == (files[0], files[1:])
    assert (images.path, images.files) == (folder, files)
    _json(tmp_path, {"9": (["000001.jpg"], [0])})
    _, images = CelebA().shards(tmp_path)
    assert images.files == (tmp_path / "all_data.json",)


def test_damaged_json_is_found_once(tmp_path):
    _json(tmp_path, {"9": (["000001.jpg"], [0]), "8": ([], [])})
    _images(tmp_path / "img_align_celeba", 1)
    with pytest.raises(InputError, match="user '8' has no samples"):
        read(CelebA(size=4), tmp_path)
    faults = Faults(skip=True)
    assert len(read(CelebA(size=4), tmp_path, faults)) == 1
    assert faults.counts == {"empty user": 1}
    os.truncate(tmp_path / "all_data.json", 80)
    with pytest.raises(InputError, match=r"no whole JSON .* cut short"):
        read(CelebA(size=4), tmp_path)


def _changed(lines, number, line):
    return [*lines[:number], line, *lines[number + 1 :]]


BAD_LISTS = {
    "one column": (
        (_changed(IDENTITIES, 4, "000005.jpg"), ATTRIBUTES),
        "wrong columns",
        r"identity_CelebA\.txt, line 5 is '000005\.jpg', not an image's name and a number",
    ),
    "no number": ((_changed(IDENTITIES, 4, "000005.jpg x"), ATTRIBUTES), "wrong columns", "line 5"),
    "again": (([*IDENTITIES, "000001.jpg 9"], ATTRIBUTES), "duplicate image", "line 6 has 000001"),
    "label": (
        (IDENTITIES[:4], _changed(ATTRIBUTES, 4, "000005.jpg -1 0 1")),
        "unknown label",
        r"list_attr_celeba\.txt, line 7: Smiling is '0', not 1 or -1",
    ),
    "cut line": (
        (IDENTITIES[:4], _changed(ATTRIBUTES, 4, "000005.jpg -1")),
        "wrong columns",
        "line 7 has 2 columns, not 4",
    ),
    "cut list": (
        (IDENTITIES, ATTRIBUTES[:4]),
        "images without attributes",
        r"has no line for 1 of the 5 images .* the first 000005\.jpg",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lines_of_the_lists_are_faults(lists, case):
    (identities, attributes), kind, message = BAD_LISTS[case]
    _lists(lists, identities, attributes, count=5)
    with pytest.raises(InputError, match=message):
        read(CelebA(size=4, min_images=2), lists)
    faults = Faults(skip=True)
    clients = read(CelebA(size=4, min_images=2), lists, faults)
    assert [client.name for client in clients] == ["7", "30"] and faults.counts[kind] == 1


@pytest.mark.parametrize("name, line", [("identity_CelebA.txt", 5), ("list_attr_celeba.txt", 7)])
def test_a_damaged_character_spoils_its_line_alone(lists, name, line):
    whole = (lists / name).read_bytes()
    (lists / name).write_bytes(whole.replace(b"000005.jpg", b"00000\xb5.jpg"))
    with pytest.raises(InputError, match=rf"{name}, line {line} "):
        read(CelebA(size=4, min_images=2), lists)
    faults = Faults(skip=True)
    clients = read(CelebA(size=4, min_images=2), lists, faults)
    assert [client.name for client in clients] == ["7", "30"]
    assert faults.counts["wrong columns"] == 1


def test_a_cut_list_serves_where_it_covers_the_images(lists):
    _lists(lists, IDENTITIES, ATTRIBUTES[:4], count=202_599)
    (lists / "img_align_celeba" / "000005.jpg").unlink()
    faults = Faults()
    assert len(read(CelebA(size=4, min_images=2), lists, faults)) == 2
    assert faults.counts == {"listed image not there": 1}


def test_what_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(
        InputError, match=r"no image folder img_align_celeba; looked for .*/raw/img"
    ):
        CelebA().shards(tmp_path)
    (tmp_path / "img_align_celeba").mkdir()
    with pytest.raises(InputError, match=r"img_align_celeba has no \.jpg"):
        CelebA().shards(tmp_path)
    _images(tmp_path / "img_align_celeba", 1)
    with pytest.raises(InputError, match=r"neither LEAF's JSON files nor identity_CelebA\.txt"):
        CelebA().shards(tmp_path)
    _lists(tmp_path, IDENTITIES, ATTRIBUTES)
    text = (tmp_path / "list_attr_celeba.txt").read_text()
    (tmp_path / "list_attr_celeba.txt").write_text(text.replace("Smiling", "Frowning"))
    with pytest.raises(InputError, match="no attribute 'Smiling' in its second line"):
        CelebA().shards(tmp_path)
    with pytest.raises(InputError, match="size=0"):
        CelebA(size=0)
    with pytest.raises(InputError, match="min_images=0"):
        CelebA(min_images=0)
