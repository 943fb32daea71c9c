import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.errors import InputError
from subfleet.platform.columns import CLIENTS_COLUMNS, CLIENTS_SCHEMA, METRICS_COLUMNS
from subfleet.platform.metrics import (
    ClientsLog,
    MetricsLog,
    params_sha256,
    read_metrics,
    summarise,
)

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def rounds(log):
    return [record["round"] for record in log.read()]


def test_lines_are_json_and_non_finite_numbers_null(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"round": 1, "loss_train": float("nan"), "seconds": {"train": np.float32(0.5)}})
    log.append({"round": 2, "acc_global": np.float64("inf"), "coverage_min": np.int64(3)})
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"round": 1, "loss_train": None, "seconds": {"train": 0.5}},
        {"round": 2, "acc_global": None, "coverage_min": 3},
    ]
    assert list(read_metrics(log.path)) == log.read()


@given(cut=st.integers(0, 200))
def test_a_line_cut_at_any_byte_is_dropped_and_no_other(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("m") / "m.jsonl"
    log = MetricsLog(path)
    for number in range(1, 6):
        log.append({"round": number, "loss_train": number / 7})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole))])
    complete = path.read_bytes().count(b"\n")
    again = MetricsLog(path)
    assert rounds(again) == list(range(1, complete + 1))
    assert again.last_round == complete
    again.append({"round": complete + 1})
    assert rounds(again) == list(range(1, complete + 2))
    again.close()


def test_damage_in_the_middle_is_not_passed_over(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(InputError, match="line 2 of 3 is damaged"):
        MetricsLog(tmp_path / "m.jsonl")


def test_truncate_cuts_beyond_the_checkpoint(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for number in range(1, 8):
        log.append({"round": number})
    log.truncate(4)
    log.append({"round": 5})
    assert rounds(log) == [1, 2, 3, 4, 5]
    with pytest.raises(AssertionError, match="round 5 is there already"):
        log.append({"round": 5})
    log.truncate(0)
    assert rounds(log) == [] and log.last_round == 0


def add(log, number, clients=3):
    ids = np.arange(clients) + 10 * number
    log.add(
        number, {"client": ids, "tier": ["low"] * clients, "status": np.array(["ok"] * clients)}
    )


def test_parts_hold_every_round_once(tmp_path):
    log = ClientsLog(tmp_path / "clients")
    assert log.flush() is None and log.read().num_rows == 0
    for number in range(1, 11):
        add(log, number)
        if number % 4 == 0:
            log.flush()
    assert log.flush() == tmp_path / "clients" / "part-000009-000010.parquet"
    table = log.read()
    assert table.schema.equals(CLIENTS_SCHEMA)
    assert table["round"].to_pylist() == sorted(list(range(1, 11)) * 3)
    assert set(table["tier"].to_pylist()) == {"low"}
    assert table["loss"].null_count == 30


@pytest.mark.parametrize("after", [0, 3, 4, 6, 10])
def test_truncate_drops_parts_and_rewrites_the_straddling_one(tmp_path, after):
    log = ClientsLog(tmp_path)
    for number in range(1, 11):
        add(log, number)
        if number % 4 == 0:
            log.flush()
    log.flush()
    add(log, 11)
    for _ in range(2):  # a second time changes nothing
        log.truncate(after)
    assert sorted(set(log.read()["round"].to_pylist())) == list(range(1, after + 1))
    for number in range(after + 1, 13):
        add(log, number)
    log.flush()
    assert log.read()["round"].to_pylist() == sorted(list(range(1, 13)) * 3)


def test_a_truncate_cut_short_is_finished_by_the_next(tmp_path):
    log = ClientsLog(tmp_path)
    for number in range(1, 5):
        add(log, number)
    whole = log.flush()
    saved = whole.read_bytes()
    log.truncate(2)
    whole.write_bytes(saved)  # killed after writing the shorter part, before removing the longer
    log.truncate(2)
    assert log.read()["round"].to_pylist() == [1, 1, 1, 2, 2, 2]


def test_columns_are_checked_and_cast(tmp_path):
    log = ClientsLog(tmp_path)
    with pytest.raises(InputError, match=r"colour.*unknown; known: round, client"):
        log.add(1, {"colour": [1]})
    log.add(1, {"client": pa.array([1, 2]), "loss": np.array([0.5, np.nan]), "steps": [3, None]})
    log.add(2, {})
    log.flush()
    table = log.read()
    assert table["steps"].to_pylist() == [3, None]
    assert table["loss"].type == pa.float32()
    assert table.num_rows == 2


def test_summary_has_last_best_and_totals():
    records = [
        {"round": 1, "acc_global": 0.4, "loss_global": 2.0, "bytes_up": 10, "clients": 3},
        {"round": 2, "acc_global": 0.9, "loss_global": float("nan"), "bytes_up": 20, "clients": 4},
        {"round": 3, "acc_global": None, "loss_global": 1.0, "bytes_up": 30},
        {"round": 4, "acc_global": 0.9, "bytes_up": 0},
    ]
    got = summarise(
        records, seed=5, finished=True, params_mean=10.0, flops_mean=20.0, params_sha256="ab"
    )
    assert got["rounds"] == 4 and got["seed"] == 5 and got["finished"] is True
    assert (got["best_acc_global"], got["best_acc_global_round"]) == (0.9, 2)
    assert (got["best_loss_global"], got["best_loss_global_round"]) == (1.0, 3)
    assert got["total_bytes_up"] == 60 and got["clients"] == 4 and got["loss_global"] == 1.0
    assert "round" not in got
    empty = summarise([], seed=0, finished=False, params_mean=0.0, flops_mean=0.0, params_sha256="")
    assert empty["rounds"] == 0


def test_the_digest_sees_names_dtypes_shapes_and_values():
    base = {"a": torch.tensor([1.0, 2.0]), "n": torch.tensor(3), "e": torch.empty(0, 2)}
    variants = [
        base,
        {**base, "a": torch.tensor([1.0, -2.0])},
        {**base, "a": torch.tensor([[1.0], [2.0]])},
        {**base, "a": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {**base, "n": torch.tensor([3])},
        {**base, "a": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)},
        {("b" if key == "a" else key): value for key, value in base.items()},
    ]
    digests = [params_sha256(variant) for variant in variants]
    assert len(set(digests)) == len(digests)
    x = torch.arange(6.0).reshape(2, 3)
    assert params_sha256({"x": x.T}) == params_sha256({"x": x.T.contiguous()})


def documented(heading):
    section = DOCUMENT.read_text().split(f"## `{heading}`")[1].split("\n## ")[0]
    rows = [re.split(r"\s*\|\s*", line.strip("| ")) for line in section.splitlines() if "|" in line]
    return [row for row in rows if row[0].startswith("`")]


def test_the_document_states_the_columns_and_no_others():
    want = [
        [f"`{c.name}`", c.type, c.unit, c.meaning, f"`{c.tag}`" if c.tag else "–"]
        for c in METRICS_COLUMNS
    ]
    assert documented("metrics.jsonl") == want
    assert documented("clients/") == [
        [f"`{c.name}`", c.type, c.unit, c.meaning] for c in CLIENTS_COLUMNS
    ]


def test_the_document_states_the_summary():
    got = summarise(
        [{"round": 1, "acc_global": 0.5, "bytes_up": 1}],
        seed=0,
        finished=True,
        params_mean=1.0,
        flops_mean=1.0,
        params_sha256="",
    )
    text = DOCUMENT.read_text()
    own = {key for key in got if not key.startswith(("best_", "total_"))}
    for key in own - {column.name for column in METRICS_COLUMNS}:
        assert f"| `{key}` |" in text
