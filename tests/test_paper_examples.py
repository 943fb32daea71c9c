"""The papers' experiment files: what they name exists, and sizes are the papers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subfleet import registry
from subfleet.config import Experiment
from subfleet.core.algorithm import FULL, Setting, TierSize
from subfleet.core.program import LocalRule, Stream

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "examples" / "papers" / "adds"
SETS = ("femnist", "celeba", "shakespeare", "sent140")
ROWS = ("fedavg", "stc", "pfedme", "feddrop", "adds-slim", "adds-lrp")

# What the data would say, and the parameters of each network as papers count them: ADDS's
# Table 2 has 5.68 M and (with 62 classes, 60 of them too many) 9.95 M.
FACTS: dict[str, dict[str, Any]] = {
    "femnist": {"input_shape": (1, 28, 28), "num_classes": 62},
    "celeba": {"input_shape": (3, 112, 112), "num_classes": 2},
    "shakespeare": {"input_shape": (80,), "num_classes": 80, "vocabulary": 81},
    "sent140": {
        **{"input_shape": (25,), "num_classes": 2, "vocabulary": 50},
        "embedding": np.zeros((50, 300), np.float32),
    },
}
PARAMETERS = {"femnist": 5_675_584, "celeba": 9_883_776}
TRAINING_CLIENTS = {"femnist": 850, "celeba": 970, "shakespeare": 528, "sent140": 1064}


def test_there_is_a_file_for_each_row_of_the_tables() -> None:
    names = {f"{name}-{row}.toml" for name in SETS for row in ROWS}
    assert {path.name for path in FILES.glob("*.toml")} == names


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", SETS)
def test_a_file_names_what_there_is_and_builds_it(name: str, row: str) -> None:
    experiment = Experiment.load(FILES / f"{name}-{row}.toml")
    registry.check_names(experiment)
    data, train = experiment.data, experiment.train
    assert data.name == name
    factory = registry.data_factory(name)
    registry.check_options("data", factory, data.options, registry.DATA_GIVEN, name)
    net = registry.build_model(experiment.model, **FACTS[name])
    if name in PARAMETERS:
        assert net.cost(FULL).params == PARAMETERS[name]
    setting = Setting(
        net=net,
        tiers=(TierSize("all", 1.0, FULL),),
        rule=LocalRule(train.lr, train.momentum),
        stream=Stream(batch=train.batch_size, epochs=train.epochs or 1),
        seed=0,
        rounds=experiment.run.rounds,
    )
    algorithm = registry.build_algorithm(experiment.algorithm, setting)
    assert algorithm.phase(1).program is not None
    assert (experiment.run.rounds, train.epochs) == (200, 3)
    assert experiment.run.cohort == round(0.3 * TRAINING_CLIENTS[name])
