"""BatchNorm's running statistics stay with their clients, in every phase of every algorithm."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toys

from subfleet import registry
from subfleet.core import aggregate
from subfleet.core.program import LocalRule, Stream
from subfleet.platform import checkpoint
from subfleet.platform.executor import InlineExecutor
from subfleet.platform.rounds import Rounds
from subfleet.platform.runfolder import RunFolder

SIZES = [12, 3, 20, 9, 15, 1, 11, 2, 14, 6]
WIDTHS = (1.0, 0.5)
OPTIONS: dict[str, dict[str, Any]] = {
    "fedpa": {},
    "feduniform": {"widths": WIDTHS},
    "fedcs": {"warm_up": 1, "min_units": 1},
}
ENDINGS = ("running_mean", "running_var", "num_batches_tracked")

each_algorithm = pytest.mark.parametrize("name", OPTIONS)


def job(name: str, rounds: int = 5, **options):
    rule = LocalRule(lr=0.05, momentum=0.5)
    stream = Stream(batch=4, epochs=2)
    setting = toys.setting(toys.mlp(norm=True), WIDTHS, rule, stream, seed=3, rounds=rounds)
    made = registry.algorithms()[name](setting, **OPTIONS[name])
    data = toys.all_train(SIZES, (6,), 3)
    return toys.job(made, data, **{"cohort": 6, "held_out": 0.0, "bundle_clients": 3} | options)


def names(tree: Any, path: str = "") -> Iterator[str]:
    """The path of every leaf of nested mappings and lists."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from names(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from names(value, f"{path}/{i}")
    else:
        yield path


def bare(tree: Any) -> bool:
    """Whether no leaf is a statistic, and there are leaves at all."""
    found = list(names(tree))
    return bool(found) and not [name for name in found if name.endswith(ENDINGS)]


class Listening(InlineExecutor):
    """Looks at all that goes to the clients and comes back for the server."""

    def __init__(self, job):
        super().__init__(job.work, job.federation)
        self.space = job.work.net.space
        self.down = self.up = 0
        self.last: dict[int, Any] = {}  # what each client kept when it last took part
        self.returns = 0

    def run(self, bundles, shared):
        for tree in shared.values():
            assert bare(tree)
            self.down += 1
        training = [bundle for bundle in bundles if hasattr(bundle, "tasks")]
        for bundle in training:
            for client, own in zip(bundle.ids.tolist(), bundle.own, strict=True):
                assert (own is None) == (client not in self.last)
                if own is not None:
                    self.returns += 1
                    assert same(own, self.last[client])  # as it left it, bit for bit
        by_number = {bundle.number: bundle for bundle in training}
        for result in super().run(bundles, shared):
            if result.number in by_number and training:
                self._look(by_number[result.number], result)
            yield result

    def _look(self, bundle, result):
        if result.update is not None:
            sums, weights = aggregate.sums(result.update, self.space)
            assert bare(sums) and bare(weights)
            self.up += 1
        for item in result.collected or ():
            assert not [n for n in item.result.update if n.endswith(ENDINGS)]
            assert not [n for n in names(item.result.report or {}) if n.endswith(ENDINGS)]
        for client, kept in zip(bundle.ids.tolist(), result.kept, strict=True):
            if kept is not None:
                self.last[client] = {name: np.asarray(leaf).copy() for name, leaf in kept.items()}


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    arrays = [{n: np.asarray(v) for n, v in tree.items()} for tree in (a, b)]
    return arrays[0].keys() == arrays[1].keys() and all(
        arrays[0][n].tobytes() == arrays[1][n].tobytes() for n in arrays[0]
    )


def started(path: Path, job, *, resume=False, observers=()) -> Rounds:
    folder = RunFolder.open(path, "toy") if resume else RunFolder.create(path, "", "toy")
    rounds = Rounds(job, Listening(job), folder, observers)
    rounds.run()
    return rounds


@each_algorithm
def test_no_message_no_state_and_no_file_of_the_server_holds_any(name, tmp_path):
    rounds = started(tmp_path / "run", job(name, checkpoint_every=1, keep_checkpoints=9))
    heard = rounds.executor
    assert isinstance(heard, Listening)
    assert heard.down >= 5 and heard.up >= 4 and heard.returns > 0
    assert bare(rounds.state) and bare(rounds.folder.read_final())
    for round in range(1, 6):
        found = checkpoint.load_latest(rounds.folder.checkpoints, fingerprint="toy")
        assert found is not None and found.round == 6 - round
        assert bare(found.state["state"])
        shutil.rmtree(found.path)


@each_algorithm
def test_what_a_client_keeps_are_the_statistics_of_its_own_network(name, tmp_path):
    rounds = started(tmp_path / "run", job(name))
    heard, net = rounds.executor, rounds.job.work.net
    assert isinstance(heard, Listening) and len(heard.last) > 5
    for client, kept in heard.last.items():
        (stored,) = rounds.kept.read([client])
        assert stored is not None and same(stored, kept) and set(kept) == net.statistics
    variances = [row["norm0.running_var"] for row in heard.last.values()]
    assert len({row.tobytes() for row in variances}) > 5  # everybody's are different


@each_algorithm
def test_they_survive_a_crash(name, tmp_path):
    options = {"checkpoint_every": 2}
    whole = started(tmp_path / "whole", job(name, **options))
    with pytest.raises(toys.Crash):
        started(tmp_path / "cut", job(name, **options), observers=(toys.StopAfter(3),))
    folder = RunFolder.open(tmp_path / "cut", "toy")
    resumed = job(name, **options)
    rounds = Rounds(resumed, InlineExecutor(resumed.work, resumed.federation), folder)
    rounds.run()
    assert rounds.kept.ids.tolist() == whole.kept.ids.tolist() != []
    for client in whole.kept.ids.tolist():
        (a,), (b,) = rounds.kept.read([client]), whole.kept.read([client])
        assert a is not None and b is not None and same(a, b)
    tensors = [
        {n: torch.as_tensor(v) for n, v in r.state["params"].items()} for r in (rounds, whole)
    ]
    assert toys.same_bits(*tensors)
