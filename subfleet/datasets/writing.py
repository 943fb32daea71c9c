"""Writing a store: as a whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from subfleet.core.errors import InputError, RunFailed
from subfleet.core.scaling import Scaling
from subfleet.datasets.federation import offsets_of
from subfleet.datasets.reader import ClientRows
from subfleet.datasets.store import VERSION, read_manifest

_BATCH_BYTES = 64 << 20


def write_store(
    path: str | Path,
    clients: Iterable[ClientRows],
    *,
    name: str,
    num_classes: int,
    input_shape: tuple[int, ...],
    scale: Scaling,
    source: dict,
) -> None:
    """Writes a store as a whole or not at all: into a folder beside `path`, then renamed.

    Clients are numbered in the order given; one with fewer than 2 rows is left out
    and named in the manifest under "dropped". InputError: no client is left, or
    the folder cannot be written. RunFailed: the disk is full.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        counts = _write_files(folder, clients, num_classes, input_shape)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(folder.iterdir())
        }
        manifest = {"version": VERSION, "name": name, **counts, "num_classes": num_classes}
        manifest |= {"input_shape": list(input_shape), "scale": list(scale)}
        manifest |= {"source": source, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in [*folder.iterdir(), folder]:
            _sync(file)
        _put_in_place(folder, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(
                f"the disk that holds {path.parent} is full; "
                "free some space or set SUBFLEET_CACHE to a folder elsewhere"
            ) from error
        raise InputError(
            f"{path} cannot be written ({error}); set SUBFLEET_CACHE to a folder that can"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_files(
    folder: Path, clients: Iterable[ClientRows], num_classes: int, input_shape: tuple[int, ...]
) -> dict:
    """Writes all files but the manifest; returns its counts."""
    names: list[str] = []
    dropped: list[str] = []
    sizes: list[int] = []
    histograms: list[np.ndarray] = []

    def kept() -> Iterator[ClientRows]:
        for client in clients:
            if len(client.y) < 2:
                dropped.append(client.name)
                continue
            names.append(client.name)
            sizes.append(len(client.y))
            histograms.append(np.bincount(client.y, minlength=num_classes))
            yield client

    _write_rows(folder / "rows.arrow", kept(), int(np.prod(input_shape)))
    if not names:
        raise InputError(
            f"none of the {len(dropped)} users has 2 samples, so none can be split; "
            "give users with more samples"
        )
    histogram = np.stack(histograms)
    smallest = np.min_scalar_type(int(histogram.max()))
    np.save(folder / "labels.npy", histogram.astype(smallest))
    np.save(folder / "offsets.npy", offsets_of(np.array(sizes)))
    (folder / "clients.json").write_text(json.dumps(names))
    return {"clients": len(names), "rows": sum(sizes), "dropped": dropped}


def _write_rows(file: Path, clients: Iterable[ClientRows], width: int) -> None:
    """Writes the Arrow file, in batches that end where a client does."""
    waiting: list[ClientRows] = []
    writer = None
    with pa.OSFile(str(file), "wb") as sink:

        def flush() -> None:
            nonlocal writer
            batch = _record_batch(waiting, width)
            if writer is None:
                writer = pa.ipc.new_file(sink, batch.schema)
            writer.write_batch(batch)
            waiting.clear()

        held = 0
        for client in clients:
            waiting.append(client)
            held += client.x.nbytes
            if held >= _BATCH_BYTES:
                flush()
                held = 0
        if waiting:
            flush()
        if writer is not None:
            writer.close()


def _record_batch(clients: list[ClientRows], width: int) -> pa.RecordBatch:
    flat = pa.array(np.concatenate([client.x.reshape(-1) for client in clients]))
    columns = {
        "x": pa.FixedSizeListArray.from_arrays(flat, width),
        "y": pa.array(np.concatenate([client.y for client in clients]).astype(np.int64)),
        "group": pa.array(np.concatenate([repeats(client.x) for client in clients])),
        "from_test": pa.array(np.concatenate([c.from_test for c in clients]).astype(np.uint8)),
    }
    return pa.RecordBatch.from_pydict(columns)


def repeats(x: np.ndarray) -> np.ndarray:
    """For each row the number of the first row equal to it, int32 [rows].

    >>> repeats(np.array([[1, 2], [3, 4], [1, 2]], np.uint8))
    array([0, 1, 0], dtype=int32)
    """
    rows = np.ascontiguousarray(x).reshape(len(x), -1)
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return first[which].astype(np.int32)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(folder: Path, path: Path) -> None:
    """Renames `folder` to `path`; a sound store that another process put there first stays."""
    if path.exists():
        try:
            read_manifest(path)
        except InputError:
            shutil.rmtree(path)
        else:
            return
    try:
        folder.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Lost a race: what is there now must be whole, else this raises.
        read_manifest(path)
