"""Fetching published files: resumed after a cut, checked by their sums, never half there.

Addresses and sums are those that torchvision's data sets publish. torchvision's
own downloader begins anew after every cut, so the bytes are fetched here; only
Google Drive, which needs the package gdown, is left to it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from subfleet.core.errors import InputError, RunFailed, did_you_mean
from subfleet.datasets.archives import Unreadable, open_tree

Progress = Callable[[str, int, int], None]
"""Called with (what, bytes done, bytes in all or 0)."""

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0
_TRIES = 5

BY_HAND = {
    "femnist": "LEAF's preprocess.sh makes it: https://github.com/TalwalkarLab/leaf",
    "shakespeare": (
        "it is Project Gutenberg's eBook 100 in its edition of 1994, which LEAF's get_data.sh "
        "fetches: https://github.com/TalwalkarLab/leaf"
    ),
    "sent140": "its publishers' page is http://help.sentiment140.com/for-students",
    "cinic10": "its publishers' page is https://github.com/BayesWatch/cinic-10",
    "mini_imagenet": (
        "its lists are at https://github.com/twitter/meta-learning-lstm; the images are "
        "ImageNet's, https://www.image-net.org"
    ),
    "tiny_imagenet": "its publisher has it at http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "glove": "its publishers' page is https://nlp.stanford.edu/projects/glove",
}
"""Sets that nothing here downloads, and where they come from."""

DOWNLOADS = ("cifar10", "cifar100", "mnist", "celeba")


class Remote(NamedTuple):
    """A published file: its name, its addresses in the order to try them, its MD5 sum."""

    name: str
    urls: tuple[str, ...]
    md5: str


def download(name: str, folder: Path, progress: Progress | None = None) -> Path:
    """Fetches a data set's files into `folder` and returns what to give as its source.

    Files that are there with the right sum are kept; a `.part` is resumed.
    InputError: there is no downloader, no network, a wrong sum; RunFailed: a full disk.
    """
    if name in BY_HAND:
        raise InputError(
            f"data.download: {name} has no downloader; {BY_HAND[name]}. Fetch it by hand into "
            f"{folder} and give --set data.source={folder}"
        )
    if name not in DOWNLOADS:
        raise InputError(
            f"data.download: nothing is known of {name!r}; {did_you_mean(name, DOWNLOADS)}"
        )
    if name == "celeba":
        return _celeba(folder, progress)
    for file in remotes(name):
        fetch(file, folder, progress)
    return folder


def remotes(name: str) -> list[Remote]:
    """The files of cifar10, cifar100 or mnist, as torchvision publishes them."""
    from torchvision.datasets import CIFAR10, CIFAR100, MNIST

    if name == "mnist":
        return [
            Remote(file, tuple(mirror + file for mirror in MNIST.mirrors), md5)
            for file, md5 in MNIST.resources
        ]
    kind = CIFAR100 if name == "cifar100" else CIFAR10
    return [Remote(kind.filename, (kind.url,), kind.tgz_md5)]


def fetch(file: Remote, folder: Path, progress: Progress | None = None) -> Path:
    """Fetches one file into `folder`, unless it is there with the right sum.

    Bytes gather in `<name>.part`; a later call goes on where they end, if the
    server can (HTTP Range). Only a file with the right sum gets its name.
    """
    path = folder / file.name
    if path.is_file() and _md5(path) == file.md5:
        return path
    part = path.with_name(f"{path.name}.part")
    reasons: list[str] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as sink:
            fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for url in file.urls:
                if _fetch_from(url, file, sink, part, reasons, progress):
                    part.rename(path)
                    return path
    except BlockingIOError:
        raise InputError(f"{part} is being fetched by another process; wait for it") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(
                f"the disk that holds {folder} is full; free some space, or set SUBFLEET_CACHE "
                "to a folder elsewhere, and run again: what was fetched is kept"
            ) from error
        raise InputError(
            f"{folder} cannot be written ({error}); set SUBFLEET_CACHE to a folder that can"
        ) from error
    kept = f" What was fetched is kept in {part}." if part.stat().st_size else ""
    if not kept:
        part.unlink()
    raise InputError(
        f"{file.name} could not be fetched: {'; '.join(reasons)}. Where there is no network, fetch "
        f"{file.urls[0]} by hand into {folder}; else run again.{kept}"
    )


def _fetch_from(
    url: str,
    file: Remote,
    sink: BinaryIO,
    part: Path,
    reasons: list[str],
    progress: Progress | None,
) -> bool:
    """Fills the part from one address, going on after cuts; says in `reasons` why it failed."""
    for _ in range(_TRIES):
        before = os.fstat(sink.fileno()).st_size
        reason = _append(url, file.name, sink, progress)
        size = os.fstat(sink.fileno()).st_size
        if not reason:
            found = _md5(part)
            if found == file.md5:
                return True
            # What an earlier call left may be of another version: once more from the start.
            sink.truncate(0)
            reason = f"{url} gave {size} bytes of MD5 sum {found}, not {file.md5}"
            if before:
                continue
        elif size > before:
            continue  # cut on the way: go on from there
        reasons.append(reason)
        return False
    reasons.append(f"{url} was cut off {_TRIES} times")
    return False


def _append(url: str, name: str, sink: BinaryIO, progress: Progress | None) -> str:
    """Appends what is missing of a file; returns why it is not whole, or ""."""
    start = os.fstat(sink.fileno()).st_size
    request = urllib.request.Request(url, headers={"User-Agent": "subfleet"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return ""  # all is there; the sum will tell
        return f"{url} answered {error.code} {error.reason}"
    except urllib.error.URLError as error:
        return f"{url} cannot be reached ({error.reason})"
    except (OSError, http.client.HTTPException) as error:
        return f"{url} cannot be reached ({error or type(error).__name__})"
    with answer:
        if answer.status != http.client.PARTIAL_CONTENT:
            sink.truncate(0)  # the server knows no ranges and sends all
            start = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            return f"{url} sent another range than was asked for"
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else 0
        try:
            while chunk := _read(answer):
                sink.write(chunk)
                start += len(chunk)
                if progress:
                    progress(f"fetch {name}", start, total)
        except _Cut as error:
            return f"{url} was cut off ({error})"
        finally:
            sink.flush()
    return f"{url} was cut off at {start} of {total} bytes" if start < total else ""


class _Cut(Exception):
    """The connection broke: apart from OSError, which here is the disk's."""


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Cut(str(error) or type(error).__name__) from None


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def unpack(archive: Path, folder: Path, progress: Progress | None = None) -> None:
    """Writes an archive's files below `folder`; those that are there whole are kept.

    InputError: paths outside the folder, a damaged entry.
    """
    tree = open_tree(archive)
    names = tree.names()
    for number, name in enumerate(names):
        path = folder / name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")
            try:
                part.write_bytes(tree.read(name))
            except Unreadable as error:
                raise InputError(
                    f"{archive}: {name} cannot be read ({error}); fetch it again"
                ) from None
            part.rename(path)
        if progress:
            progress(f"unpack {archive.name}", number + 1, len(names))


def _celeba(folder: Path, progress: Progress | None) -> Path:
    """CelebA's aligned images, attributes and identities, through torchvision and gdown."""
    wanted = ("img_align_celeba.zip", "list_attr_celeba.txt", "identity_CelebA.txt")
    page = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    if importlib.util.find_spec("gdown") is None:
        raise InputError(
            "data.download: celeba lies on Google Drive, which needs the package gdown; "
            f"install it (pip install gdown), or fetch {', '.join(wanted)} by hand from {page} "
            f"into {folder} and give --set data.source={folder}"
        )
    from torchvision.datasets import CelebA
    from torchvision.datasets.utils import download_file_from_google_drive

    for drive_id, md5, name in CelebA.file_list:
        if name in wanted:
            try:
                download_file_from_google_drive(drive_id, folder, name, md5)
            except Exception as error:  # gdown raises types of its own
                raise InputError(
                    f"{name} could not be fetched from Google Drive ({error}); run again later, "
                    f"or fetch it by hand from {page} into {folder}"
                ) from error
    unpack(folder / wanted[0], folder, progress)
    return folder
