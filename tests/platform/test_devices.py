"""A fleet's devices: traces, draws for who is asked for, and what a million clients cost."""

from __future__ import annotations

import pickle
from pathlib import Path
from time import process_time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from subfleet.core.errors import InputError
from subfleet.platform.devices import Devices


def devices(*tables: dict, clients: int = 12, seed: int = 0) -> Devices:
    tier_of = np.arange(clients) % len(tables)
    found = Devices.of(tables, [f"t{i}" for i in range(len(tables))], tier_of, seed)
    assert found is not None
    return found


def speeds(found: Devices, ids: list[int], tiers: list[int] | None = None) -> list[float]:
    tier = np.array(tiers or [0] * len(ids))
    return found.numbers(np.array(ids), tier, "flops_per_s").tolist()


def written(folder: Path, text: str) -> str:
    (folder / "phones.csv").write_text(text)
    return str(folder / "phones.csv")


# --- draws ---------------------------------------------------------------------------------------


def test_each_tier_has_its_own_numbers_and_defaults_take_no_time() -> None:
    found = devices({"flops_per_s": 8.0}, {"latency_s": 2.0})
    assert speeds(found, [0, 1, 2], [0, 1, 0]) == [8.0, np.inf, 8.0]
    assert found.numbers(np.arange(3), np.array([0, 1, 0]), "latency_s").tolist() == [0, 2, 0]


def test_a_draw_depends_on_client_and_seed_and_not_on_who_is_drawn_beside() -> None:
    law = {"flops_per_s": {"lognormal": [1e9, 0.5]}}
    found = devices(law)
    assert speeds(found, [3, 5, 9])[1:] == speeds(found, [5, 9])
    assert speeds(pickle.loads(pickle.dumps(found)), [5]) == speeds(found, [5])
    assert speeds(devices(law, seed=1), [5]) != speeds(found, [5])
    both = devices(law | {"up_bytes_per_s": law["flops_per_s"]})
    ids, tier = np.arange(500), np.zeros(500, int)
    drawn = [np.log(both.numbers(ids, tier, n)) for n in ("flops_per_s", "up_bytes_per_s")]
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.2, "one number tells nothing of another"


def test_failures_come_at_their_rate_anew_each_round() -> None:
    found = devices({"failure_rate": 0.2})
    ids, tier = np.arange(5_000), np.zeros(5_000, int)
    first, second = (np.isfinite(found.failures(ids, tier, r)) for r in (1, 2))
    # Binomial: 1,000 expected, standard deviation 28; five of them.
    assert abs(first.sum() - 1_000) < 142 and abs(second.sum() - 1_000) < 142
    assert abs((first & second).sum() - 200) < 64, "rounds are independent"
    assert np.array_equal(first, np.isfinite(found.failures(ids, tier, 1)))
    share = found.failures(ids, tier, 1)[first]
    assert share.min() > 0 and share.max() < 1 and share.mean() == pytest.approx(0.5, abs=0.05)


def test_a_million_clients_cost_a_cohort_nothing() -> None:
    found = devices({"flops_per_s": {"lognormal": [1e9, 0.5]}, "failure_rate": 0.1}, clients=10)
    tier = np.zeros(100, int)

    def seconds(clients: int) -> float:
        ids = np.linspace(0, clients - 1, 100).astype(int)
        started = process_time()
        for round in range(20):
            found.numbers(ids, tier, "flops_per_s")
            found.failures(ids, tier, round)
        return (process_time() - started) / 20

    few, many = (min(seconds(n) for _ in range(5)) for n in (1_000, 1_000_000))
    assert many < 3 * few + 1e-4 and many < 0.01
    assert len(pickle.dumps(found)) < 2_000


# --- traces --------------------------------------------------------------------------------------


def test_rows_are_dealt_by_the_seed(tmp_path: Path) -> None:
    trace = written(tmp_path, "flops_per_s,latency_s\n1e9,1\n2e9,2\n4e9,3\n")
    found = devices({"trace": trace, "up_bytes_per_s": 7.0})
    ids, tier = np.arange(3_000), np.zeros(3_000, int)
    dealt = found.numbers(ids, tier, "flops_per_s")
    values, counts = np.unique(dealt, return_counts=True)
    assert values.tolist() == [1e9, 2e9, 4e9] and counts.min() > 850  # 1,000 each, sd 26
    latency = found.numbers(ids, tier, "latency_s")
    assert {(f, s) for f, s in zip(dealt, latency, strict=True)} == {(1e9, 1), (2e9, 2), (4e9, 3)}
    assert set(found.numbers(ids, tier, "up_bytes_per_s")) == {7.0}
    assert speeds(devices({"trace": trace}, seed=1), ids.tolist()) != dealt.tolist()


def test_a_row_may_be_a_clients_own_in_csv_and_parquet(tmp_path: Path) -> None:
    trace = written(tmp_path, "client, flops_per_s\n2, 30\n\n0, 10\n1, 20\n")
    assert speeds(devices({"trace": trace}, clients=3), [0, 1, 2]) == [10, 20, 30]
    table = pa.table({"client": [2, 0, 1], "flops_per_s": [30.0, 10.0, 20.0]})
    pq.write_table(table, tmp_path / "phones.parquet")
    found = devices({"trace": str(tmp_path / "phones.parquet")}, clients=3)
    assert speeds(found, [2, 0]) == [30, 10]
    assert len(found.facts[str(tmp_path / "phones.parquet")]) == 64


def test_windows_of_a_trace_and_a_shift(tmp_path: Path) -> None:
    trace = written(tmp_path, "client,available\n0,20-24 2-6\n1,\n2,0-24\n")
    found = devices({"trace": trace, "period_s": 24, "shift_s": 1}, clients=3)
    wait, stay = found.presence(np.arange(3), np.zeros(3, int), 24 * 9 + 6.0)
    assert wait.tolist() == [13, np.inf, 0] and stay.tolist() == [4, 0, np.inf]
    assert found.come_and_go and not devices({"latency_s": 1}).come_and_go


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("flops_per_s\n1\n-3\n", "line 3: flops_per_s = -3 is not above 0; give FLOPs a second"),
        ("flops_per_s\n1\n\n0\n", "line 4: flops_per_s = 0 is not above 0"),
        ("failure_rate\n0.1\n-0.1\n", "line 3: failure_rate = -0.1 is negative; give the prob"),
        ("failure_rate\n1.5\n", "line 2: failure_rate = 1.5 is above 1"),
        ("latency_s\nfast\n", "line 2: latency_s = 'fast' is no number; give seconds"),
        ("latency_s\nnan\n", "line 2: latency_s = nan is no finite number"),
        ("flop_per_s\n1\n", "column 'flop_per_s' is unknown; did you mean 'flops_per_s'"),
        ("flops_per_s,latency_s\n1\n", "line 2 has 1 values, the header 2"),
        ("latency_s,latency_s\n1,2\n", "two columns have one name"),
        ("latency_s\n", "has no rows"),
        ("", "has no column of flops_per_s"),
        ("client\n1\n", "has no column of flops_per_s"),
        ("client,latency_s\n0,1\n0,2\n", "line 3: client = 0 has a row already"),
        ("client,latency_s\n0.5,1\n", "line 2: client = 0.5 is no whole number from 0"),
        ("client,latency_s\n0,1\n1,1\n", "2 of 4 clients have no row, client 2 first"),
        ("available\n0-5 9\n", "line 2: available = '0-5 9': '9' is no window; give windows"),
        ("available\n0-99999\n", r"line 2: available = '0-99999': \[0.0, 99999.0\] is not a win"),
        ("available\n0-x\n", "line 2: available = '0-x': could not convert"),
    ],
)
def test_a_bad_trace_is_named_with_line_column_value_and_remedy(
    tmp_path: Path, text: str, words: str
) -> None:
    trace = written(tmp_path, text)
    with pytest.raises(InputError, match=f"device of tier 't0': trace {trace}.*{words}"):
        devices({"trace": trace}, clients=4)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.csv: no such file; give a CSV or Parquet"):
        devices({"trace": str(tmp_path / "absent.csv")})
    (tmp_path / "no.parquet").write_text("latency_s\n1\n")
    with pytest.raises(InputError, match=r"no\.parquet: cannot be read as parquet"):
        devices({"trace": str(tmp_path / "no.parquet")})
    (tmp_path / "latin.csv").write_bytes(b"latency_s\n\xff\n")
    with pytest.raises(InputError, match=r"latin\.csv: cannot be read as csv"):
        devices({"trace": str(tmp_path / "latin.csv")})
    table = pa.table({"flops_per_s": [1.0, -2.0]})
    pq.write_table(table, tmp_path / "phones.parquet")
    with pytest.raises(
        InputError, match=r"phones\.parquet: row 2: flops_per_s = -2 is not above 0"
    ):
        devices({"trace": str(tmp_path / "phones.parquet")})


def test_a_number_is_said_once(tmp_path: Path) -> None:
    trace = written(tmp_path, "latency_s\n1\n")
    with pytest.raises(InputError, match="column 'latency_s' is there, and latency_s is set"):
        devices({"trace": trace, "latency_s": 2})
