"""docs/simulation.md: its tables are read, its trace is one, its keys are all there are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from subfleet.config import Experiment
from subfleet.core.device import KEYS, LAWS
from subfleet.platform.device_trace import Trace

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "simulation.md").read_text()
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL) for kind in ("toml", "csv")}


@pytest.mark.parametrize("block", BLOCKS["toml"])
def test_its_tables_are_experiments(block: str) -> None:
    found = Experiment(data={"name": "femnist"}, **tomllib.loads(block))
    assert found.fleet.devices()


def test_its_trace_is_read(tmp_path: Path) -> None:
    (text,) = BLOCKS["csv"]
    (tmp_path / "phones.csv").write_text(text)
    trace = Trace.read(str(tmp_path / "phones.csv"), 86_400.0)
    assert trace.numbers["flops_per_s"].tolist() == [2.1e9, 3e8, 9.5e8]
    assert trace.client is not None and trace.client.tolist() == [0, 1, 2]
    assert trace.windows is not None
    assert np.count_nonzero(trace.windows[1], axis=1).tolist() == [1, 1, 0], "midnight joins two"


def test_it_names_every_key_and_law() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    assert set(rows) == {*KEYS, "available", "period_s", "trace"}
    assert set(re.findall(r"^\| `\{ (\w+) =", TEXT, re.MULTILINE)) == set(LAWS)
