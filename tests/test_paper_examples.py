"""The papers' experiment files: what they name exists, and sizes are the papers'."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subfleet import registry
from subfleet.config import Experiment, ModelTable
from subfleet.core.algorithm import FULL, Setting, TierSize
from subfleet.core.budget import width_map
from subfleet.core.program import LocalRule, Stream
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap

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


# --- APFL ------------------------------------------------------------------------------------

APFL = ROOT / "examples" / "papers" / "apfl"
APFL_CLASSES = {"cifar10": 10, "cifar100": 100, "cinic10": 10}
# What MobileNetV2 takes at widths 1, 0.75 and 0.5 on 32 pixels, by classes: operations, and all
# trained parameters.
REFERENCE = {
    10: {
        1.0: (87_976_448, 2_236_682),
        0.75: (59_310_080, 1_368_234),
        0.5: (27_969_024, 700_490),
    },
    100: {
        1.0: (88_091_648, 2_351_972),
        0.75: (59_425_280, 1_483_524),
        0.5: (28_084_224, 815_780),
    },
}
SHARES = {"high": [0.5, 0.3, 0.2], "low": [0.2, 0.3, 0.5]}
APFL_NAMES = sorted(path.stem for path in APFL.glob("*.toml"))


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What APFL reports, as the benchmark has it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
    return importlib.import_module("apfl_numbers")


def test_there_is_a_file_for_each_cell_of_apfls_table(numbers: Any) -> None:
    cells = {
        f"{name}-{partition}-{row}": paper
        for name, partitions in numbers.PAPER.items()
        for partition, rows in partitions.items()
        for row, paper in rows.items()
    }
    assert sorted(cells) == APFL_NAMES and len(cells) == 3 * 2 * (1 + 2 * 2)
    for name, paper in cells.items():
        head = (APFL / f"{name}.toml").read_text().splitlines()[:2]
        assert head[1].startswith(f"# The paper reports {paper} %"), name
        words = name.split("-", 2)
        assert numbers.SETS[words[0]] in head[0] and numbers.PARTITIONS[words[1]] in head[0]


@cache
def mobilenet(width: float, classes: int) -> SuperNetwork:
    """The network of a file, built once for all that share it."""
    model = ModelTable(name="mobilenet_v2", width=width)
    return registry.build_model(model, input_shape=(3, 32, 32), num_classes=classes)


def sizes(net: SuperNetwork, map: IndexMap) -> tuple[int, int]:
    """Operations, and all trained parameters."""
    cost = net.cost(map, count_bias=True, count_norm=True)
    return cost.macs, cost.params


def of_apfl(name: str) -> tuple[Experiment, Any, Any]:
    """A file's experiment, its network, and its algorithm with the tiers that it names."""
    experiment = Experiment.load(APFL / f"{name}.toml")
    assert experiment.model.name == "mobilenet_v2" and set(experiment.model.options) == {"width"}
    net = mobilenet(experiment.model.width, APFL_CLASSES[experiment.data.name])
    tiers = tuple(
        TierSize(tier.name, tier.share, width_map(net, tier.width), width=tier.width)
        for tier in experiment.fleet.tiers
    )
    train = experiment.train
    setting = Setting(
        net=net,
        tiers=tiers,
        rule=LocalRule(train.lr, train.momentum),
        stream=Stream(batch=train.batch_size, epochs=train.epochs or 1),
        seed=0,
        rounds=experiment.run.rounds,
    )
    return experiment, net, registry.build_algorithm(experiment.algorithm, setting)


@pytest.mark.parametrize("name", APFL_NAMES)
def test_an_apfl_file_names_what_there_is_and_builds_it(name: str) -> None:
    experiment, net, algorithm = of_apfl(name)
    data, row = experiment.data, name.split("-", 2)[2]
    registry.check_names(experiment)
    factory = registry.data_factory(data.name)
    registry.check_options("data", factory, data.options, registry.DATA_GIVEN, data.name)
    assert (data.name, data.partition) == tuple(name.split("-", 2)[:2])
    assert data.alpha == (0.5 if data.partition == "dirichlet" else None)
    assert data.clients == experiment.run.cohort == 10 and experiment.run.held_out == 0
    assert algorithm.doubts() == ()
    whole = REFERENCE[APFL_CLASSES[data.name]]
    assert sizes(net, FULL) == whole[0.5 if row == "fedavg" else 1.0]
    if row == "fedavg":
        assert algorithm.views({})["global"] == FULL and experiment.run.rounds == 100
        return
    method, fleet = row.split("-")
    assert experiment.algorithm.name == method
    assert [tier.share for tier in experiment.fleet.tiers] == SHARES[fleet]
    budgets = [tier.budget(net) for tier in algorithm.setting.tiers]
    assert [budget.flops for budget in budgets] == [macs for macs, _ in whole.values()]
    if method == "feduniform":
        maps = [algorithm.map_of(tier, 1) for tier in range(3)]
        assert [sizes(net, map) for map in maps] == list(whole.values())
        assert experiment.run.rounds == 100
    else:
        phases = [algorithm.phase(round).name for round in range(1, experiment.run.rounds + 1)]
        assert phases == ["warm-up"] * 30 + ["search"] + ["train"] * 100
        assert algorithm.phase(1).eligible == ("high",)
