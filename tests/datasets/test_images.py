"""Images become arrays of one size; what is none is told."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from subfleet.core.errors import InputError
from subfleet.datasets.archives import Unreadable, open_tree
from subfleet.datasets.images import checked_size, cut, decode, read_images, resize
from subfleet.datasets.reader import Faults


def encoded(pixels, mode=None, form="PNG"):
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    out = io.BytesIO()
    (image.convert(mode) if mode else image).save(out, form)
    return out.getvalue()


RAMP = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def test_exact_pixels_planes_first():
    square = RAMP[:, :4]
    np.testing.assert_array_equal(decode(encoded(square), 4), square.transpose(2, 0, 1))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA", "CMYK"])
def test_any_mode_becomes_rgb(mode):
    form = "JPEG" if mode == "CMYK" else "PNG"
    found = decode(encoded(np.full((4, 4, 3), 255), mode, form), 4)
    assert found.dtype == np.uint8 and found.shape == (3, 4, 4)
    assert found.min() >= 254


def test_grey_is_the_same_in_all_planes():
    found = decode(encoded(RAMP[:, :4, 0]), 4)
    assert (found == found[0]).all() and found[0, 0, 1] == RAMP[0, 1, 0]


def test_resized_bilinearly():
    half = decode(encoded(np.repeat([[0], [100]], 2, axis=1).repeat(2, 0)), 2)
    # Halving looks four pixels far: 3, 3 and 1 parts of those inside, 100 / 7 and 600 / 7.
    np.testing.assert_array_equal(half[0], [[14, 14], [86, 86]])
    assert resize(RAMP, 2).shape == (3, 2, 2)
    middle = decode(encoded([[0, 100]]), 4)[0, 0]
    np.testing.assert_array_equal(middle, [0, 25, 75, 100])


WHOLE = encoded(np.random.default_rng(0).integers(0, 256, (32, 32, 3)), form="JPEG")


def bomb(side):
    """A PNG of a few bytes that says it is side x side."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", WHOLE[:20], WHOLE[: len(WHOLE) // 2], bomb(9000), bomb(60000), bomb(100)],
    ids=["empty", "text", "head", "half", "bomb", "large bomb", "short"],
)
def test_unreadable(data):
    with pytest.raises(Unreadable):
        decode(data, 4)


def test_formats_that_start_programs_are_not_tried():
    with pytest.raises(Unreadable, match="unknown format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n", 4)


def test_rows_and_faults(tmp_path):
    for name, data in {"a.png": encoded(RAMP), "b.png": b"x", "c.png": encoded(RAMP)}.items():
        (tmp_path / name).write_bytes(data)
    items = [("a.png", 3), ("b.png", 4), ("none.png", 5), ("c.png", 6)]
    faults = Faults(skip=True)
    (rows,) = read_images(open_tree(tmp_path), tmp_path, items, 4, True, faults)
    assert rows.name == "test" and rows.y.tolist() == [3, 6] and rows.from_test.all()
    assert rows.x.shape == (2, 3, 4, 4) and rows.y.dtype == np.int64
    assert faults.counts == {"unreadable image": 1, "missing image": 1}
    assert "b.png" in faults.examples["unreadable image"]
    with pytest.raises(InputError, match=r"b\.png: unreadable image"):
        list(read_images(open_tree(tmp_path), tmp_path, items, 4, True, Faults()))


def test_no_rows_where_no_image_is_left(tmp_path):
    faults = Faults(skip=True)
    assert not list(read_images(open_tree(tmp_path), tmp_path, [("a", 1)], 4, False, faults))


def test_cut_and_sizes(tmp_path):
    shards = cut("train", tmp_path, list(range(2100)), False)
    assert [s.name for s in shards] == ["train/0-1000", "train/1000-2000", "train/2000-2100"]
    assert sum((s.items for s in shards), ()) == tuple(range(2100))
    sizes: list[Any] = [0, 1025, 2.0, True]
    for size in sizes:
        with pytest.raises(InputError, match=r"data\.size"):
            checked_size(size)
