"""Clients' own states between rounds, on disk: a log of rows and an index in memory.

A row is one client's tree. Rows are only ever appended to segment files; the
index says where each client's newest row is. A snapshot closes the segment and
takes a hard link of each and a copy of the index, so that it costs what has
changed, and no later write can touch it. When more than half of the bytes are
superseded, the living rows move to a new segment.

Plain reads and appends, not mappings: through a mapping a full disk or a cut
file is a SIGBUS that kills the process; here it is an error with a message.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from subfleet.core.errors import InputError, RunFailed
from subfleet.platform.files import disk_guard, write_atomic, write_synced

Row = dict[str, np.ndarray]
_INDEX_DTYPE = np.dtype([("segment", "<i4"), ("layout", "<i4"), ("offset", "<i8")])
_ALIGN = 8  # so that every leaf's bytes start aligned for its dtype
_MERGE_BYTES = 8 << 20  # rows moved by one write of a compaction


class _Leaf(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes from the start of the row


class _Layout(NamedTuple):
    leaves: tuple[_Leaf, ...]
    num_bytes: int


def _layout(key: Sequence[tuple[str, str, Sequence[int]]]) -> _Layout:
    leaves, start = [], 0
    for name, dtype, shape in key:
        leaves.append(_Leaf(name, dtype, tuple(shape), start))
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        start += -(-size // _ALIGN) * _ALIGN
    return _Layout(tuple(leaves), start)


class KeptStore:
    """Rows by client id; each row may have leaves and shapes of its own, and change them.

    A client that was never written costs nothing, one that was 24 bytes of
    memory and its row on disk. Not for several threads or processes at once.

    >>> import tempfile
    >>> store = KeptStore(Path(tempfile.mkdtemp()))
    >>> store.write([7], [{"bn.mean": np.array([1.0, 2.0], np.float32)}])
    >>> store.read([7, 8])
    [{'bn.mean': array([1., 2.], dtype=float32)}, None]
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        """An empty store in `folder`; whatever lies there is removed (see `restore`)."""
        self.folder = Path(folder)
        self._handles: dict[int, int] = {}
        self._clear()

    def _clear(self) -> None:
        self.close()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        self._ids = np.empty(0, np.int64)  # sorted
        self._index = np.empty(0, _INDEX_DTYPE)
        self._layouts: list[_Layout] = []
        self._layout_numbers: dict[tuple, int] = {}
        self._bytes: dict[int, int] = {}  # by segment, superseded rows included
        self._active: int | None = None
        self._next = 0

    def __len__(self) -> int:
        """Clients that have a row."""
        return len(self._ids)

    @property
    def ids(self) -> np.ndarray:
        """int64[len(self)], sorted."""
        return self._ids.copy()

    @property
    def num_bytes(self) -> int:
        """Bytes on disk, superseded rows included, index left out."""
        return sum(self._bytes.values())

    def read(self, ids: Sequence[int] | np.ndarray) -> list[Row | None]:
        """The rows of these clients, copies; None for a client without one.

        Raises `RunFailed` when a segment is shorter than its index says.
        """
        wanted = np.asarray(ids, np.int64)
        at, found = self._find(wanted)
        return [self._row(self._index[i]) if ok else None for i, ok in zip(at, found, strict=True)]

    def read_ahead(
        self,
        ids: Sequence[int] | np.ndarray,
        unwritten: Iterable[tuple[Sequence[int] | np.ndarray, Sequence[Mapping[str, Any]]]],
    ) -> list[Row | None]:
        """What `read` would return after a `write` of each of `unwritten`, (ids, trees)."""
        wanted = np.asarray(ids, np.int64).tolist()
        rows = dict(zip(wanted, self.read(wanted), strict=True))
        for clients, trees in unwritten:
            for client, tree in zip(np.asarray(clients).tolist(), trees, strict=True):
                if client in rows:
                    rows[client] = {name: _array(leaf) for name, leaf in tree.items()}
        return [rows[client] for client in wanted]

    def _find(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.searchsorted(self._ids, wanted)
        if not len(self._ids):
            return at, np.zeros(len(wanted), bool)
        return at, self._ids[np.minimum(at, len(self._ids) - 1)] == wanted

    def _row(self, entry: Any) -> Row:
        layout = self._layouts[entry["layout"]]
        data = bytearray(self._bytes_of(entry))
        row = {}
        for leaf in layout.leaves:
            count = int(np.prod(leaf.shape, dtype=np.int64))
            flat = np.frombuffer(data, leaf.dtype, count, leaf.start) if count else []
            row[leaf.name] = np.asarray(flat, leaf.dtype).reshape(leaf.shape)
        return row

    def _bytes_of(self, entry: Any) -> bytes:
        segment, offset = int(entry["segment"]), int(entry["offset"])
        size = self._layouts[entry["layout"]].num_bytes
        data = os.pread(self._handle(segment), size, offset)
        if len(data) != size:
            raise RunFailed(
                f"{self._path(segment)}: cut short (row at byte {offset} has {len(data)} of {size} "
                "bytes); --resume from the last checkpoint"
            )
        return data

    def _path(self, segment: int) -> Path:
        return self.folder / f"segment-{segment:06d}.rows"

    def _handle(self, segment: int) -> int:
        if segment not in self._handles:
            self._handles[segment] = os.open(self._path(segment), os.O_RDWR | os.O_CREAT, 0o644)
        return self._handles[segment]

    def write(
        self, ids: Sequence[int] | np.ndarray, trees: Sequence[Mapping[str, Any] | None]
    ) -> None:
        """Replace the rows of these clients; None forgets a client's.

        Leaves are arrays or CPU tensors of any NumPy number type. Raises
        `InputError` for other leaves or repeated ids, and `RunFailed` on a full
        disk; all rows can then still be read.
        """
        wanted = np.asarray(ids, np.int64)
        if len(wanted) != len(trees) or len(np.unique(wanted)) != len(wanted):
            raise InputError(f"{len(wanted)} client ids for {len(trees)} states; give each id once")
        gone = np.array([tree is None for tree in trees], bool)
        rows = [
            self._encode(i, tree) for i, tree in zip(wanted, trees, strict=True) if tree is not None
        ]
        places = self._append([number for number, _ in rows], [data for _, data in rows])
        self._put(wanted[~gone], places)
        if gone.any():
            stay = ~np.isin(self._ids, wanted[gone])
            self._ids, self._index = self._ids[stay], self._index[stay]
        self._drop_dead()
        if 2 * self._living_bytes() < self.num_bytes:
            self._compact()

    def _encode(self, client: int, tree: Mapping[str, Any]) -> tuple[int, bytes]:
        leaves = {name: _array(leaf) for name, leaf in tree.items()}
        for name, leaf in leaves.items():
            if leaf.dtype.kind not in "biufc":
                raise InputError(
                    f"kept state of client {client}: {name!r} is {leaf.dtype}; use numbers"
                )
        little = {name: leaf.astype(leaf.dtype.newbyteorder("<")) for name, leaf in leaves.items()}
        key = tuple((name, leaf.dtype.str, leaf.shape) for name, leaf in little.items())
        number = self._layout_number(key)
        row = bytearray(self._layouts[number].num_bytes)
        for place, leaf in zip(self._layouts[number].leaves, little.values(), strict=True):
            row[place.start : place.start + leaf.nbytes] = leaf.tobytes()
        return number, bytes(row)

    def _layout_number(self, key: tuple) -> int:
        if key not in self._layout_numbers:
            self._layout_numbers[key] = len(self._layouts)
            self._layouts.append(_layout(key))
        return self._layout_numbers[key]

    def _append(self, layouts: Sequence[int], rows: Sequence[bytes]) -> np.ndarray:
        """Append to the active segment; returns the rows' places, _INDEX_DTYPE[len(rows)]."""
        places = np.empty(len(rows), _INDEX_DTYPE)
        if not rows:
            return places
        segment = self._next if self._active is None else self._active
        self._active, self._next = segment, max(self._next, segment + 1)
        end = self._bytes.get(segment, 0)
        sizes = np.array([len(row) for row in rows], np.int64)
        places["segment"], places["layout"] = segment, layouts
        places["offset"] = end + np.cumsum(sizes) - sizes
        self._write_at(segment, end, b"".join(rows))
        self._bytes[segment] = end + int(sizes.sum())
        return places

    def _write_at(self, segment: int, offset: int, data: bytes) -> None:
        handle = self._handle(segment)
        with disk_guard(self._path(segment), len(data)):
            try:
                view, at = memoryview(data), offset
                while view:
                    written = os.pwrite(handle, view, at)
                    view, at = view[written:], at + written
            except BaseException:
                os.ftruncate(handle, offset)
                raise

    def _put(self, wanted: np.ndarray, places: np.ndarray) -> None:
        at, found = self._find(wanted)
        self._index[at[found]] = places[found]
        order = np.argsort(wanted[~found])
        new, new_places = wanted[~found][order], places[~found][order]
        where = np.searchsorted(self._ids, new)
        self._ids = np.insert(self._ids, where, new)
        self._index = np.insert(self._index, where, new_places)

    def _living_bytes(self) -> int:
        sizes = np.array([layout.num_bytes for layout in self._layouts], np.int64)
        return int(sizes[self._index["layout"]].sum()) if len(self._index) else 0

    def _drop_dead(self) -> None:
        """Remove closed segments without a living row."""
        living = set(np.unique(self._index["segment"]).tolist())
        for segment in [s for s in self._bytes if s not in living and s != self._active]:
            self._remove(segment)

    def _remove(self, segment: int) -> None:
        os.close(self._handle(segment))
        del self._handles[segment], self._bytes[segment]
        self._path(segment).unlink()

    def _compact(self) -> None:
        """Move the living rows, in order of client, to a segment of their own."""
        old, self._active = list(self._bytes), None
        moved = np.empty(0, _INDEX_DTYPE)
        first = 0
        while first < len(self._index):
            part, size = [], 0
            while first + len(part) < len(self._index) and size < _MERGE_BYTES:
                part.append(self._bytes_of(self._index[first + len(part)]))
                size += len(part[-1])
            layouts = self._index["layout"][first : first + len(part)].tolist()
            moved = np.concatenate([moved, self._append(layouts, part)])
            first += len(part)
        self._index = moved
        for segment in old:
            self._remove(segment)

    def snapshot(self, folder: str | os.PathLike) -> None:
        """Put the store as it is now into `folder` (new); later writes do not touch it.

        Segments are hard links where the file system has them, else copies.
        """
        folder = Path(folder)
        folder.mkdir(parents=True)
        self._active = None  # what is linked is never written again
        for segment in sorted(self._bytes):
            os.fsync(self._handle(segment))
            _link(self._path(segment), folder)
        layouts = [[list(leaf[:3]) for leaf in layout.leaves] for layout in self._layouts]
        head = {"clients": len(self._ids), "next": self._next, "layouts": layouts}
        data = self._ids.astype("<i8").tobytes() + self._index.tobytes()
        with disk_guard(folder / "index.bin", len(data)):
            write_synced(folder / "index.bin", data)
        write_atomic(folder / "index.json", json.dumps(head).encode())

    def restore(self, folder: str | os.PathLike) -> None:
        """Become what `snapshot(folder)` saw; everything since is dropped.

        Raises `InputError` when `folder` holds no whole snapshot.
        """
        folder = Path(folder)
        try:
            head = json.loads((folder / "index.json").read_text())
            data = (folder / "index.bin").read_bytes()
            count, cut = head["clients"], 8 * head["clients"]
            ids = np.frombuffer(data[:cut], "<i8").astype(np.int64)
            index = np.frombuffer(data[cut:], _INDEX_DTYPE).copy()
            if len(ids) != count or len(index) != count:
                raise ValueError(f"index.bin does not hold {count} clients")
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{folder}: no whole snapshot of the kept states ({error}); "
                "resume from an earlier checkpoint"
            ) from error
        self._clear()
        self._ids, self._index, self._next = ids, index, head["next"]
        for key in head["layouts"]:
            self._layout_number(tuple((name, dtype, tuple(shape)) for name, dtype, shape in key))
        for path in sorted(folder.glob("segment-*.rows")):
            _link(path, self.folder)
            self._bytes[int(path.stem.removeprefix("segment-"))] = path.stat().st_size

    def close(self) -> None:
        """Close the files; the next call opens them again."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def _array(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.detach() if hasattr(leaf, "detach") else leaf)


def _link(file: Path, folder: Path) -> None:
    try:
        os.link(file, folder / file.name)
    except OSError:  # another file system, or one without hard links
        with disk_guard(folder / file.name, file.stat().st_size):
            shutil.copyfile(file, folder / file.name)
