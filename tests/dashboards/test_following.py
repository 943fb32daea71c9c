"""A run followed by its files: lines as they come, resumes, silence, the end."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st

from subfleet.algorithms import FedAvg
from subfleet.core.errors import InputError
from subfleet.dashboards.following import GRACE_S, START_S, Following, MetricsTail, rounds_table
from subfleet.platform.metrics import MetricsLog, read_metrics
from subfleet.platform.runfolder import RunFolder


def line(round: int, **more: Any) -> bytes:
    return json.dumps({"round": round, "at": round / 7, **more}).encode() + b"\n"


@given(
    cuts=st.lists(st.integers(0, 400), max_size=8),
    resumed=st.integers(0, 6),
    cut=st.integers(0, 30),
)
def test_every_line_comes_once_however_the_file_grows_and_is_cut(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], resumed: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == ([], False)
    whole = b"".join(line(number) for number in range(1, 7))
    heard: list[int] = []
    for size in sorted(min(cut, len(whole)) for cut in cuts):
        path.write_bytes(whole[:size])
        records, anew = tail.read()
        assert not anew
        heard += [record["round"] for record in records]
        assert heard == list(range(1, whole[:size].count(b"\n") + 1))
    # A crash cuts the last line; a resume keeps some, and writes others with other times.
    kept = b"".join(line(number) for number in range(1, resumed + 1))
    after = b"".join(line(number, again=True) for number in range(resumed + 1, 9))
    path.write_bytes(kept + after + line(9)[:cut])
    records, anew = tail.read()
    got = [record["round"] for record in records]
    assert anew == (len(heard) > resumed)
    assert got == list(range(1 if anew else len(heard) + 1, 9 + (cut >= len(line(9)))))
    assert all(record.get("again", False) == (resumed < record["round"] < 9) for record in records)
    assert tail.read() == ([], False)


def test_a_damaged_line_is_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line(1) + b'{"rou\n[1]\n{"round": null}\n' + line(2))
    tail = MetricsTail(path)
    assert [record["round"] for record in tail.read()[0]] == [1, 2]
    assert tail.damaged == 3


class Heard:
    """An observer that remembers all it hears, in order."""

    def __init__(self) -> None:
        self.all: list[Any] = []

    def on_start(self, info: dict[str, Any]) -> None:
        self.info = info
        self.all.append(("start", info["start"], info["rounds"]))

    def on_round(self, record: dict[str, Any], coverage: dict) -> None:
        assert coverage == {}
        self.all.append(record["round"])

    def on_note(self, text: str) -> None:
        self.all.append(text)

    def on_end(self, summary: dict[str, Any]) -> None:
        self.all.append("end")


def folder(path: Path, rounds: int = 6) -> RunFolder:
    return RunFolder.create(path, f"[run]\nrounds = {rounds}\n", "f")


def record(round: int, phase: str = "train", seconds: float = 2.0) -> dict[str, Any]:
    return {"round": round, "phase": phase, "acc_global": 0.5, "seconds": {"total": seconds}}


def test_a_run_that_goes_on_is_told_as_it_is_told_in_its_own_process(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    lock = run.lock()
    heard = Heard()
    following = Following(run, heard)
    following.begin()
    assert following.look() is None
    assert heard.all == [("start", 0, 6), "waiting for the first round ..."]
    log = MetricsLog(run.metrics)
    log.append(record(1))
    assert following.look() is None
    log.append(record(2))
    log.append(record(3, "search"))
    with open(run.metrics, "ab") as file:  # half of a line
        file.write(line(4)[:9])
    assert following.look() is None and following.look() is None
    assert heard.all[2:] == [("start", 0, 6), 1, 2, ("start", 2, 6), 3]
    assert heard.info["phases"] == [("train", 1, 2), ("search", 3, 6)]
    assert [one["round"] for one in heard.info["recent"]] == [1, 2]
    os.close(lock)


def test_a_resume_is_told_anew_and_a_longer_one_with_its_rounds(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    lock = run.lock()
    log = MetricsLog(run.metrics)
    for number in (1, 2, 3):
        log.append(record(number))
    heard = Heard()
    following = Following(run, heard)
    following.begin()
    log.close()
    log = MetricsLog(run.metrics)
    log.truncate(2)
    assert following.look() is None
    run.write_config({"run": {"rounds": 9}})
    log.append(record(3))
    assert following.look() is None
    told = "the run was taken up again after round 2"
    assert heard.all == [("start", 3, 6), told, ("start", 2, 6), ("start", 2, 9), 3]
    os.close(lock)


def test_the_summary_of_a_shorter_run_ends_nothing(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    log = MetricsLog(run.metrics)
    log.append(record(1))
    run.write_summary({"rounds": 1, "finished": True})
    lock = run.lock()
    following = Following(run, Heard())
    assert following.look() is None, "a process runs in it"
    os.close(lock)
    assert following.look().summary == {"rounds": 1, "finished": True}
    log.append(record(2))
    assert following.look() is None, "it went on"


@pytest.mark.parametrize("last", [b'{"round": 3, "ph\n', b'{"round": 3, "ph'])
def test_a_damaged_last_line_does_not_hide_that_the_run_has_ended(
    tmp_path: Path, last: bytes
) -> None:
    run = folder(tmp_path / "run", rounds=3)
    log = MetricsLog(run.metrics)
    log.append(record(1))
    log.append(record(2))
    following = Following(run, Heard())
    run.write_summary({"rounds": 3, "finished": True})
    assert following.look() is None, "its last round is missing"
    with open(run.metrics, "ab") as file:
        file.write(last)
    for ended in (following.look(), Following(run, Heard()).look()):
        assert ended is not None and ended.summary == {"rounds": 3, "finished": True}
        assert (ended.rounds_done, ended.rounds) == (3, 3)


def test_files_that_come_and_go_end_nothing(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    lock = run.lock()
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            for number in range(40):
                (run.path / f".{number}.tmp").touch()
            for number in range(40):
                (run.path / f".{number}.tmp").unlink()

    writing = threading.Thread(target=come_and_go)
    writing.start()
    try:
        for _ in range(1000):
            assert Following(run, Heard()).look() is None
    finally:
        over.set()
        writing.join()
        os.close(lock)


def aged(run: RunFolder, seconds: float) -> None:
    """As if all that is in the folder had been written so long ago."""
    then = time.time() - seconds
    for item in run.path.iterdir():
        os.utime(item, (then, then))


@pytest.mark.parametrize("longest", [0.5, 100.0])
def test_silence_without_a_process_counts_by_the_longest_rounds(
    tmp_path: Path, longest: float
) -> None:
    run = folder(tmp_path / "run")
    MetricsLog(run.metrics).append(record(1, seconds=longest))
    patience_s = max(GRACE_S, 3 * longest)
    aged(run, patience_s - 10)
    heard = Heard()
    assert Following(run, heard).look() is None
    assert heard.all[-1].endswith("waiting up to 10s for a sign of life")
    aged(run, patience_s + 1)
    ended = Following(run, Heard()).look()
    assert ended is not None and ended.summary is None and ended.rounds_done == 1
    assert "no process on this machine runs in it" in ended.why
    assert Following(run, Heard(), patience_s=patience_s + 60).look() is None
    lock = run.lock()
    assert Following(run, heard := Heard()).look() is None, "its process lives"
    assert (heard.all == []) == (patience_s + 1 < max(60, 3 * longest))
    os.close(lock)


def test_a_run_before_its_first_round_is_waited_for(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    aged(run, START_S - 60)
    assert Following(run, Heard()).look() is None
    aged(run, START_S + 1)
    ended = Following(run, Heard()).look()
    assert ended is not None and (ended.rounds_done, ended.rounds) == (0, 6)
    run.discard()
    with pytest.raises(FileNotFoundError):
        Following(run, Heard())


def test_a_run_that_fails_in_its_first_round_takes_its_folder_along(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    following = Following(run, Heard())
    run.discard()
    ended = following.look()
    assert ended is not None and "its folder is gone" in ended.why


def test_a_configuration_without_rounds_is_named(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "[run]\nseed = 1\n", "f")
    with pytest.raises(InputError, match=r"config.toml: does not say how many rounds"):
        Following(run, Heard())


def test_following_a_finished_run_ends_at_once_and_writes_nothing(tmp_path: Path) -> None:
    job = toys.job(
        FedAvg(toys.setting(toys.mlp(), rounds=3), width=1.0),
        toys.federation([12, 7, 20, 9, 15, 5], (6,), 3, 0),
    )
    object.__setattr__(job, "config", {"run": {"rounds": 3}})
    summary = toys.run(job, tmp_path / "run")
    run = RunFolder(tmp_path / "run", "toy")

    def state() -> dict[str, tuple[int, int]]:
        files = [run.path, *run.path.rglob("*")]
        return {str(f): (f.stat().st_mtime_ns, f.stat().st_ctime_ns) for f in files}

    before = state()
    ended = Following(run, heard := Heard()).follow()
    assert ended.summary == summary and (ended.rounds_done, ended.rounds) == (3, 3)
    assert heard.all == [("start", 3, 3), "end"]
    assert state() == before
    table = rounds_table(list(read_metrics(run.metrics)), 2)
    assert table.row_count == 2 and list(table.columns[0].cells) == ["2", "3"]


def test_a_look_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    run = folder(tmp_path / "run")
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            _ = run.busy
            time.sleep(0.001)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(200):
            os.close(run.lock())
    finally:
        over.set()
        looking.join()
    assert not run.busy
