"""A folder, a zip and a tar seen alike: names inside, and the bytes of one of them.

Nothing is ever unpacked. A name that leads outside (absolute, a drive, `..`) is
refused together with its archive, so are links and devices, and every read is
bounded by the bytes that come out, whatever an archive's headers say.
"""

from __future__ import annotations

import functools
import os
import stat
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from subfleet.core.errors import InputError

LIMIT = 64 << 20
"""Bytes that one file may have unless its reader says otherwise."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")


class Unreadable(ValueError):
    """Bytes that cannot be had or understood; the message says why, in a few words."""


class Missing(Unreadable):
    """There is no file of that name."""


class Tree(Protocol):
    """Files under relative names with forward slashes."""

    def names(self) -> list[str]:
        """All files' names, in an order that depends on the files alone."""
        ...

    def read(self, name: str, limit: int = LIMIT) -> bytes:
        """A file's bytes. Missing, or Unreadable: damaged, outside, more than `limit` bytes."""
        ...


def open_tree(path: Path) -> Tree:
    """The folder or archive at `path`. InputError: neither, damaged, or with names outside."""
    if path.is_dir():
        return Folder(path)
    if path.name.endswith(".zip"):
        return Zip(path)
    if path.name.endswith(ARCHIVES):
        return Tar(path)
    what = "is neither a folder nor an archive" if path.exists() else "does not exist"
    raise InputError(f"{path} {what}; give a folder or one of {', '.join(ARCHIVES)}")


def is_inside(name: str) -> bool:
    r"""Whether a name stays below the folder it is taken from, on any system.

    >>> [is_inside(name) for name in ("a/b.png", "/a", "a/../../b", "C:\\a", "..\\a")]
    [True, False, False, False, False]
    """
    parts = name.replace("\\", "/").split("/")
    drive = len(parts[0]) > 1 and parts[0][1] == ":"
    return bool(name) and parts[0] != "" and not drive and ".." not in parts and "\0" not in name


def refuse_outside(path: Path, names: Iterable[str]) -> None:
    """InputError for an archive with a name that leads outside its folder."""
    for name in names:
        if not is_inside(name):
            raise InputError(
                f"{path} has the entry {name!r}, a path outside its folder, and is refused; "
                "fetch it again from its publisher"
            )


class Folder:
    """The files below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """All files below, sorted by folder and name; hidden ones are left out."""
        found = []
        for folder, below, files in os.walk(self.root):
            below[:] = sorted(name for name in below if not name.startswith("."))
            start = Path(folder).relative_to(self.root).as_posix()
            prefix = "" if start == "." else f"{start}/"
            found += [prefix + name for name in sorted(files) if not name.startswith(".")]
        return found

    def read(self, name: str, limit: int = LIMIT) -> bytes:
        """See `Tree`."""
        if not is_inside(name):
            raise Unreadable("a path outside its folder")
        try:
            with (self.root / name).open("rb") as stream:
                return _bounded(stream.read(limit + 1), limit)
        except FileNotFoundError:
            raise Missing("no such file") from None
        except OSError as error:
            raise Unreadable(error.strerror or str(error)) from None


class Zip:
    """The entries of a zip, read in place."""

    def __init__(self, path: Path) -> None:
        try:
            facts = path.stat()
            self._zip = _opened_zip(path, facts.st_size, facts.st_mtime_ns)
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise InputError(
                f"{path} is no whole zip ({error}); it is cut short or damaged: fetch it again"
            ) from None

    def names(self) -> list[str]:
        """All entries but folders, in the archive's order."""
        return [entry.filename for entry in self._zip.infolist() if not entry.is_dir()]

    def read(self, name: str, limit: int = LIMIT) -> bytes:
        """See `Tree`."""
        try:
            with self._zip.open(name) as stream:
                return _bounded(stream.read(limit + 1), limit)
        except KeyError:
            raise Missing("no such entry") from None
        except Unreadable:
            raise
        except Exception as error:  # bad sums, methods, passwords: zipfile raises a dozen types
            raise Unreadable(str(error) or type(error).__name__) from None


# Listing a hundred thousand entries takes a second, and a zip is read in a hundred shards.
@functools.lru_cache(maxsize=2)
def _opened_zip(path: Path, size: int, mtime_ns: int) -> zipfile.ZipFile:
    del size, mtime_ns  # they make a changed file another one
    opened = zipfile.ZipFile(path)
    refuse_outside(path, opened.namelist())
    for entry in opened.infolist():
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise InputError(
                f"{path} has the link {entry.filename!r} and is refused; "
                "give an archive of plain files"
            )
    return opened


class Tar:
    """The members of a tar, plain or gz; reading one means reading what is before it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _open(self) -> tarfile.TarFile:
        return tarfile.open(self.path, "r:*")

    def names(self) -> list[str]:
        """All members but folders, in the archive's order; reads the archive once."""
        try:
            with self._open() as tar:
                members = tar.getmembers()
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise InputError(
                f"{self.path} is no whole tar ({error}); it is cut short or damaged: fetch it again"
            ) from None
        refuse_outside(self.path, [member.name for member in members])
        for member in members:
            if not (member.isfile() or member.isdir()):
                raise InputError(
                    f"{self.path} has {member.name!r}, a link or a device, and is refused; "
                    "give an archive of plain files"
                )
        return [member.name for member in members if member.isfile()]

    def read(self, name: str, limit: int = LIMIT) -> bytes:
        """See `Tree`."""
        if not is_inside(name):
            raise Unreadable("a path outside its folder")
        try:
            with self._open() as tar:
                for member in tar:  # stops at the member; getmember would read on to the end
                    if member.name == name and member.isfile():
                        stream = tar.extractfile(member)
                        assert stream is not None  # a plain file has bytes
                        return _bounded(stream.read(limit + 1), limit)
        except (tarfile.TarError, EOFError, OSError) as error:
            raise Unreadable(str(error)) from None
        except Unreadable:
            raise
        except Exception as error:  # zlib's own errors, and others of a damaged stream
            raise Unreadable(str(error) or type(error).__name__) from None
        raise Missing("no such member")


def _bounded(data: bytes, limit: int) -> bytes:
    if len(data) > limit:
        raise Unreadable(f"more than {limit} bytes")
    return data
