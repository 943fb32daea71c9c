"""Writing a store: as a whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from subfleet.core.errors import InputError, RunFailed
from subfleet.datasets.federation import offsets_of
from subfleet.datasets.reader import ClientRows, Layout
from subfleet.datasets.store import VERSION, read_manifest

_BATCH_BYTES = 64 << 20


def write_store(
    path: str | Path,
    clients: Iterable[ClientRows],
    *,
    name: str,
    layout: Layout,
    source: dict,
    found: dict | None = None,
    embedding: np.ndarray | None = None,
) -> None:
    """Writes a store as a whole or not at all: into a folder beside `path`, then renamed.

    Clients are numbered in the order given; one with fewer than 2 rows is left out,
    counted in the manifest and named in `dropped.json`. `source` and `found` (what
    was left out or warned of) go into the manifest as they are; `embedding` holds a
    vector for each token, float32 [vocabulary, size]. InputError: no client is left,
    or the folder cannot be written. RunFailed: the disk is full.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    with disk_errors(path), swept(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        counts = _write_files(folder, clients, layout)
        if embedding is not None:
            np.save(folder / "embedding.npy", embedding)
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(folder.iterdir())
        }
        manifest = {"version": VERSION, "name": name, **counts, **_described(layout)}
        manifest |= {"source": source, "found": found or {}, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in [*folder.iterdir(), folder]:
            _sync(file)
        _put_in_place(folder, path)


@contextmanager
def swept(folder: Path) -> Iterator[None]:
    """Removes `folder` in the end, whatever happened."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """RunFailed for a full disk, InputError where `path` cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunFailed(
                f"the disk that holds {path.parent} is full; free some space, set "
                "SUBFLEET_CACHE to a folder elsewhere, or give another --out"
            ) from error
        raise InputError(
            f"{path} cannot be written ({error}); set SUBFLEET_CACHE to a folder that can, or "
            "give another --out"
        ) from error


def _described(layout: Layout) -> dict:
    """What a manifest says of the rows."""
    kept = vars(layout).items()
    facts = {key: value for key, value in kept if key not in ("dtype", "spread")}
    return facts | {"input_shape": list(layout.input_shape), "scale": list(layout.scale)}


def _write_files(folder: Path, clients: Iterable[ClientRows], layout: Layout) -> dict:
    """Writes all files but the manifest; returns its counts."""
    names: list[str] = []
    dropped: list[str] = []
    lost = 0
    sizes: list[int] = []
    histograms: list[np.ndarray] = []

    def kept() -> Iterator[ClientRows]:
        nonlocal lost
        for client in clients:
            if layout.natural and len(client.y) < 2:
                dropped.append(client.name)
                lost += len(client.y)
                continue
            names.append(client.name)
            sizes.append(len(client.y))
            histograms.append(np.bincount(client.y, minlength=layout.num_classes))
            yield client

    _write_rows(folder / "rows.arrow", kept(), int(np.prod(layout.input_shape)))
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
    (folder / "dropped.json").write_text(json.dumps(dropped))
    return {
        "clients": len(names),
        "rows": sum(sizes),
        "dropped": len(dropped),
        "rows_dropped": lost,
    }


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


def verify_store(path: Path, progress: Callable[[str, int, int], None] | None = None) -> None:
    """InputError unless every file of the store has the sum that its manifest says.

    `progress(what, done, total)` hears of each file that is checked.
    """
    files = read_manifest(path)["files"]
    for number, (name, facts) in enumerate(files.items()):
        if progress:
            progress("files checked", number, len(files))
        found = _sha256(path / name)
        if found != facts["sha256"]:
            raise InputError(
                f"{path / name} has sha256 {found}, not {facts['sha256']}; prepare the data again"
            )


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
