"""CelebA: a client is a celebrity, a row an aligned photograph, the label whether it smiles.

Source: Liu et al., "Deep Learning Face Attributes in the Wild" (2015); as
federated data Caldas et al., "LEAF: A Benchmark for Federated Settings" (2018).
LEAF's JSON has image file names for x and "Smiling" for y; without it the
publisher's lists say the same.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from subfleet.core.errors import InputError
from subfleet.core.scaling import SIGNED
from subfleet.datasets import leaf
from subfleet.datasets.archives import Folder, Missing, Unreadable
from subfleet.datasets.federation import checked_number
from subfleet.datasets.images import decode
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard

NUM_CLASSES = 2
FOLDER, IDENTITIES, ATTRIBUTES = "img_align_celeba", "identity_CelebA.txt", "list_attr_celeba.txt"
LABEL = "Smiling"
_SHARD_IMAGES = 500


class Person(NamedTuple):
    """One client as the lists have it: image file names and their labels."""

    name: str
    files: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class CelebA:
    """Smiling or not, by celebrity.

    `source` holds LEAF's JSON (train/ and test/, or files), else identity_CelebA.txt
    and list_attr_celeba.txt, itself or under raw/; the images lie in
    img_align_celeba, in the same places or beside `source`. Without JSON a client
    is an identity with `min_images` images or more, of those that are there and
    have attributes. x is uint8 [3, size, size], resized bilinearly. Faults: a JSON
    image that is missing, an image that cannot be decoded, lines of the lists with
    the wrong columns, unknown labels, images without attributes.
    """

    size: int = 112
    min_images: int = 5

    def __post_init__(self) -> None:
        checked_number("data.size", self.size, 1, 1024, whole=True)
        checked_number("data.min_images", self.min_images, 1, whole=True)

    @property
    def name(self) -> str:
        """The name in `subfleet.datasets.SETS`."""
        return "celeba"

    def layout(self, source: Path) -> Layout:
        """Images of `size` x `size`, two classes."""
        del source  # The options say it all.
        return Layout(NUM_CLASSES, (3, self.size, self.size), scale=SIGNED)

    def shards(self, source: Path) -> list[Shard]:
        """One shard for each list, which finds its faults, then some 500 images each.

        The lists are small and are read here, too, since they say who has which image.
        """
        folder = _image_folder(source)
        there = _images_in(folder)
        if not there:
            raise InputError(f"{folder} has no .jpg or .png; unpack {FOLDER}.zip there")
        lists, found = leaf.find_shards(source), []
        if lists:
            for shard in lists:
                people = list(_json_people(shard.path, Faults(skip=True)))
                found += [shard, *_shards_of(people, shard, folder)]
        else:
            shard = _lists(source, folder)
            found = [shard, *_shards_of(self._people(shard, Faults(skip=True)), shard, folder)]
        wanted = [file for shard in found for person in _people_in(shard) for file in person.files]
        if wanted and there.isdisjoint(wanted):
            raise InputError(
                f"none of the {len(wanted)} images of {found[0].path} is among the {len(there)} "
                f"in {folder}; unpack {FOLDER}.zip there"
            )
        return found

    def read(self, shard: Shard, faults: Faults) -> Iterator[ClientRows]:
        """The people of a shard of images; a list has none and gives its faults alone."""
        if shard.path.name.endswith(leaf.SUFFIXES):
            for _ in _json_people(shard.path, faults):
                pass
        elif shard.path.is_file():
            self._people(shard, faults)
        for person in _people_in(shard):
            x, sound = self._images(shard.path, person.files, faults)
            y = np.array(person.labels, dtype=np.int64)[sound]
            if len(y):
                yield ClientRows(person.name, x, y, np.full(len(y), shard.from_test))

    def _images(
        self, folder: Path, files: tuple[str, ...], faults: Faults
    ) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [sound, 3, size, size], and which of the files are sound, bool [files]."""
        images = [self._image(folder, file, faults) for file in files]
        sound = np.array([image is not None for image in images], dtype=bool)
        x = np.empty((int(sound.sum()), 3, self.size, self.size), np.uint8)
        for row, image in zip(x, (image for image in images if image is not None), strict=True):
            row[:] = image
        return x, sound

    def _image(self, folder: Path, file: str, faults: Faults) -> np.ndarray | None:
        try:
            return decode(Folder(folder).read(file), self.size)
        except Missing:
            message = f"{folder / file} is not there; unpack {FOLDER}.zip again"
            return faults.found("missing image", message)
        except Unreadable as error:
            message = f"{folder / file} cannot be decoded ({error}); it is cut short or damaged"
            return faults.found("unreadable image", f"{message}: unpack {FOLDER}.zip again")

    def _people(self, shard: Shard, faults: Faults) -> list[Person]:
        """The clients of the publisher's lists, by number of identity."""
        attributes, folder = (Path(item) for item in shard.items)
        identity = _identities(shard.path, faults)
        labels = _labels(attributes, faults)
        there = _images_in(folder)
        unlabelled = sorted(file for file in there & identity.keys() if file not in labels)
        if unlabelled:
            faults.found(
                "images without attributes",
                f"{attributes} has no line for {len(unlabelled)} of the {len(there)} images in "
                f"{folder}, the first {unlabelled[0]}; fetch the whole list",
            )
        files: dict[int, list[str]] = defaultdict(list)
        for file in sorted(there & identity.keys() & labels.keys()):
            files[identity[file]].append(file)
        enough = {who: own for who, own in sorted(files.items()) if len(own) >= self.min_images}
        absent = len(identity.keys() - there)
        leaf.note(faults, "listed image not there", f"{folder} lacks {absent} images", absent)
        few = sum(map(len, files.values())) - sum(map(len, enough.values()))
        what = f"{shard.path}: identities with fewer than min_images={self.min_images} images"
        leaf.note(faults, "image of a rare identity", what, few)
        return [
            Person(str(who), tuple(own), tuple(labels[file] for file in own))
            for who, own in enough.items()
        ]


def _places(source: Path) -> list[Path]:
    """Where lists and images may lie, the nearest first."""
    start = source if source.is_dir() else source.parent
    above = [start, start.parent, start.parent.parent]
    return [place for base in above for place in (base, base / "raw")]


def _image_folder(source: Path) -> Path:
    looked = [place / FOLDER for place in _places(source)]
    for folder in looked:
        inner = folder / FOLDER  # some archives hold the folder twice
        if folder.is_dir():
            return inner if inner.is_dir() else folder
    raise InputError(
        f"{source}: there is no image folder {FOLDER}; looked for {', '.join(map(str, looked[:4]))}"
        f"; unpack {FOLDER}.zip at the first of them"
    )


def _images_in(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.name.endswith((".jpg", ".png"))}


def _lists(source: Path, folder: Path) -> Shard:
    """The shard of the publisher's two lists."""
    for place in (source, source / "raw"):
        if (place / IDENTITIES).is_file() and (place / ATTRIBUTES).is_file():
            items = (str(place / ATTRIBUTES), str(folder))
            files = (place / ATTRIBUTES, folder)
            return Shard(IDENTITIES, place / IDENTITIES, items=items, files=files)
    raise InputError(
        f"{source} has neither LEAF's JSON files nor {IDENTITIES} and {ATTRIBUTES}, nor has "
        f"{source / 'raw'}; give the folder that holds them"
    )


def _shards_of(people: list[Person], listed: Shard, folder: Path) -> list[Shard]:
    """Shards of some 500 images of whole clients."""
    found: list[Shard] = []
    waiting: list[Person] = []
    held = 0
    for number, person in enumerate(people):
        waiting.append(person)
        held += len(person.files)
        if held >= _SHARD_IMAGES or number == len(people) - 1:
            name = f"{listed.name} images {len(found)}"
            files = (listed.path, *listed.files)
            found.append(Shard(name, folder, listed.from_test, tuple(waiting), files))
            waiting, held = [], 0
    return found


def _people_in(shard: Shard) -> list[Person]:
    return [item for item in shard.items if isinstance(item, Person)]


def _json_people(file: Path, faults: Faults) -> Iterator[Person]:
    label = leaf.integer_below(NUM_CLASSES)
    for user in leaf.read_users(file, faults):
        y, sound = leaf.labels_of(user, label, "0 or 1", faults)
        for number, x in enumerate(user.x):
            # A name with a folder in it could lead anywhere.
            if not isinstance(x, str) or x != os.path.basename(x) or x in ("", ".", ".."):
                sound[number] = False
                message = f"{user.where}, sample {number} has x {x!r}, not an image's file name"
                faults.found("wrong image name", f"{message}; correct it")
        if sound.any():
            files = tuple(x for x, good in zip(user.x, sound, strict=True) if good)
            yield Person(user.name, files, tuple(y[sound].tolist()))


def _identities(file: Path, faults: Faults) -> dict[str, int]:
    """The identity of each image."""
    found: dict[str, int] = {}
    for number, line in enumerate(_lines(file), start=1):
        columns = _columns(line)
        where = f"{file}, line {number}"
        if len(columns) != 2 or not columns[1].isdecimal():
            message = f"{where} is {line[:60]!r}, not an image's name and a number"
            faults.found("wrong columns", f"{message}; fetch the list again")
        elif columns[0] in found:
            faults.found("duplicate image", f"{where} has {columns[0]} again; remove one")
        else:
            found[columns[0]] = int(columns[1])
    return found


def _labels(file: Path, faults: Faults) -> dict[str, int]:
    """Each image's label, 1 where it smiles.

    The first line, the number of images, is not held against what follows: a list
    that was cut serves for the images that it covers.
    """
    lines = _lines(file)
    names = lines[1].split() if len(lines) > 1 else []
    if LABEL not in names:
        raise InputError(
            f"{file} has no attribute {LABEL!r} in its second line; fetch the publisher's list"
        )
    column, width = names.index(LABEL) + 1, len(names) + 1
    found: dict[str, int] = {}
    for number, line in enumerate(lines[2:], start=3):
        columns = _columns(line)
        where = f"{file}, line {number}"
        if len(columns) != width:
            message = f"{where} has {len(columns) or 'no plain'} columns, not {width}"
            faults.found("wrong columns", f"{message}; fetch the list again")
        elif columns[column] not in ("1", "-1"):
            message = f"{where}: {LABEL} is {columns[column]!r}, not 1 or -1"
            faults.found("unknown label", f"{message}; correct it")
        elif columns[0] in found:
            faults.found("duplicate image", f"{where} has {columns[0]} again; remove one")
        else:
            found[columns[0]] = int(columns[column] == "1")
    return found


def _lines(file: Path) -> list[str]:
    try:
        # As bytes, which have no more ends of lines than the list has.
        return [line.decode("latin-1") for line in file.read_bytes().splitlines()]
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error}); check its permissions") from None


def _columns(line: str) -> list[str]:
    """None where the line has damaged characters."""
    return line.split() if line.isascii() else []
