"""Traces: what clients' programs write about their own work, from the program to the run folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import toys

from subfleet.algorithms import FedAvg
from subfleet.core.algorithm import Phase
from subfleet.core.errors import InputError
from subfleet.core.program import ClientResult, LossProgram, RunProgram
from subfleet.launch import Run
from subfleet.platform.record import Way

SIZES = [12, 7, 20, 9, 15, 5, 11, 8]


@dataclass(frozen=True)
class Searches(FedAvg):
    """Every even round is a search: odd clients write a group, those divisible by four nothing."""

    width: float | None = 1.0

    def phase(self, round):
        if round % 2:
            return super().phase(round)
        return Phase("search", RunProgram(self.search), "collect")

    def search(self, context):
        client = context.task.client
        steps = np.arange(1 + client % 3)
        trace: dict[str, Any] = {"step": steps, "accuracy": (steps / (client + 1)).tolist()}
        if client % 2:
            trace["group"] = [f"layer{step}" for step in steps]
        return ClientResult({}, trace=trace if client % 4 else None)

    def server_step(self, state, plan, reduced):
        return state if isinstance(reduced, list) else super().server_step(state, plan, reduced)


def searches(rounds=4, **options):
    algorithm = Searches(toys.setting(toys.mlp(), rounds=rounds))
    return toys.job(algorithm, toys.federation(SIZES, (6,), 3), cohort=5, **options)


def expected(round, clients):
    """The rows of one round, from the rule that `search` follows."""
    for client in sorted(clients):
        for step in range(1 + client % 3) if client % 4 else ():
            group = f"layer{step}" if client % 2 else None
            accuracy = step / (client + 1)
            row = {"round": round, "client": client, "step": step, "accuracy": accuracy}
            yield row | {"group": group}


def test_the_rows_of_every_search_are_kept_in_order(tmp_path):
    toys.run(searches(), tmp_path)
    run = Run(tmp_path, {})
    table, trained = run.traces(), run.clients().select(["round", "client"]).to_pylist()
    rows = [
        row
        for round in (2, 4)
        for row in expected(round, [at["client"] for at in trained if at["round"] == round])
    ]
    assert len(rows) > 4 and {row["group"] is None for row in rows} == {True, False}
    key = ("step", "accuracy", "group")
    assert table.column_names[:2] == ["round", "client"]
    assert set(table.column_names[2:]) == set(key)
    assert [{name: row[name] for name in rows[0]} for row in table.to_pylist()] == rows
    types = {name: table.schema.field(name).type for name in ("round", "client", *key)}
    assert types == {
        **{"round": pa.int32(), "client": pa.int64()},
        **{"step": pa.int64(), "accuracy": pa.float64(), "group": pa.string()},
    }
    files = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert files == ["round-000002.parquet", "round-000004.parquet"]


def test_the_files_do_not_depend_on_hosts_and_bundles(tmp_path):
    toys.run(searches(), tmp_path / "one")
    toys.run(searches(bundle_clients=1), tmp_path / "two", workers=2)
    for path in (tmp_path / "one" / "traces").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / "traces" / path.name).read_bytes()


def test_a_resume_deletes_the_files_beyond_its_checkpoint(tmp_path):
    toys.run(searches(rounds=6), tmp_path / "whole")
    with pytest.raises(toys.Crash):
        toys.run(searches(6, checkpoint_every=3), tmp_path / "cut", observers=(toys.StopAfter(5),))
    traces = tmp_path / "cut" / "traces"
    assert {path.name for path in traces.iterdir()} == {
        *("round-000002.parquet", "round-000004.parquet"),
    }
    kept = (traces / "round-000002.parquet").stat().st_mtime_ns

    class Look(toys.StopAfter):
        """What lies there when the run is taken up."""

        def on_start(self, info):
            self.found = [path.name for path in traces.iterdir()]

    look = Look(0)
    toys.run(searches(6, checkpoint_every=3), tmp_path / "cut", resume=True, observers=(look,))
    assert look.found == ["round-000002.parquet"]
    assert (traces / "round-000002.parquet").stat().st_mtime_ns == kept
    assert Run(tmp_path / "cut", {}).traces().equals(Run(tmp_path / "whole", {}).traces())


def test_without_traces_there_is_no_folder_and_an_empty_table(tmp_path):
    toys.run(searches(rounds=1), tmp_path)
    assert not (tmp_path / "traces").exists()
    table = Run(tmp_path, {}).traces()
    assert (table.num_rows, table.column_names) == (0, ["round", "client"])


# --- one client ----------------------------------------------------------------------------------


def bundle(program: RunProgram | LossProgram, way: Way = "loop"):
    net, data = toys.linear(6, 3), toys.all_train([8, 8], (6,), 3)
    algorithm = toys.OneProgram(toys.setting(net), program, "collect")
    tasks = [toys.task(net, client, samples=8) for client in range(2)]
    return toys.run_bundle(algorithm, tasks, data, net.init(0), way)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_loss_programs_finish_may_write_one_and_nothing_overwrites_it(way):
    """The column is a view into buffers that the clients take turns in."""

    def finish(start, trained, kept, inputs):
        return ClientResult(trained, trace={"bias": trained["fc.bias"].numpy()})

    result = bundle(replace(toys.loss_program(), finish=finish), way)
    uploaded = [item.result.update["fc.bias"].tolist() for item in result.collected or ()]
    assert uploaded[0] != uploaded[1]
    assert [result.traces[client]["bias"].tolist() for client in (0, 1)] == uploaded


def test_a_client_that_is_skipped_leaves_no_trace():
    def run(context):
        update = {"fc.bias": context.params["fc.bias"] / context.task.client}  # 0: not finite
        return ClientResult(update, trace={"step": [1]})

    result = bundle(RunProgram(run))
    assert result.table["status"].tolist() == ["skipped", "ok"]
    assert list(result.traces) == [1]


@pytest.mark.parametrize(
    ("trace", "words"),
    [
        ({"step": [1, 2], "cost": [3]}, r"differ in length \('step' 2, 'cost' 1\)"),
        ({"step": [[1], [2]]}, r"column 'step' is a list of 2; .*numbers alone or strings alone"),
        ({"step": [1, [2]]}, r"column 'step' is a list of 2"),
        ({"step": [1, "a"]}, r"column 'step' is a list of 2"),
        ({"step": [1, None]}, r"column 'step' is a list of 2"),
        ({"step": 3}, r"column 'step' is a int"),
        ({"step": [2**63]}, r"column 'step' .*below 2\*\*63"),
        ({"client": [1]}, r"column 'client' cannot be called so; .*'round' and 'client'"),
        ({1: [1]}, r"column 1 cannot be called so"),
        ([1, 2], r"returned a list of 2 as trace; .*a dict of columns"),
    ],
)
def test_a_bad_trace_is_refused_by_the_name_of_its_program_and_column(trace, words):
    def search(context):
        return ClientResult({}, trace=trace)

    with pytest.raises(InputError, match=rf"search.*{words}"):
        bundle(RunProgram(search))


@dataclass(frozen=True)
class Mixes(Searches):
    """Clients disagree about what a column holds."""

    def search(self, context):
        return ClientResult({}, trace={"step": ["a" if context.task.client % 2 else 1]})


def test_clients_whose_columns_do_not_go_together_are_refused(tmp_path):
    algorithm = Mixes(toys.setting(toys.mlp(), rounds=2))
    job = toys.job(algorithm, toys.federation(SIZES, (6,), 3), cohort=5)
    with pytest.raises(InputError, match=r"round 2: column 'step' is int64 and string; give"):
        toys.run(job, tmp_path)
