"""Image files to arrays of one size, and sets that are lists of labelled image files."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from subfleet.core.errors import InputError
from subfleet.datasets.archives import Missing, Tree, Unreadable
from subfleet.datasets.reader import TEST_POOL, TRAIN_POOL, ClientRows, Faults, Shard

PER_SHARD = 1000
MAX_PIXELS = 1 << 26
"""Pixels of an image, at most: 8192 x 8192. A few bytes can claim to be more than fits memory."""

# Formats that data sets come in; others have decoders that start programs.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "PPM", "WEBP")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".webp")


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image.

    >>> is_image("a/b.JPEG"), is_image("Thumbs.db")
    (True, False)
    """
    return name.lower().endswith(_SUFFIXES)


def decode(data: bytes, size: int) -> np.ndarray:
    """An image file as uint8 [3, size, size]: RGB, resized bilinearly where its size differs.

    Grey becomes RGB. Unreadable: damaged, cut short, no image, more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            return _planes(image, size)
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable("no image, or of an unknown format") from None
    except Exception as error:  # a decoder fed damaged bytes raises nearly anything
        raise Unreadable(str(error) or type(error).__name__) from None


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """Pixels uint8 [height, width, 3] as uint8 [3, size, size], bilinearly."""
    return _planes(Image.fromarray(pixels), size)


def _planes(image: Image.Image, size: int) -> np.ndarray:
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def checked_size(size: int) -> int:
    """`size`, pixels a side; InputError outside 1..1024."""
    if type(size) is not int or not 1 <= size <= 1024:
        raise InputError(f"data.size = {size!r} must be a whole number of pixels in 1..1024")
    return size


def cut(name: str, path: Path, items: Sequence[Any], from_test: bool) -> list[Shard]:
    """Shards of `PER_SHARD` items each; their names tell how many items there are."""
    shards = []
    for start in range(0, len(items), PER_SHARD):
        some = tuple(items[start : start + PER_SHARD])
        shards.append(Shard(f"{name}/{start}-{start + len(some)}", path, from_test, some))
    return shards


def read_images(
    tree: Tree,
    where: Path,
    items: Iterable[tuple[str, int]],
    size: int,
    from_test: bool,
    faults: Faults,
) -> Iterator[ClientRows]:
    """The rows of (name in `tree`, label) pairs, as one piece of the train or test pool.

    Faults: "missing image", "unreadable image".
    """
    images: list[np.ndarray] = []
    labels: list[int] = []
    for name, label in items:
        try:
            images.append(decode(tree.read(name), size))
        except Unreadable as error:
            kind = "missing image" if isinstance(error, Missing) else "unreadable image"
            faults.found(kind, f"{where / name}: {kind} ({error}); fetch it again")
        else:
            labels.append(label)
    if images:
        yield pool_rows(np.stack(images), np.array(labels), from_test)


def pool_rows(x: np.ndarray, y: np.ndarray, from_test: bool) -> ClientRows:
    """Rows of the train or the test pool."""
    name = TEST_POOL if from_test else TRAIN_POOL
    return ClientRows(name, x, y.astype(np.int64), np.full(len(y), from_test))
