"""Ray Data streams the cohorts' rows to the hosts, a window of rounds ahead of the training.

Who trains in which round is known from the seed, so the rows of many rounds are
read by one execution of Ray Data, in cohort order, while earlier ones train. An
execution costs a good part of a second to start, and its scheduler keeps a core
busy while it waits; so a window is as long as its share of the object store
allows, and is read in one go. Two windows are held at most: memory is bounded,
whatever the size of the data set.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator, Sequence
from logging import getLogger
from threading import Condition, Thread
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from subfleet.core.errors import InputError, RunFailed
from subfleet.datasets.federation import Federation, offsets_of
from subfleet.datasets.tables import Upcoming, to_table

SMALL_BLOCK = 16 << 20  # bytes; less, and a block's task costs more than its copy
LARGE_BLOCK = 64 << 20  # fewer tasks leave more to the training; but each node fetches it whole
SHARE = 0.1  # of the object store's memory, for one window
PATIENCE_S = 60.0
WINDOW_ROUNDS = 16  # at most; more would be read long before it is of use


_LOG = getLogger(__name__)


class _Piece(NamedTuple):
    """One block: neighbours of a cohort, one part of their rows."""

    round: int
    part: str
    ids: np.ndarray
    rows: int
    in_order: np.ndarray  # the ids, sorted

    def holds(self, ids: np.ndarray) -> int:
        """How many of these different clients it has."""
        before, after = (np.searchsorted(self.in_order, ids, side) for side in ("left", "right"))
        return int((after - before).sum())


class CohortStream:
    """Blocks of the rounds to come, as references that the calling process owns.

    `budget` bytes are what a window of rounds may hold; by default a tenth of the
    object store. A round larger than that is a window of its own. After `patience_s`
    seconds without a block that is waited for (others have all cores, say) the
    stream gives up, and hosts read for themselves.
    """

    def __init__(self, data: Federation, budget: int | None = None, patience_s: float = PATIENCE_S):
        self._data = data
        self._budget = budget
        self._patience_s = patience_s
        self._change = Condition()
        self._blocks: dict[tuple[int, str], list[tuple[_Piece, Any]]] = {}
        self._held: dict[int, int] = {}  # bytes of each round that is here or on its way
        self._wanted = 0  # the round that trains
        self._read_to = 0  # the last round of which all blocks are here
        self._error: BaseException | None = None
        self._closed = False
        self._parts: Callable[[int], tuple[str, ...]] = lambda round: ()

    def begin(self, upcoming: Callable[[int], Upcoming], first: int, last: int) -> None:
        """Starts to read the rounds `first` to `last`; `upcoming` must be a pure function."""
        self._wanted = first
        self._parts = functools.lru_cache(maxsize=4)(
            lambda round: upcoming(round).parts if round >= first else ()
        )
        work = (upcoming, first, last)
        Thread(target=self._run, args=work, name="cohort stream", daemon=True).start()

    def parts(self, round: int) -> tuple[str, ...]:
        """The parts of a round that are streamed; none before `begin`, or before its first."""
        return self._parts(round)

    def blocks(self, round: int, ids: np.ndarray, part: str) -> list[Any]:
        """References of the tables that hold `ids`' rows of `part`; waits until they are read.

        None where there are no rows, or where not all that are asked for were
        announced, or after `close`: whoever asks then reads for itself. Raises what the
        reading raised; `RunFailed` where it was not our own error.
        """
        ids = np.unique(ids)
        with self._change:
            self._forget_before(round)
            last_news = monotonic()
            while not self._closed:
                here = self._blocks.get((round, part), [])
                held = [piece.holds(ids) for piece, _ in here]
                if sum(held) == len(ids):
                    found = zip(here, held, strict=True)
                    return [ref for (piece, ref), some in found if some and piece.rows]
                if self._error is not None:
                    raise self._error
                if self._read_to >= round:
                    return []
                if self._change.wait(1.0):
                    last_news = monotonic()
                elif monotonic() - last_news > self._patience_s:
                    _LOG.warning("no rows for %g s: hosts read for themselves", self._patience_s)
                    self.close()
            return []

    def _forget_before(self, round: int) -> None:
        self._wanted = max(self._wanted, round)
        for old in [key for key in self._blocks if key[0] < self._wanted]:
            del self._blocks[old]
        self._held = {r: size for r, size in self._held.items() if r >= self._wanted}
        self._change.notify_all()

    @property
    def held_bytes(self) -> int:
        """What the rounds take that are here or on their way."""
        with self._change:
            return sum(self._held.values())

    def close(self) -> None:
        """Lets all blocks go; what is being read ends by itself."""
        with self._change:
            self._closed = True
            self._blocks.clear()
            self._held.clear()
            self._change.notify_all()

    # --- the reading thread ----------------------------------------------------------------------

    def _run(self, upcoming: Callable[[int], Upcoming], first: int, last: int) -> None:
        try:
            for window, size in self._windows(upcoming, first, last):
                if not self._room(window, size):
                    return
                self._read(window)
                with self._change:
                    self._read_to = window[-1].round
                    self._change.notify_all()
        except BaseException as error:  # the rounds' own thread raises it
            with self._change:
                self._error = _own(error)
                self._change.notify_all()

    def _windows(
        self, upcoming: Callable[[int], Upcoming], first: int, last: int
    ) -> Iterator[tuple[list[_Piece], int]]:
        """The pieces of as many rounds as the budget holds, and their bytes."""
        window: list[_Piece] = []
        held = rounds = 0
        for round in range(first, last + 1):
            # Hosts wait for the first round's.
            block = SMALL_BLOCK if round == first else self._later_block
            pieces = list(self._pieces(round, upcoming(round), block))
            size = sum(piece.rows for piece in pieces) * self._row_bytes
            full = rounds >= WINDOW_ROUNDS or held + size > self._window_bytes
            if window and full:
                yield window, held
                window, held, rounds = [], 0, 0
            window, held, rounds = [*window, *pieces], held + size, rounds + 1
        if window:
            yield window, held

    def _pieces(self, round: int, need: Upcoming, block: int) -> Iterator[_Piece]:
        for part in need.parts:
            sizes = self._data.sizes(need.ids, part)
            place = offsets_of(sizes)[:-1] * self._row_bytes // block
            cuts = np.flatnonzero(np.diff(place)) + 1
            rows = [int(some.sum()) for some in np.split(sizes, cuts)]
            for ids, count in zip(np.split(need.ids, cuts), rows, strict=True):
                yield _Piece(round, part, ids, count, np.sort(ids))

    @property
    def _row_bytes(self) -> int:
        dtype = self._data.block(np.empty(0, np.int64), "train").x.dtype
        return int(np.prod(self._data.input_shape)) * dtype.itemsize + 16

    @functools.cached_property
    def _later_block(self) -> int:
        largest = LARGE_BLOCK if _nodes() == 1 else SMALL_BLOCK
        return min(largest, max(SMALL_BLOCK, self._window_bytes // 4))

    @property
    def _window_bytes(self) -> int:
        if self._budget is None:
            import ray

            total = ray.cluster_resources().get("object_store_memory", 0.0)
            self._budget = max(SMALL_BLOCK, int(SHARE * total))
        return self._budget

    def _room(self, window: list[_Piece], size: int) -> bool:
        """Waits until the window may be held beside the one that trains; False once closed."""
        rounds = sorted({piece.round for piece in window})
        with self._change:
            while sum(self._held.values()) > self._window_bytes and not self._closed:
                self._change.wait()
            self._held |= dict.fromkeys(rounds, size // len(rounds))
            return not self._closed

    def _read(self, window: Sequence[_Piece]) -> None:
        """One execution of Ray Data: a task and a block for each piece, in order."""
        # Ray Data drops blocks without rows.
        full = [piece for piece in window if piece.rows]
        for piece in window:
            if not piece.rows:
                self._arrived(piece, None)
        for piece, (ref, rows) in zip(full, _blocks_of(self._data, full), strict=True):
            if rows != piece.rows:
                raise _what_failed(ref)
            if not self._arrived(piece, ref):
                return

    def _arrived(self, piece: _Piece, ref: Any) -> bool:
        """Hands a block to whoever waits; False once closed."""
        with self._change:
            if piece.round >= self._wanted and not self._closed:
                self._blocks.setdefault((piece.round, piece.part), []).append((piece, ref))
            self._change.notify_all()
            return not self._closed


def _blocks_of(data: Federation, pieces: Sequence[_Piece]) -> Iterator[tuple[Any, int | None]]:
    """A reference and its rows for each piece, in order, as they are read."""
    if not pieces:
        return
    import ray.data

    from subfleet.datasets.parallel import bounded_retries, quiet_context

    quiet_context()
    pickled = pickle.dumps(data)

    def read(batch: Any) -> Any:
        piece = pieces[int(batch["item"][0])]
        try:
            return to_table(_opened(pickled), piece.ids, piece.part)
        except Exception as error:
            # Raised, Ray would wrap it and print pages about it. Its rows give it away.
            return pa.table({"error": [pickle.dumps(error)] * (piece.rows + 1)})

    numbers = ray.data.from_items(list(range(len(pieces))), override_num_blocks=len(pieces))
    # Hosts may leave no whole core free on any one node, so a task asks for next to nothing,
    # and their number is bounded otherwise.
    blocks = numbers.map_batches(
        read,
        batch_size=None,
        num_cpus=0.01,
        concurrency=_nodes(),
        ray_remote_args_fn=bounded_retries,
    )
    blocks.context.execution_options.preserve_order = True
    blocks.context.target_max_block_size = 1 << 40  # a block holds whole clients
    # Semi-public, and the only way to blocks that this process owns and never fetches.
    for bundle in blocks.iter_internal_ref_bundles():
        for ref, facts in zip(bundle.block_refs, bundle.metadata, strict=True):
            yield ref, facts.num_rows


def _nodes() -> int:
    import ray

    return sum(node["Alive"] for node in ray.nodes())


@functools.lru_cache(maxsize=2)
def _opened(pickled: bytes) -> Federation:
    """The data as a worker process keeps them: what they derive is derived once, not by task."""
    return pickle.loads(pickled)


def _what_failed(ref: Any) -> Exception:
    """The error behind a block that has not the rows that were to be read."""
    import ray

    table: Any = ray.get(ref)
    if "error" in table.column_names:
        return pickle.loads(table["error"][0].as_py())
    return RunFailed(
        f"Ray Data handed over a block of {table.num_rows} rows where other ones were to be "
        "read; set run.stream = false"
    )


def _own(error: BaseException) -> BaseException:
    """The error of ours behind one of Ray's, else a RunFailed that says what it was."""
    # Ray's errors are also of the type of their cause, so the cause comes first.
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    if isinstance(error, InputError | RunFailed):
        return error
    return RunFailed(f"streaming the data failed: {type(error).__name__}: {error}")
