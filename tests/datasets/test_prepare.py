"""From files to a store: in order, whole or absent, going on after a kill, in little memory."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
from toy_reader import Lines, parsed

from subfleet.core.errors import InputError, RunFailed
from subfleet.datasets import Store
from subfleet.datasets.prepare import PAGE_ROWS, prepare
from subfleet.datasets.reader import ClientRows, Faults, Layout, Shard


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.txt").write_text("bob 1 10\nann 0 11\nbob 2 12\n")
    (folder / "b.txt").write_text("eve 3 20\neve 3 21\n")
    (folder / "c_test.txt").write_text("bob 1 30\nann 0 31\n")
    return folder


def test_clients_are_in_order_of_names_and_rows_in_order_of_files(source: Path) -> None:
    calls: list[tuple] = []
    out = source.parent / "store"
    prepare(Lines(), source, out, progress=lambda *call: calls.append(call))
    data = Store(out, split="leaf")
    assert data.client_names == ["ann", "bob", "eve"]
    block = data.block(np.array([1, 0]), "all")
    assert block.x[:, 0].tolist() == [10, 12, 30, 11, 31] and block.y.tolist() == [1, 2, 1, 0, 0]
    assert data.block(np.array([1]), "test").x[:, 0].tolist() == [30]
    assert calls[0] == ("read", 0, 3) and calls[-1] == ("write", 3, 3)
    assert [path.name for path in source.parent.iterdir() if path.name.startswith(".")] == []


def test_the_same_files_give_the_same_store(source: Path) -> None:
    stores = []
    for name in ("one", "two"):
        prepare(Lines(), source, source.parent / name)
        stores.append(Store(source.parent / name))
    assert stores[0].fingerprint == stores[1].fingerprint


def test_a_killed_one_goes_on_where_it_was(source: Path) -> None:
    script = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        from toy_reader import Lines
        from subfleet.datasets.prepare import prepare
        source = Path({str(source)!r})
        prepare(Lines(die_at="b.txt"), source, source.parent / "store")
    """
    (source / "die").write_text("")
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(command, check=False).returncode == -9
    assert not (source.parent / "store").exists()
    assert subprocess.run(command, check=False).returncode == 0
    assert [name for name, _ in parsed(source)] == ["a.txt", "b.txt", "b.txt", "c_test.txt"]
    assert Store(source.parent / "store").client_names == ["ann", "bob", "eve"]
    assert not list(source.parent.glob(".*"))


def test_a_changed_source_starts_anew(source: Path) -> None:
    out = source.parent / "store"
    left = source.parent / ".store.parts-0123456789abcdef"
    left.mkdir()
    prepare(Lines(), source, out)
    assert not left.exists()


def test_a_client_met_twice_in_a_part_is_a_fault_unless_clients_spread(source: Path) -> None:
    (source / "d.txt").write_text("bob 0 40\n")
    out = source.parent / "store"
    message = r"user 'bob' is in a\.txt and again in d\.txt, both of the train part"
    with pytest.raises(InputError, match=message):
        prepare(Lines(), source, out)
    assert not list(source.parent.glob("*store*")), "what cannot be used leaves nothing"
    prepare(Lines(), source, out, skip_bad=True)
    data = Store(out)
    assert 40 not in data.block(np.arange(3), "all").x
    assert data.manifest["found"]["counts"] == {"duplicate user": 1}
    prepare(Lines(spread=True), source, source.parent / "spread")
    bob = Store(source.parent / "spread").block(np.array([1]), "all")
    assert bob.x[:, 0].tolist() == [10, 12, 30, 40]


def test_bad_rows_end_it_or_are_counted(source: Path) -> None:
    (source / "b.txt").write_text("eve 3 20\neve 7 21\neve 3 22\n")
    out = source.parent / "store"
    with pytest.raises(InputError, match=r"b\.txt, line 2: label '7' is not 0\.\.3"):
        prepare(Lines(), source, out)
    assert not out.exists()
    prepare(Lines(), source, out, skip_bad=True)
    found = Store(out).manifest["found"]
    assert (
        found["counts"] == {"unknown label": 1} and "line 2" in found["examples"]["unknown label"]
    )
    assert any("1 x unknown label" in text for text in Store(out).report["warnings"])


def test_nothing_that_can_be_used_is_an_input_error(source: Path) -> None:
    for file in source.glob("*.txt"):
        file.write_text("")
    with pytest.raises(InputError, match="no rows that can be used"):
        prepare(Lines(), source, source.parent / "store")


def test_a_client_with_one_row_is_left_out_and_named(source: Path) -> None:
    (source / "d.txt").write_text("zoe 0 40\n")
    prepare(Lines(), source, source.parent / "store")
    data = Store(source.parent / "store")
    assert data.dropped == ["zoe"] and data.num_clients == 3


def test_two_at_a_time_do_not_hurt_each_other(source: Path) -> None:
    script = f"""
        import sys, time
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
        from toy_reader import Lines
        from subfleet.datasets.prepare import prepare
        class Slow(Lines):
            def read(self, shard, faults):
                time.sleep(0.2)
                return super().read(shard, faults)
        source = Path({str(source)!r})
        prepare(Slow(), source, source.parent / "store")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(parsed(source)) == 3, "the second finds the store of the first"
    assert Store(source.parent / "store").num_clients == 3 and not list(source.parent.glob(".*"))


def test_what_everything_was_left_out_for_is_said(source: Path) -> None:
    for file in source.glob("*.txt"):
        file.write_text("bob 7 1\n")
    with pytest.raises(InputError, match=r"no rows .* 3 x unknown label: .*a\.txt, line 1"):
        prepare(Lines(), source, source.parent / "store", skip_bad=True)
    assert not list(source.parent.glob("*store*")) and not list(source.parent.glob(".*"))


class Unwell(Lines):
    """Raises what it is told to, from the disk or from the source."""

    def read(self, shard: Shard, faults: Faults):
        raise PermissionError(13, "Permission denied", str(shard.path))


def test_a_source_that_cannot_be_read_is_blamed_itself(source: Path) -> None:
    with pytest.raises(InputError, match=r"a\.txt cannot be read \(.*Permission denied"):
        prepare(Unwell(), source, source.parent / "store")


def test_a_full_disk_is_said_from_the_worker_on(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(RunFailed, match="is full; free some space"):
        prepare(Lines(), source, source.parent / "store")


class Pool:
    """Rows without clients, in two shards and a test shard, with a warning in each."""

    name = "pool"
    sizes = (PAGE_ROWS + 500, 700, 300)

    def shards(self, source: Path) -> list[Shard]:
        warnings.warn("a file is missing", stacklevel=1)
        return [Shard(str(i), source, i == 2, (size,)) for i, size in enumerate(self.sizes)]

    def layout(self, source: Path) -> Layout:
        return Layout(5, (1,), natural=False, spread=True)

    def read(self, shard: Shard, faults: Faults):
        warnings.warn("a sum differs", stacklevel=1)
        size, first = shard.items[0], 100 * int(shard.name)
        x = ((np.arange(size) + first) % 256).astype(np.uint8)[:, None]
        pool = "test" if shard.from_test else "train"
        yield ClientRows(pool, x, np.arange(size) % 5, np.full(size, shard.from_test))


def test_rows_without_clients_are_kept_in_pages_and_in_order(tmp_path: Path) -> None:
    prepare(Pool(), tmp_path, tmp_path / "store")
    data = Store(tmp_path / "store")
    assert data.manifest["natural"] is False
    every = np.arange(data.num_clients)
    # 1,024 + 500 and 700 rows train: two pages, the second short; 300 test.
    assert sorted(data.sizes(every, "all").tolist()) == [176, 300, 1024, 1024]
    rows = data.rows(np.arange(data.num_rows))[:, 0]
    train = rows[~data.from_test()]
    want = [np.arange(size) + 100 * i for i, size in enumerate(Pool.sizes[:2])]
    assert train.tolist() == (np.concatenate(want) % 256).tolist()
    assert data.manifest["found"]["warnings"] == ["a file is missing", "a sum differs"]


class Large:
    """Sixteen shards of 8 MB each."""

    name = "large"

    def shards(self, source: Path) -> list[Shard]:
        return [Shard(f"{i:02d}", source) for i in range(16)]

    def layout(self, source: Path) -> Layout:
        return Layout(2, (1000,), dtype="uint8")

    def read(self, shard: Shard, faults: Faults):
        for k in range(8):
            x = np.full((1000, 1000), k, np.uint8)
            x[:, :4] = np.arange(1000, dtype=np.uint32).view(np.uint8).reshape(1000, 4)
            y = np.arange(1000) % 2
            yield ClientRows(f"{shard.name}.{k}", x, y, np.zeros(1000, bool))


def test_memory_is_bounded_by_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tracemalloc

    from subfleet.datasets import writing

    monkeypatch.setattr(writing, "_BATCH_BYTES", 8 << 20)
    tracemalloc.start()
    prepare(Large(), tmp_path, tmp_path / "store")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # A shard and a batch, each with a copy or two; the data are 128 MB.
    assert Store(tmp_path / "store").num_rows == 128_000
    assert peak < 48 << 20
