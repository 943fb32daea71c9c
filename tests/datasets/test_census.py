"""What `subfleet data describe` says of clients, by numbers worked out by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest

from subfleet.datasets import census as counting
from subfleet.datasets.census import QUANTILES, census
from subfleet.datasets.memory import InMemory
from subfleet.datasets.synthetic import SyntheticFemnist

# Clients of 2, 4 and 6 rows with 1, 2 and 3 labels; of the classes 0..4 nobody has 3.
LABELS = [[0, 0], [1, 1, 4, 4], [0, 1, 2, 2, 2, 2]]


def three() -> InMemory:
    y = np.concatenate([np.array(labels) for labels in LABELS])
    offsets = np.array([0, 2, 6, 12])
    train = np.arange(12) % 2 == 0
    return InMemory(np.zeros((12, 2, 3), np.float32), y, offsets, num_classes=5, train=train)


def test_numbers_worked_out_by_hand() -> None:
    found = census(three())
    assert (found["name"], found["clients"], found["samples"]) == ("in_memory", 3, 12)
    assert found["mean"] == 4
    assert found["sd"] == pytest.approx(np.sqrt(8 / 3))  # over n, not n - 1
    assert (found["classes"], found["classes_present"]) == (5, 4)
    assert (found["classes_min"], found["classes_max"]) == (1, 3)
    assert found["parts"] == {"train": 6, "val": 0, "test": 6}
    assert found["input_shape"] == [2, 3]
    wanted = {"0": 2, "0.05": 2.2, "0.25": 3, "0.5": 4, "0.75": 5, "0.95": 5.8, "1": 6}
    assert found["quantiles"] == pytest.approx(wanted)
    halves = {name: size / 2 for name, size in wanted.items()}
    assert found["class_quantiles"] == pytest.approx(halves)
    assert [float(name) for name in found["quantiles"]] == list(QUANTILES)
    assert json.loads(json.dumps(found)) == found


def test_one_client() -> None:
    found = census(InMemory(np.zeros((3, 1), np.float32), np.zeros(3, int), np.array([0, 3])))
    assert (found["sd"], found["classes_min"], found["classes_max"]) == (0, 1, 1)
    assert set(found["quantiles"].values()) == {3.0}


def test_slices_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SyntheticFemnist(100)
    whole = census(data)
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(counting, "_AT_ONCE", 33)
    assert census(data, lambda *call: told.append(call)) == whole
    assert told == [("clients counted", done, 100) for done in (0, 33, 66, 99)]
