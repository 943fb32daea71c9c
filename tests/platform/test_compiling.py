"""Compiled steps: the same numbers, compiled once for a machine, switched to between rounds."""

import json
import time
from pathlib import Path

import pytest
import toys

from subfleet.algorithms.fedavg import FedAvg
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule
from subfleet.platform import tuner
from subfleet.platform.metrics import read_metrics
from subfleet.platform.record import Choice, EngineRecord
from subfleet.platform.runfolder import RunFolder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBFLEET_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_compiled_steps_equal_the_loop(way, tmp_path):
    net, data = toys.mlp(norm=way == "traced"), toys.all_train([12, 8, 9], (6,), 3)
    program = toys.loss_program(LocalRule(lr=0.1, momentum=0.5, weight_decay=0.01))
    tasks, shared = [toys.task(net, client) for client in range(3)], net.init(1)
    looped = toys.each(net, program, tasks, data, shared)
    options = {"width": 3, "compiled": True}
    for _ in range(2):  # compiled, then loaded
        found = toys.each(net, program, tasks, data, shared, way, **options)
        for (a, loss_a, _), (b, loss_b, _) in zip(found, looped, strict=True):
            assert toys.distance(a, b) < 1e-5 and loss_a == pytest.approx(loss_b, rel=1e-4)
    files = list((tmp_path / "cache" / "compiled").iterdir())
    assert len(files) == 1 and files[0].suffix == ".bin"
    # What is damaged is compiled again.
    files[0].write_bytes(b"no artifact")
    again = toys.each(net, program, tasks, data, shared, way, **options)
    assert toys.same_bits(again[0][0], found[0][0]) and files[0].stat().st_size > 1000


class Slow:
    """Waits between rounds until the process beside has had its time."""

    def __init__(self, path: Path):
        self.path, self.notes = path, []

    def on_start(self, info):
        """Nothing to do."""

    def on_note(self, text):
        self.notes.append(text)

    def on_round(self, record, coverage):
        compiled = any(choice["compiled"] for choice in choices(self.path))
        told = any("stays as it is" in note for note in self.notes)
        if not compiled and not told and record["round"] < 60:
            time.sleep(1.0)

    def on_end(self, summary):
        """Nothing to do."""


def choices(path):
    return json.loads((path / "engine.json").read_text())["choices"]


def test_a_run_switches_between_rounds_and_its_record_replays_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "CLEARLY", 1e9)  # compiled steps pay, whatever they cost here
    data = toys.federation([24] * 12, (64,), 5)
    algorithm = FedAvg(toys.setting(toys.mlp(dim=64, hidden=(256, 128), classes=5), rounds=62))
    job = toys.job(algorithm, data, engine="vmap", compile=True, rounds=62)
    observer = Slow(tmp_path / "run")
    whole = toys.run(job, tmp_path / "run", observers=(observer,))
    entries = choices(tmp_path / "run")
    assert not entries[0]["compiled"]
    assert entries[1]["compiled"] and 1 < entries[1]["from_round"] <= 62
    assert any("compiled from round" in note for note in observer.notes)
    assert [r["round"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")][-1] == 62
    record = EngineRecord.from_json(json.loads((tmp_path / "run" / "engine.json").read_text()))
    again = toys.job(algorithm, data, engine="vmap", rounds=62, record=record)
    assert toys.run(again, tmp_path / "again")["params_sha256"] == whole["params_sha256"]
    assert RunFolder(tmp_path / "again", "").read_final().keys()


def test_steps_that_do_not_pay_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "CLEARLY", 0.0)
    data, rounds = toys.federation([12] * 12, (6,), 3), 62
    algorithm = FedAvg(toys.setting(toys.mlp(), rounds=rounds))
    observer = Slow(tmp_path / "run")
    toys.run(
        toys.job(algorithm, data, engine="vmap", compile=True, rounds=rounds),
        tmp_path / "run",
        observers=(observer,),
    )
    assert [choice["compiled"] for choice in choices(tmp_path / "run")] == [False]
    assert any("stays as it is" in note and "compiled" in note for note in observer.notes)


def test_a_loop_is_not_compiled():
    with pytest.raises(InputError, match="compiled=True with way='loop' for variant a; only"):
        Choice("a", "cpu", "loop", compiled=True)
