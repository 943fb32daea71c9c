"""docs/metrics.md against a real run: its keys, its types, and the lines that read them."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import Page
from test_launch import tables

from subfleet.config import Experiment
from subfleet.launch import Run, launch

PAGE = Page("metrics.md")
TYPES = {"int": int, "float": float, "string": str}
SECONDS = {"plan", "train", "reduce", "server", "evaluate", "metrics", "total"}


def documented(heading: str) -> dict[str, str]:
    """Type by name, of a section's table."""
    section = PAGE.text.split(f"## `{heading}`")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", section, re.MULTILINE))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has all there is: devices, own networks, evaluations, several parts."""
    phones = {"flops_per_s": 1e7, "failure_rate": 0.1, "joules_per_flop": 1e-9}
    experiment = Experiment(**tables(fleet__device=phones, model__norm="batch", run__rounds=5))
    out = tmp_path_factory.mktemp("metrics") / "runs" / "quickstart"
    return launch(experiment, out=out, local=True)


def test_every_key_of_a_real_run_is_documented_with_its_type(run: Run) -> None:
    types = documented("metrics.jsonl")
    for record in run.metrics:
        for key, value in record.items():
            values = value.values() if types[key].startswith("dict of ") else [value]
            kind = TYPES[types[key].removeprefix("dict of ")]
            assert {type(one) for one in values} <= {kind, type(None)}, (key, value)
    # And no others: this run has all of them.
    assert {key for record in run.metrics for key in record} == set(types)
    seconds = {name for record in run.metrics for name in record["seconds"]}
    assert seconds == SECONDS and all(f"`{name}`" in PAGE.text for name in SECONDS)


def test_every_column_of_a_real_runs_parts_is_documented_with_its_type(run: Run) -> None:
    parts = sorted((run.path / "clients").glob("part-*.parquet"))
    assert len(parts) > 1
    for part in parts:
        schema = pq.read_schema(part)
        found = {
            field.name: "string" if pa.types.is_dictionary(field.type) else str(field.type)
            for field in schema
        }
        found = {
            name: {"float": "float32", "double": "float64"}.get(t, t) for name, t in found.items()
        }
        assert found == documented("clients/")
    table = run.clients()
    empty = [name for name in table.column_names if table[name].null_count == len(table)]
    assert empty == []


READING = {
    library: text
    for language, text in PAGE.blocks
    if language == "python" and (library := text.split()[1]) in ("pandas", "polars")
}


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_the_lines_read_what_the_run_wrote(
    library: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.path.parents[1])
    read: dict[str, Any] = {}
    exec(READING[library], read)
    rounds, clients = read["rounds"], read["clients"]
    assert list(rounds["round"]) == [record["round"] for record in run.metrics]
    assert list(rounds["clients"]) == [record["clients"] for record in run.metrics]
    assert float(rounds["acc_global"].max()) == run.summary["best_acc_global"]
    assert len(clients) == run.clients().num_rows
    assert set(clients["tier"]) == {"high", "low"}
    assert sorted(clients["client"]) == sorted(run.clients()["client"].to_pylist())
