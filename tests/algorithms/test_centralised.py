from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import toys

from subfleet.algorithms import Centralised, FedAvg
from subfleet.config import Experiment
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Stream
from subfleet.datasets.federation import split_clients
from subfleet.datasets.memory import InMemory
from subfleet.datasets.pooled import Pooled
from subfleet.launch import assemble, launch
from subfleet.platform.metrics import ClientsLog, read_metrics
from subfleet.platform.runfolder import RunFolder
from subfleet.trained import TrainedRun

RULE = LocalRule(lr=0.1, momentum=0.5)


def setting(stream, widths=(1.0,), norm=False, rounds=4):
    return toys.setting(toys.mlp(norm=norm), widths, RULE, stream, seed=3, rounds=rounds)


def pooled(sizes=(7, 12, 5, 8)):
    """32 rows to train on, and one client that is held out."""
    data = toys.all_train([*sizes, 6], (6,), 3)
    return Pooled(data, np.arange(len(sizes)))


def final(algorithm, data, path, **options):
    toys.run(toys.job(algorithm, data, cohort=1, **options), path)
    return RunFolder(path, "").read_final()


# --- against FedAvg with one client --------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_it_is_fedavg_with_one_client_that_holds_all(norm, engine, tmp_path):
    """Bit for bit: E = 2 epochs of 32 rows in batches of 4, all of them in a round.

    FedAvg's passes have to be numbered from round to round, too; left to themselves they
    are drawn by round, and no batch is the same.
    """
    stream, data = Stream(batch=4, epochs=2), pooled()
    central = Centralised(setting(stream, norm=norm), fraction=1.0)
    alone = FedAvg(setting(replace(stream, spans_rounds=True), norm=norm))
    results = [
        final(algorithm, data, tmp_path / name, engine=engine)
        for name, algorithm in (("central", central), ("alone", alone))
    ]
    assert toys.same_bits(*results)


def test_with_whole_batches_it_is_fedavg_with_one_client_as_it_stands(tmp_path):
    """No order of the rows matters to a whole batch but for rounding."""
    data, stream = pooled(), Stream(batch=None, epochs=3)
    central = Centralised(setting(stream), fraction=1.0)
    results = [
        final(algorithm, data, tmp_path / name)
        for name, algorithm in (("central", central), ("alone", FedAvg(setting(stream))))
    ]
    assert toys.distance(*results) < 1e-5


@pytest.mark.parametrize("norm", [False, True])
def test_the_partition_leaves_no_trace(norm, tmp_path):
    """The same rows dealt otherwise give the same bits."""
    whole = toys.all_train([32], (6,), 3).block(np.array([0]), "train")
    held = toys.all_train([6], (6,), 3, seed=1).block(np.array([0]), "train")
    algorithm = Centralised(setting(Stream(batch=4, epochs=2), norm=norm))
    finals = []
    for number, sizes in enumerate(([32], [7, 12, 5, 8], [1] * 32, [31, 1])):
        order = np.random.default_rng(number).permutation(32)
        x, y = np.concatenate([whole.x[order], held.x]), np.concatenate([whole.y[order], held.y])
        offsets = np.cumsum([0, *sizes, 6])
        dealt = InMemory(x, y, offsets, num_classes=3, train=np.ones(38, bool))
        data = Pooled(dealt, np.arange(len(sizes)))
        finals.append(final(algorithm, data, tmp_path / str(number), eval_every=1))
    assert all(toys.same_bits(finals[0], other) for other in finals[1:])
    accuracies = {
        tuple(r["acc_global"] for r in read_metrics(tmp_path / str(n) / "metrics.jsonl"))
        for n in range(4)
    }
    assert len(accuracies) == 1


# --- a round's work ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stream", "fraction", "rows", "steps"),
    [
        (Stream(batch=20, epochs=3), 0.3, 16_000, 720),  # 0.3 * 3 * 16,000 / 20
        (Stream(batch=4, epochs=2), 0.3, 32, 5),  # 4.8
        (Stream(batch=4, epochs=2), 1.0, 32, 16),
        (Stream(batch=20, epochs=1), 0.3, 10, 1),  # a third of a pass: a step at least
        (Stream(batch=None, epochs=5), 0.6, 32, 3),  # whole batches
        (Stream(batch=4, steps=7), 0.3, 32, 7),  # as many as asked for
    ],
)
def test_steps_of_a_round_by_hand(stream, fraction, rows, steps):
    assert Centralised(setting(stream), fraction=fraction).steps(rows) == steps


def test_in_the_long_run_every_row_is_seen_equally_often():
    """5 steps of 4 of 32 rows a round: in 8 rounds 160 rows, which is each row 5 times."""
    from subfleet.platform import batches

    algorithm = Centralised(setting(Stream(batch=4, epochs=2)))
    stream: Any = algorithm.phase(1).program
    seen = np.zeros(32, int)
    for round in range(1, 9):
        steps = replace(stream.stream, steps=algorithm.steps(32))
        for rows in batches.steps(steps, 32, seed=3, round=round, client=0):
            seen[rows] += 1
    assert seen.tolist() == [5] * 32


def test_a_round_is_one_task_on_everything_for_which_nothing_is_charged(tmp_path):
    algorithm = Centralised(setting(Stream(batch=4, epochs=2), (1.0, 0.25), norm=True))
    job = toys.job(algorithm, pooled(), cohort=1, eval_every=2)
    toys.run(job, tmp_path / "run")
    for record in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert (record["bytes_up"], record["bytes_down"], record["bytes_map"]) == (0, 0, 0)
        assert (record["clients"], record["samples"]) == (1, 32)
    table = ClientsLog(tmp_path / "run" / "clients").read().to_pydict()
    assert set(table["client"]) == {0} and table["steps"] == [5] * 4
    assert set(table["params"]) == {107 + 2 * 12}  # the whole network, with its norms' scales
    assert set(algorithm.views({}).values()) == {toys.FULL}


# --- assembled from an experiment ----------------------------------------------------------------


def experiment(**changes):
    tables = Experiment(
        data={"name": "synthetic_femnist", "clients": 20, "mean_samples": 12.0},
        model={"name": "small_cnn", "channels": [2, 4], "hidden": 8, "norm": "batch"},
        algorithm={"name": "centralised"},
        train={"epochs": 2, "batch_size": 10},
        run={"rounds": 4, "cohort": 4, "eval_every": 2, "checkpoint_every": 2},
    )
    return tables.with_values({k.replace("__", "."): v for k, v in changes.items()})


def test_a_run_pools_the_training_clients(tmp_path):
    job = assemble(experiment())
    apart = assemble(experiment(algorithm__name="fedavg"))
    train, held = split_clients(apart.work.seed, 20)
    assert isinstance(job.federation, Pooled) and job.federation.num_clients == 1 + len(held)
    assert np.array_equal(job.federation.train_ids, train)
    assert job.options.cohort == 1 and not job.streams
    assert type(apart.federation) is not Pooled and apart.options.cohort == 4
    rows = int(apart.federation.sizes(train, "train").sum())

    done = launch(experiment(), out=tmp_path / "run", local=True)
    assert [m["samples"] for m in done.metrics] == [rows] * 4
    assert done.clients().to_pydict()["steps"] == [round(0.3 * 2 * rows / 10)] * 4
    assert 0 <= done.summary["acc_global"] <= 1
    # The model is measured on the clients on which FedAvg's is.
    ids = np.arange(1, 1 + len(held))
    assert np.array_equal(job.federation.block(ids, "all").y, apart.federation.block(held, "all").y)
    # And it goes on from where it was.
    launch(experiment(run__rounds=6), out=tmp_path / "run", local=True, resume=True)
    whole = launch(experiment(run__rounds=6), out=tmp_path / "whole", local=True)
    resumed = RunFolder(tmp_path / "run", "").read_final()
    assert toys.same_bits(resumed, whole.params())
    assert all(torch.isfinite(v).all() for v in resumed.values())


def test_a_finished_run_opens_again_even_without_its_data(tmp_path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        "import numpy as np, os\n"
        "from subfleet.core.errors import InputError\n"
        "from subfleet.datasets import InMemory\n"
        "def rows():\n"
        "    if os.path.exists('gone'):\n"
        "        raise InputError('the rows are gone')\n"
        "    x = np.random.default_rng(0).standard_normal((80, 1, 8, 8)).astype(np.float32)\n"
        "    return InMemory(x, np.arange(80) % 4, np.arange(0, 81, 8))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = experiment().to_tables() | {"data": {"name": "own_rows:rows"}}
    done = launch(Experiment(**given), out=tmp_path / "run", local=True)
    here = TrainedRun.open(done.path)
    assert here.no_data is None and isinstance(here.job.federation, Pooled)
    (tmp_path / "gone").touch()
    without = TrainedRun.open(done.path)
    assert without.no_data == "the rows are gone"
    assert toys.same_bits(without.params, here.params)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.0, -0.3, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(InputError, match=rf"algorithm\.fraction={fraction} is outside \(0, 1\]"):
        Centralised(setting(Stream()), fraction=fraction)
