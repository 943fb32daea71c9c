"""Which parts of a client's data come with a bundle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import toys

from subfleet.core.program import ClientResult, LossProgram, RunProgram, StepProgram, Stream
from subfleet.datasets.memory import InMemory
from subfleet.datasets.synthetic import SyntheticFemnist
from subfleet.platform.engine import parts_needed


def nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("only its streams are looked at")


STREAMS = {"w": Stream(batch=4), "alpha": Stream(batch=4, part="val")}


@pytest.mark.parametrize(
    ("program", "parts"),
    [
        (LossProgram(nothing, toys.LocalRule(), Stream(batch=4)), {"train"}),
        (StepProgram(nothing, nothing, nothing, STREAMS), {"train", "val"}),
        (RunProgram(nothing), {"train", "val", "test"}),
    ],
)
def test_a_bundle_brings_what_its_program_may_read(program: Any, parts: set[str]) -> None:
    assert parts_needed(program, local_test=False) == parts
    assert parts_needed(program, local_test=True) == parts | {"test"}


def seen_by_a_search(data: Any, net: Any) -> list[dict[str, int]]:
    def run(context: Any) -> ClientResult:
        sizes = {part: len(context.data(part)[1]) for part in ("train", "val", "test")}
        return ClientResult({}, report=sizes)

    algorithm = toys.OneProgram(toys.setting(net), RunProgram(run), reduction="collect")
    tasks = [toys.task(net, client) for client in (0, 1)]
    reports = toys.run_bundle(algorithm, tasks, data, net.init(0)).reports
    return [reports[client] for client in (0, 1)]


def test_a_search_sees_the_rows_that_validate() -> None:
    rows = toys.federation([10, 20], (6,), 3, val_share=0.25)
    ids = np.arange(2)
    wanted = {part: rows.sizes(ids, part).tolist() for part in ("train", "val", "test")}
    assert isinstance(rows, InMemory) and min(wanted["val"]) > 0
    found = seen_by_a_search(rows, toys.mlp())
    assert {part: [client[part] for client in found] for part in wanted} == wanted


def test_where_none_validate_a_search_sees_none() -> None:
    data = SyntheticFemnist(2, mean_samples=20.0)
    net = toys.small_cnn(input_shape=(1, 28, 28), num_classes=62, channels=(4, 6), hidden=10)
    assert [client["val"] for client in seen_by_a_search(data, net)] == [0, 0]
