"""Rows that Ray Data streams: the same rows, windows in bounded memory, errors as they were."""

from __future__ import annotations

import time

import numpy as np
import pytest

from subfleet.core.errors import InputError, RunFailed
from subfleet.datasets import ClientRows, InMemory, Store, write_store
from subfleet.datasets.reader import Layout
from subfleet.datasets.stream import CohortStream
from subfleet.datasets.tables import Upcoming, to_block

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]
CLIENTS, ROWS = 40, 10


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Forty clients of ten rows; a row is a kilobyte."""
    path = tmp_path_factory.mktemp("store") / "store"
    draw = np.random.default_rng(0)

    def clients():
        for i in range(CLIENTS):
            x = draw.integers(0, 255, (ROWS, 1, 32, 32)).astype(np.uint8)
            yield ClientRows(f"{i:02d}", x, np.full(ROWS, i % 3), np.zeros(ROWS, bool))

    write_store(path, clients(), name="toy", layout=Layout(3, (1, 32, 32)), source={})
    return Store(path)


def upcoming(round: int) -> Upcoming:
    ids = np.random.default_rng(round).permutation(CLIENTS)[:12]
    return Upcoming(ids, ("test", "train") if round % 3 == 0 else ("train",))


def assert_same_rows(stream: CohortStream, data: Store, round: int, ids: np.ndarray) -> None:
    import ray

    for part in stream.parts(round):
        tables = ray.get(stream.blocks(round, ids, part))
        found, wanted = to_block(tables, ids, data.input_shape), data.block(ids, part)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_every_round_gets_its_rows_whatever_the_window(store: Store) -> None:
    # A round is 96 rows of train: windows of one round, and of all.
    for budget in (1, 10 << 20):
        stream = CohortStream(store, budget)
        stream.begin(upcoming, 3, 8)
        for round in range(3, 9):
            assert_same_rows(stream, store, round, np.sort(upcoming(round).ids)[2:9])
        stream.close()


def test_blocks_grow_after_the_first_round(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # Twelve clients of eight rows of a kilobyte: three blocks, then one.
    monkeypatch.setattr("subfleet.datasets.stream.SMALL_BLOCK", 4 * 8 * (1024 + 16))
    stream, ids = CohortStream(store), np.arange(12)
    stream.begin(lambda round: Upcoming(ids, ("train",)), 1, 2)
    assert [len(stream.blocks(round, ids, "train")) for round in (1, 2)] == [3, 1]
    assert_same_rows(stream, store, 2, ids[3:11])
    stream.close()
    few = CohortStream(store)
    few.begin(lambda round: Upcoming(ids, ("train",)), 1, 1)
    for clients, blocks in ((ids[:4], 1), (ids[3:5], 2), (ids[[0, 11]], 2)):
        assert len(few.blocks(1, clients, "train")) == blocks
        assert_same_rows(few, store, 1, clients)
    assert few.blocks(1, ids[:0], "train") == []
    few.close()


def test_no_more_than_two_windows_are_held(store: Store) -> None:
    size = 12 * 8 * (1024 + 16)
    stream = CohortStream(store, budget=2 * size)  # two rounds a window
    stream.begin(lambda round: Upcoming(np.arange(12), ("train",)), 1, 12)
    for trained in (1, 4, 9):
        stream.blocks(trained, np.arange(12), "train")
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            assert stream.held_bytes <= 4 * size
            time.sleep(0.05)
    assert stream.held_bytes > 0
    stream.close()
    assert stream.held_bytes == 0


def test_clients_without_rows_have_no_tables(store: Store) -> None:
    lone = InMemory(np.zeros((4, 2), np.uint8), np.zeros(4), np.array([0, 1, 2, 3, 4]))
    stream = CohortStream(lone)
    stream.begin(lambda round: Upcoming(np.arange(4), ("test", "train")), 1, 1)
    assert stream.blocks(1, np.arange(4), "test") == []
    assert len(stream.blocks(1, np.array([2]), "train")) == 1
    stream.close()


class Broken(InMemory):
    """Fails as it is read, with the error it is given."""

    def __init__(self, error: Exception):
        super().__init__(np.zeros((4, 2), np.uint8), np.zeros(4), np.array([0, 2, 4]))
        self.error = error

    def block(self, ids, part):
        if len(ids):
            raise self.error
        return super().block(ids, part)


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (InputError("the store is gone; prepare it again"), InputError, "the store is gone"),
        (ZeroDivisionError("by nought"), RunFailed, "streaming the data failed: .*by nought"),
    ],
)
def test_what_reading_raises_reaches_who_waits(error, raised, message) -> None:
    import sys

    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    stream = CohortStream(Broken(error))
    stream.begin(lambda round: Upcoming(np.arange(2), ("train",)), 1, 2)
    with pytest.raises(raised, match=message) as caught:
        stream.blocks(1, np.arange(2), "train")
    assert "\n" not in str(caught.value), "one message, without Ray's traceback"
    stream.close()


def test_a_closed_stream_lets_nobody_wait(store: Store) -> None:
    stream = CohortStream(store)
    stream.begin(upcoming, 1, 1)
    stream.close()
    assert stream.blocks(2, np.arange(3), "train") == []


def test_clients_that_were_not_announced_are_left_to_who_asks(store: Store) -> None:
    import ray

    stream = CohortStream(store)
    stream.begin(lambda round: Upcoming(np.arange(6), ("train",)), 1, 2)
    assert stream.blocks(1, np.array([2, 30]), "train") == []
    twice = ray.get(stream.blocks(2, np.array([3, 3]), "train"))
    assert len(to_block(twice, np.array([3]), store.input_shape).y) == 8
    stream.close()


def test_rounds_that_read_nothing_are_passed_over(store: Store) -> None:
    stream = CohortStream(store)
    stream.begin(lambda round: Upcoming(np.arange(6), ("train",) if round > 30 else ()), 1, 31)
    assert len(stream.blocks(31, np.arange(6), "train")) == 1
    stream.close()


def test_a_starved_stream_gives_up(store: Store) -> None:
    stream = CohortStream(store, patience_s=1.0)
    # Announced, but never begun: as if no task ever found a core.
    started = time.monotonic()
    assert stream.blocks(1, np.arange(3), "train") == []
    assert 1.0 < time.monotonic() - started < 10
    assert stream.blocks(2, np.arange(3), "train") == []
