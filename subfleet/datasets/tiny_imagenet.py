"""Tiny ImageNet: 200 classes of ImageNet at 64 x 64, as a folder or in its zip.

Source: Stanford's course CS231n. wnids.txt names the classes; images are
train/<wnid>/images/*.JPEG and val/images/*.JPEG, labelled by lines
`file <tab> wnid <tab> box` of val/val_annotations.txt.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from subfleet.core.errors import InputError
from subfleet.core.scaling import SIGNED
from subfleet.datasets.archives import Tree, Unreadable, is_inside, open_tree
from subfleet.datasets.images import checked_size, cut, is_image, read_images
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard


@dataclass(frozen=True)
class TinyImagenet:
    """Tiny ImageNet: 100,000 images to train, 10,000 to test (its val part), 200 classes.

    `source`: the folder tiny-imagenet-200, its parent, or the zip, which is read in
    place. A class's label is its place in wnids.txt. The images of test/ have no
    labels and are left out, with a warning. Grey images become RGB; all are resized
    to `size` where theirs differs. The set has no clients of its own.
    """

    size: int = 64

    def __post_init__(self) -> None:
        checked_size(self.size)

    @property
    def name(self) -> str:
        """See `Reader`."""
        return "tiny_imagenet"

    def shards(self, source: Path) -> list[Shard]:
        """About 1,000 images each, of several classes."""
        path, prefix = _locate(source)
        tree = open_tree(path)
        train: list[str] = []
        val: set[str] = set()
        unlabelled = 0
        for name in tree.names():
            top, _, rest = name.removeprefix(prefix).partition("/")
            if not name.startswith(prefix) or not is_image(name):
                continue
            if top == "train":
                train.append(rest)
            elif top == "val":
                val.add(rest)
            elif top == "test":
                unlabelled += 1
        lines = _lines(tree, f"{prefix}val/val_annotations.txt", path) if val else []
        listed = {f"images/{line.split(chr(9))[0]}" for _, line in lines}
        for part, count in (("test", unlabelled), ("val", len(val - listed))):
            if count:
                warnings.warn(
                    f"{path}: {count} images of {part}/ have no labels and are left out",
                    stacklevel=2,
                )
        shards = cut("train", path, sorted(train), False) + cut("val", path, lines, True)
        if not shards:
            raise InputError(
                f"{path} has no images in train/<wnid>/images/ or val/images/; "
                "give tiny-imagenet-200 as published"
            )
        return [replace(shard, files=_files(shard)) for shard in shards]

    def layout(self, source: Path) -> Layout:
        """See `Reader`."""
        path, prefix = _locate(source)
        shape = (3, self.size, self.size)
        classes = len(_wnids(open_tree(path), prefix, path))
        return Layout(classes, shape, scale=SIGNED, natural=False, spread=True)

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """The shard's images.

        Faults: "unknown label", "wrong columns" of an annotation, "missing image",
        "unreadable image", each of a row.
        """
        _, prefix = _locate(shard.path)
        tree = open_tree(shard.path)
        labels = {wnid: label for label, wnid in enumerate(_wnids(tree, prefix, shard.path))}
        pairs = _val_pairs if shard.from_test else _train_pairs
        items = (
            (prefix + name, labels[wnid])
            for name, wnid, where in pairs(shard, faults)
            if _is_known(wnid, labels, where, faults)
        )
        yield from read_images(tree, shard.path, items, self.size, shard.from_test, faults)


def _files(shard: Shard) -> tuple[Path, ...]:
    """The lists that a shard of a folder depends on, and its images' folders; an archive's none."""
    root = shard.path
    if not root.is_dir():
        return ()
    if shard.from_test:
        below = ["val/val_annotations.txt", "val/images"]
    else:
        below = sorted({f"train/{name}".rpartition("/")[0] for name in shard.items})
    return tuple(root / name for name in ("wnids.txt", *below) if (root / name).exists())


def _train_pairs(shard: Shard, faults: Faults) -> Iterator[tuple[str, str, str]]:
    """(name, wnid, where it is said) of train images; the folder is the class."""
    for rest in shard.items:
        yield f"train/{rest}", rest.split("/")[0], f"{shard.path}: train/{rest}"


def _val_pairs(shard: Shard, faults: Faults) -> Iterator[tuple[str, str, str]]:
    """The same of lines of val_annotations.txt."""
    for number, line in shard.items:
        where = f"{shard.path}: val/val_annotations.txt, line {number}"
        columns = line.split("\t")
        if len(columns) < 2 or "/" in columns[0] or not is_inside(columns[0]):
            faults.found(
                "wrong columns",
                f"{where} is {line[:60]!r}, not a file's name, a tab and a wnid; correct it",
            )
            continue
        yield f"val/images/{columns[0]}", columns[1], where


def _is_known(wnid: str, labels: dict[str, int], where: str, faults: Faults) -> bool:
    if wnid not in labels:
        faults.found(
            "unknown label",
            f"{where}: {wnid[:40]!r} is none of the {len(labels)} classes of wnids.txt; correct it",
        )
    return wnid in labels


def _locate(source: Path) -> tuple[Path, str]:
    """The folder or zip to read, and what all names of the data set in it begin with."""
    if source.is_dir():
        for folder in (source, source / "tiny-imagenet-200"):
            if (folder / "wnids.txt").is_file() and any(
                (folder / part).is_dir() for part in ("train", "val")
            ):
                return folder, ""
        zipped = source / "tiny-imagenet-200.zip"
        if not zipped.is_file():
            raise InputError(
                f"{source} has no wnids.txt with train/ or val/ beside it, nor "
                "tiny-imagenet-200.zip; give the folder tiny-imagenet-200 or the zip"
            )
        source = zipped
    lists = [name for name in open_tree(source).names() if name.split("/")[-1] == "wnids.txt"]
    if not lists:
        raise InputError(f"{source} has no wnids.txt; give tiny-imagenet-200.zip as published")
    return source, min(lists, key=len).removesuffix("wnids.txt")


def _wnids(tree: Tree, prefix: str, path: Path) -> list[str]:
    wnids = [line.strip() for _, line in _lines(tree, f"{prefix}wnids.txt", path)]
    if not wnids or len(set(wnids)) != len(wnids):
        raise InputError(f"{path}: wnids.txt is empty or names a class twice; fetch it again")
    return wnids


def _lines(tree: Tree, name: str, path: Path) -> list[tuple[int, str]]:
    """The lines of a list that are not blank, with their numbers from 1."""
    try:
        text = tree.read(name).decode()
    except (Unreadable, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: {name} cannot be read ({error}); give the data set as published"
        ) from None
    return [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
