"""Shards parsed by Ray Data: the same store as one parsed here, and the same errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from toy_reader import Lines, parsed

from subfleet.core.errors import InputError, RunFailed
from subfleet.datasets import Store
from subfleet.datasets.parallel import parse_all
from subfleet.datasets.prepare import prepare

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_here")]


@pytest.fixture(autouse=True)
def by_value() -> None:
    """Workers cannot import the modules of tests."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules["toy_reader"])


def make(folder: Path, files: int) -> Path:
    folder.mkdir()
    for i in range(files):
        lines = [f"c{i}_{k % 5} {k % 4} {k % 250}" for k in range(50)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    return folder


def test_the_store_is_that_of_one_process(tmp_path: Path) -> None:
    import os

    source = make(tmp_path / "source", 7)
    said: list[tuple] = []
    settings = {"parse_all": parse_all, "progress": lambda *call: said.append(call)}
    prepare(Lines(), source, tmp_path / "ray", **settings)
    workers = {pid for _, pid in parsed(source)}
    assert os.getpid() not in workers
    assert sorted(name for name, _ in parsed(source)) == [f"{i}.txt" for i in range(7)]
    prepare(Lines(), source, tmp_path / "here")
    assert Store(tmp_path / "ray").fingerprint == Store(tmp_path / "here").fingerprint
    assert ("read", 7, 7) in said and said[-1] == ("write", 35, 35)


def test_a_fault_far_away_is_the_same_input_error(tmp_path: Path) -> None:
    source = make(tmp_path / "source", 3)
    (source / "1.txt").write_text("bob 9 1\n")
    with pytest.raises(InputError, match=r"1\.txt, line 1: label '9'") as caught:
        prepare(Lines(), source, tmp_path / "out", parse_all=parse_all)
    assert "\n" not in str(caught.value) and "in read" in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()
    prepare(Lines(), source, tmp_path / "out", parse_all=parse_all, skip_bad=True)
    assert Store(tmp_path / "out").manifest["found"]["counts"] == {"unknown label": 1}


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    source = make(tmp_path / "source", 4)
    (source / "die").write_text("")
    prepare(Lines(die_at="2.txt"), source, tmp_path / "out", parse_all=parse_all)
    names = [name for name, _ in parsed(source)]
    assert names.count("2.txt") == 2 and Store(tmp_path / "out").num_clients == 20


def test_a_shard_that_kills_every_worker_ends_it(tmp_path: Path) -> None:
    source = make(tmp_path / "source", 2)
    (source / "die").write_text("each time")
    with pytest.raises(RunFailed, match="a worker that parses died four times"):
        prepare(Lines(die_at="1.txt"), source, tmp_path / "out", parse_all=parse_all)
    assert [name for name, _ in parsed(source)].count("1.txt") == 4
    assert not (tmp_path / "out").exists()
