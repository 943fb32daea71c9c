"""Memory that really runs out: the round begins anew, with fewer clients side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
import toys

from subfleet.algorithms import FedAvg
from subfleet.algorithms.local import cross_entropy
from subfleet.core.errors import RunFailed
from subfleet.core.program import Loss
from subfleet.platform.host import Hosts
from subfleet.platform.memory import OutOfMemory, resident
from subfleet.platform.metrics import read_metrics
from subfleet.platform.ray_executor import RayExecutor
from subfleet.platform.record import Choice, EngineRecord
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

MB = 1 << 20


@contextmanager
def room(size: int) -> Iterator[None]:
    """This process may map so many bytes more, and not one above."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_is_resident_is_known():
    before = resident()
    with mmap(-1, 100 * MB) as held:  # not from what this process has freed before
        held.write(b"1" * len(held))
        assert 90 * MB < resident() - before < 250 * MB
    assert resident() - before < 150 * MB


def greedy(net, params, batch, noise, inputs):
    """A loss that holds 20 MB a client where there are 200: 8 fit side by side, 16 do not."""
    loss, metrics = cross_entropy(net, params, batch, noise, inputs)
    with room(200 * MB):
        held = batch.x.sum() * torch.zeros(5 * MB)
    return loss + held[:1].sum(), metrics


def insatiable(net, params, batch, noise, inputs):
    """A loss that no memory is enough for, not even a single client's."""
    loss, metrics = cross_entropy(net, params, batch, noise, inputs)
    return loss + torch.zeros(1 << 50).sum(), metrics


@dataclass(frozen=True)
class Hungry(FedAvg):
    """FedAvg whose loss is another one from some round on."""

    width: float | None = 1.0
    loss: Loss = greedy
    since: int = 2

    def phase(self, round):
        phase = super().phase(round)
        if round < self.since:
            return phase
        return replace(phase, program=replace(phase.program, loss=self.loss))


def job(loss=greedy, engine="vmap", since=2, record=()):
    """Three rounds of three bundles of 16 clients."""
    data = toys.all_train([4] * 60, (6,), 3)
    algorithm = Hungry(toys.setting(toys.mlp(), rounds=3), loss=loss, since=since)
    made = toys.job(algorithm, data, cohort=48, bundle_clients=16, engine=engine)
    return replace(made, record=EngineRecord(tuple(record)))


class Notes(toys.StopAfter):
    """An observer that takes notes."""

    def __init__(self):
        super().__init__(-1)
        self.heard: list[str] = []

    def on_note(self, text: str) -> None:
        self.heard.append(text)


def choices(path: Path) -> list[dict[str, Any]]:
    return json.loads((path / "engine.json").read_text())["choices"]


def two_runs(path: Path) -> tuple[str, str, list[str]]:
    """Digests of a run that runs out of memory and of one that was told, and the first's notes."""
    notes = Notes()
    first = toys.run(job(), path / "run", observers=(notes,))
    record = [Choice(**choice) for choice in choices(path / "run")]
    second = toys.run(job(record=record), path / "told")
    return first["params_sha256"], second["params_sha256"], notes.heard


def tried(path: Path) -> list[int]:
    """How often a run that tries the ways before its first round ran out of memory after it."""
    os.environ["SUBFLEET_CACHE"] = str(path)
    toys.run(job(engine="auto", since=1), path / "run")
    return [r["out_of_memory"] for r in read_metrics(path / "run" / "metrics.jsonl")]


def in_a_fresh_process(function: Any, *arguments: Any) -> Any:
    """This one may hold freed memory, from which much could be had within any limit."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def test_the_round_begins_anew_with_half_as_many_and_the_bits_of_the_narrower_record(tmp_path):
    first, second, heard = in_a_fresh_process(two_runs, tmp_path)
    assert first == second
    widths = [(c["from_round"], c["side_by_side"]) for c in choices(tmp_path / "run")]
    # Halved until they fit; how many that are the process's own memory decides.
    assert widths == [(1, 128), *((2, 128 >> half) for half in range(1, len(widths)))]
    halved = len(widths) - 1
    assert widths[-1][1] <= 8
    for name, times in (("run", [0, halved, 0]), ("told", [0, 0, 0])):
        records = list(read_metrics(tmp_path / name / "metrics.jsonl"))
        assert [record["out_of_memory"] for record in records] == times
        assert [record["clients"] for record in records] == [48] * 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["total_out_of_memory"] == halved and len(heard) == 1 + halved
    assert heard[0].startswith("engine: (8, 4) vmap of 128")
    assert heard[1] == (
        "engine: (8, 4) vmap of 64 from round 2 on, out of memory with 128 side by side"
    )


@pytest.mark.parametrize("engine", ["loop", "traced", "vmap"])
def test_a_single_client_that_does_not_fit_ends_the_run(engine, tmp_path):
    with pytest.raises(
        RunFailed,
        match=r"round 2: a single client of variant \(8, 4\) does not fit .* cpu device; lower",
    ):
        toys.run(job(insatiable, engine), tmp_path / "run")
    assert [r["round"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_way_that_does_not_fit_is_not_chosen(tmp_path):
    assert in_a_fresh_process(tried, tmp_path) == [0, 0, 0]
    (choice,) = choices(tmp_path / "run")
    assert choice["side_by_side"] < 16


def test_the_error_survives_its_way_from_a_host():
    error = pickle.loads(pickle.dumps(OutOfMemory("(8, 4)", "cuda")))
    assert (error.variant, error.device) == ("(8, 4)", "cuda")
    assert "variant (8, 4) do not fit into the memory of the cuda device; lower" in str(error)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_hosts_go_on_after_they_ran_out_of_memory(tmp_path):
    """The bundles that others were at when the first one failed are left behind."""
    from ray import cloudpickle

    for module in (sys.modules[__name__], toys):  # hosts cannot import them
        cloudpickle.register_pickle_by_value(module)  # pyright: ignore
    made = job()
    hosts = Hosts(made.work, made.federation, wanted=2, device="cpu")
    executor = RayExecutor(hosts)
    Rounds(made, executor, RunFolder.create(tmp_path / "run", "", "toy")).run()
    executor.close()
    hosts.kill()
    records = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [(r["retries"], r["clients"]) for r in records] == [(0, 48)] * 3
    first, narrowed, last = (r["out_of_memory"] for r in records)
    assert narrowed >= 1 and first == last == 0
    record = [Choice(**choice) for choice in choices(tmp_path / "run")]
    toys.run(job(record=record), tmp_path / "here")
    ray_run, here = (RunFolder(tmp_path / name, "").read_final() for name in ("run", "here"))
    assert toys.same_bits(ray_run, here)
