"""Writing that is either whole or absent, and a full disk told as one clear failure."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from subfleet.core.errors import RunFailed

# A quota and a file-size limit leave the user with the same thing to do as a full disk.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def to_jsonable(value: Any) -> Any:
    """The value in plain JSON types; what JSON cannot say (NaN, infinities) becomes None.

    >>> to_jsonable({"a": float("nan"), 3: np.arange(2), "p": Path("x/y")})
    {'a': None, '3': [0, 1], 'p': 'x/y'}
    """
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def json_bytes(value: Any, *, indent: int | None = None) -> bytes:
    """One JSON document and a newline, UTF-8."""
    return (json.dumps(to_jsonable(value), indent=indent, allow_nan=False) + "\n").encode()


@contextmanager
def disk_guard(path: Path, num_bytes: int) -> Iterator[None]:
    """Turn "no space left" within the block into `RunFailed`; other errors pass.

    `num_bytes` is what writing `path` needs; the block cleans up after itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise RunFailed(_full_message(path, num_bytes)) from error


def _full_message(path: Path, num_bytes: int) -> str:
    folder = next((parent for parent in path.parents if parent.is_dir()), Path("/"))
    free = shutil.disk_usage(folder).free
    last = last_checkpoint(path)
    kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
    remedy = "free space and --resume" if last else "free space and start again"
    return (
        f"disk full while writing {path} (needs {num_bytes} bytes, {free} free); {kept}; {remedy}"
    )


def last_checkpoint(path: Path) -> Path | None:
    """The newest complete checkpoint of the run folder that `path` lies in, if any."""
    for parent in path.parents:
        found = sorted(parent.glob("checkpoints/round-*/manifest.json"))
        if found:
            return found[-1].parent
    return None


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; a rename alone may be lost with the power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write and fsync; not atomic by itself."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes) -> None:
    """Replace the file by `data`: temporary file, fsync, rename, fsync of the folder.

    Raises `RunFailed` on a full disk; the old file is then untouched and no
    temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with disk_guard(path, len(data)):
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Make every file and folder below durable, deepest first, then `folder` itself."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            handle = os.open(Path(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(root))
