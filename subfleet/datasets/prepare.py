"""From a publisher's files to a store: shards are parsed apart, then put in order.

Each shard becomes a part on disk, marked when it is whole, so that a run that
was killed goes on where it was. The parts are then gathered client by client
into the store, a batch in memory at a time. Neither step needs memory for more
than a shard or a batch.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from subfleet.core.errors import InputError
from subfleet.datasets.reader import ClientRows, Faults, Layout, Reader, Shard
from subfleet.datasets.store import VERSION, read_manifest
from subfleet.datasets.writing import disk_errors, write_store

_MOST_WARNINGS = 100
PAGE_ROWS = 1024  # rows of a set without clients that lie together as if they were one
Progress = Callable[[str, int, int], None]
Parse = Callable[[Shard], "Part"]
ParseAll = Callable[[Parse, list[Shard]], Iterable["Part"]]


@dataclass(frozen=True)
class Part:
    """A parsed shard: whose rows lie where in its arrays, and what was wrong with it.

    `found` holds what `Faults` counted, its examples, and the warnings, as plain JSON.
    """

    name: str
    folder: str
    clients: list[str]
    sizes: list[int]
    found: dict[str, Any]


def prepare(
    reader: Reader,
    source: Path,
    out: Path,
    *,
    skip_bad: bool = False,
    parse_all: ParseAll | None = None,
    progress: Progress | None = None,
) -> None:
    """Parses `source` and writes the store `out`, as a whole or not at all.

    `parse_all(parse, shards)` yields the parts in any order, from wherever it
    parsed them (`subfleet.datasets.parallel.parse_all` does so on Ray); without it
    they are parsed here, one after the other. A second call after a kill parses only
    what is missing. With `skip_bad` what cannot be used is left out, and counted in
    the manifest under "faults". InputError: see the reader; RunFailed: a full disk.
    """
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        shards, layout = reader.shards(source), reader.layout(source)
    told = [str(warning.message) for warning in warned]
    with _alone(out):
        if _is_whole(out):
            return  # another process was faster
        scratch = _scratch(out, digest(reader, source, shards, skip_bad))
        try:
            parse = functools.partial(parse_shard, reader, layout, scratch, skip_bad)
            parts = _parts(shards, scratch, parse, parse_all or map, progress)
            _write(reader, source, out, shards, layout, parts, told, skip_bad, progress)
        except InputError:
            # The source must change, and then nothing of this is of use.
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One process at a time prepares a store; others wait until it has ended, or was killed."""
    with disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # In the system's folder, so that nothing is left beside the store.
        name = hashlib.sha256(f"{os.getuid()} {out.absolute()}".encode()).hexdigest()[:24]
        lock = os.open(
            Path(tempfile.gettempdir()) / f"subfleet-{name}.lock", os.O_CREAT | os.O_RDWR
        )
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_whole(out: Path) -> bool:
    try:
        read_manifest(out)
    except InputError:
        return False
    return True


def _write(
    reader: Reader,
    source: Path,
    out: Path,
    shards: list[Shard],
    layout: Layout,
    parts: list[Part],
    told: list[str],
    skip_bad: bool,
    progress: Progress | None,
) -> None:
    """Puts the parts in order, into the store."""
    faults = Faults(skip=skip_bad)
    table = _clients(parts, [shard.from_test for shard in shards], layout, faults)
    if not table:
        why = "".join(
            f"; {n} x {kind}: {faults.examples[kind]}" for kind, n in faults.counts.items()
        )
        raise InputError(f"{source} has no rows that can be used; check the files{why}")
    told = [*told, *(text for part in parts for text in part.found["warnings"])]
    vectors = getattr(reader, "embedding", None)
    write_store(
        out,
        _gathered(table, progress),
        name=reader.name,
        layout=layout,
        source={
            "folder": str(source.resolve()),
            "fingerprint": digest(reader, source, shards, skip_bad),
            **{"shards": len(shards), "options": options(reader)},
        },
        found={
            **{"counts": dict(faults.counts), "examples": faults.examples},
            "warnings": list(dict.fromkeys(told))[:_MOST_WARNINGS],
        },
        embedding=None if vectors is None else vectors(),
    )


def options(reader: Reader) -> dict[str, Any]:
    """The reader's own options, as plain JSON."""
    return json.loads(json.dumps(vars(reader), default=str))


def digest(reader: Reader, source: Path, shards: list[Shard], skip_bad: bool) -> str:
    """A hash (sha256, hexadecimal) of what a store follows from, by files' names, sizes, times."""
    facts: list[Any] = [VERSION, reader.name, options(reader), skip_bad, str(source.resolve())]
    named = {Path(text) for text in vars(reader).values() if isinstance(text, str) and text}
    read = {path for shard in shards for path in (shard.path, *shard.files)}
    for path in sorted(read | {path for path in named if path.is_file()}):
        stat = path.stat()
        facts.append([str(path), stat.st_size, stat.st_mtime_ns])
    facts.append([[shard.name, repr(shard.items)] for shard in shards])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _scratch(out: Path, fingerprint: str) -> Path:
    """The folder of the parts; those of former sources are swept away."""
    mine = out.with_name(f".{out.name}.parts-{fingerprint[:16]}")
    for old in out.parent.glob(f".{out.name}.parts-*"):
        if old != mine:
            shutil.rmtree(old, ignore_errors=True)
    with disk_errors(out):
        mine.mkdir(exist_ok=True)
    return mine


def _parts(
    shards: list[Shard],
    scratch: Path,
    parse: Parse,
    parse_all: ParseAll,
    progress: Progress | None,
) -> list[Part]:
    """The parts of all shards, in their order; only those that are missing are parsed."""
    parts = {shard.name: _finished(_part_folder(scratch, shard.name)) for shard in shards}
    waiting = [shard for shard in shards if parts[shard.name] is None]
    done = len(shards) - len(waiting)
    if progress:
        progress("read", done, len(shards))
    for part in parse_all(parse, waiting):
        parts[part.name] = part
        done += 1
        if progress:
            progress("read", done, len(shards))
    return [part for part in parts.values() if part is not None]


# --- a shard to a part ---------------------------------------------------------------------------


def parse_shard(
    reader: Reader, layout: Layout, scratch: Path, skip_bad: bool, shard: Shard
) -> Part:
    """Parses one shard into a folder of arrays; whole, or not there at all."""
    faults = Faults(skip=skip_bad)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            rows = list(reader.read(shard, faults))
        except OSError as error:
            raise InputError(f"{shard.path} cannot be read ({error}); check it") from error
    with disk_errors(scratch):
        return _saved(shard, rows, layout, scratch, faults, [str(w.message) for w in warned])


def _saved(
    shard: Shard,
    rows: list[ClientRows],
    layout: Layout,
    scratch: Path,
    faults: Faults,
    told: list[str],
) -> Part:
    """Writes the arrays of a part, and last what says that they are whole."""
    folder = _part_folder(scratch, shard.name)
    unfinished = folder.with_name(f"{folder.name}.{os.uname().nodename}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    empty = np.empty((0, *layout.input_shape), layout.dtype)
    x = np.concatenate([empty, *(client.x for client in rows)])
    np.save(unfinished / "x.npy", x.astype(layout.dtype, copy=False))
    for name, kind in (("y", np.int64), ("from_test", np.bool_)):
        pieces = [np.empty(0, kind), *(getattr(client, name) for client in rows)]
        np.save(unfinished / f"{name}.npy", np.concatenate(pieces).astype(kind, copy=False))
    part = Part(
        name=shard.name,
        folder=str(folder),
        clients=[client.name for client in rows],
        sizes=[len(client.y) for client in rows],
        found={
            **{"counts": dict(faults.counts), "examples": faults.examples},
            "warnings": told,
        },
    )
    (unfinished / "part.json").write_text(json.dumps(vars(part)))
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return part


def _part_folder(scratch: Path, name: str) -> Path:
    return scratch / hashlib.sha256(name.encode()).hexdigest()[:24]


def _finished(folder: Path) -> Part | None:
    """The part of a folder; None where it is not there yet."""
    try:
        return Part(**json.loads((folder / "part.json").read_text()))
    except (FileNotFoundError, ValueError):
        return None


# --- parts to clients ----------------------------------------------------------------------------

Piece = tuple[Part, int, int]  # rows [first, last) of a part
Table = list[tuple[str, list[Piece]]]


def _clients(parts: list[Part], from_test: list[bool], layout: Layout, faults: Faults) -> Table:
    """Who has which pieces, clients in order of their names, pieces in that of the source."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    seen: dict[tuple[str, bool], str] = {}
    for part, is_test in zip(parts, from_test, strict=True):
        faults.add(Faults(True, Counter(part.found["counts"]), part.found["examples"]))
        first = 0
        for name, size in zip(part.clients, part.sizes, strict=True):
            last = first + size
            key = (name, is_test)
            if layout.spread or key not in seen:
                pieces[name].append((part, first, last))
            else:
                faults.found(
                    "duplicate user",
                    f"user {name!r} is in {seen[key]} and again in {part.name}, both of the "
                    f"{'test' if key[1] else 'train'} part; a user may be once in each part: "
                    "remove one",
                )
            seen.setdefault(key, part.name)
            first = last
    ordered = sorted(pieces.items())
    return ordered if layout.natural else list(_pages(ordered))


def _pages(table: Table) -> Iterator[tuple[str, list[Piece]]]:
    """The rows of each pool cut into pages: a store keeps what it calls a client in one batch."""
    for name, pieces in table:
        page: list[Piece] = []
        number = held = 0
        for part, first, last in pieces:
            while first < last:
                taken = min(last - first, PAGE_ROWS - held)
                page.append((part, first, first + taken))
                first, held = first + taken, held + taken
                if held == PAGE_ROWS:
                    yield f"{name} {number}", page
                    page, held, number = [], 0, number + 1
        if page:
            yield f"{name} {number}", page


def _gathered(table: Table, progress: Progress | None) -> Iterator[ClientRows]:
    # A part serves many clients: its files are mapped once, and not all parts' at a time.
    arrays = functools.lru_cache(maxsize=100)(_mapped)
    for number, (name, pieces) in enumerate(table):
        columns = [
            [column[first:last] for column in arrays(part.folder)] for part, first, last in pieces
        ]
        x, y, test = (np.concatenate(column) for column in zip(*columns, strict=True))
        yield ClientRows(name, x, y, test)
        if progress:
            progress("write", number + 1, len(table))


def _mapped(folder: str) -> list[np.ndarray]:
    """x, y and from_test of a part's rows, mapped from disk."""
    return [np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in ("x", "y", "from_test")]
