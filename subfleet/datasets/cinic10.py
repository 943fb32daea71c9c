"""CINIC-10: image folders of CIFAR-10's classes, in three equal parts.

Source: Darlow, Crowley, Antoniou and Storkey, "CINIC-10 Is Not ImageNet or
CIFAR-10" (2018): train, valid and test of 90,000 PNG images each, 32 x 32, as
<part>/<class>/<name>.png.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from subfleet.core.errors import InputError
from subfleet.core.scaling import SIGNED
from subfleet.datasets.archives import Folder
from subfleet.datasets.images import checked_size, cut, is_image, read_images
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard

CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


@dataclass(frozen=True)
class Cinic10:
    """CINIC-10: 270,000 images, 10 classes, no clients of its own.

    `source`: the unpacked folder with train/, valid/ and test/. `valid` says what
    the validation part counts as: "train", "test" or "none". Images are resized to
    `size` where theirs differs.
    """

    size: int = 32
    valid: str = "train"

    def __post_init__(self) -> None:
        checked_size(self.size)
        if self.valid not in ("train", "test", "none"):
            raise InputError(f'data.valid = {self.valid!r} must be "train", "test" or "none"')

    @property
    def name(self) -> str:
        """See `Reader`."""
        return "cinic10"

    def shards(self, source: Path) -> list[Shard]:
        """About 1,000 images of one class each."""
        parts = {"train": False, "valid": self.valid == "test", "test": True}
        if self.valid == "none":
            del parts["valid"]
        root = next((f for f in (source / "CINIC-10", source) if (f / "train").is_dir()), source)
        found: list[Shard] = []
        missing: list[str] = []
        for part, from_test in parts.items():
            folders = _subfolders(root / part)
            missing += [f"{part}/{name}" for name in CLASSES if name not in folders]
            for folder in folders:
                path = root / part / folder
                with os.scandir(path) as entries:
                    names = sorted(e.name for e in entries if is_image(e.name))
                found += cut(f"{part}/{folder}", path, names, from_test)
        if not found:
            raise InputError(
                f"{source} has no images in train/, valid/ or test/<class>/; "
                "unpack CINIC-10.tar.gz and give the folder"
            )
        if missing:
            warnings.warn(
                f"{root} lacks {', '.join(missing)}; the rest is read, which is not the whole "
                "data set",
                stacklevel=2,
            )
        return found

    def layout(self, source: Path) -> Layout:
        """See `Reader`."""
        shape = (3, self.size, self.size)
        return Layout(len(CLASSES), shape, scale=SIGNED, natural=False, spread=True)

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """The shard's images. Faults: "unknown label" by its folder, "unreadable image"."""
        folder = shard.path.name
        if folder not in CLASSES:
            for name in shard.items:
                faults.found(
                    "unknown label",
                    f"{shard.path / name}: its folder {folder!r} is none of CINIC-10's classes "
                    f"({', '.join(CLASSES)}); remove it",
                )
            return
        items = [(name, CLASSES.index(folder)) for name in shard.items]
        tree = Folder(shard.path)
        yield from read_images(tree, shard.path, items, self.size, shard.from_test, faults)


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
