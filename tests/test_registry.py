"""From names to things: built-in ones, the user's own, and every way to get it wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import toys

from subfleet import registry
from subfleet.config import AlgorithmTable, DataTable, Experiment, ModelTable
from subfleet.core.algorithm import Algorithm
from subfleet.core.errors import InputError


def network(
    num_classes: int,
    *,
    widths: tuple[int, ...] = (4, 8),
    rate: float = 0.1,
    norm: Literal["none", "batch"] = "none",
    cap: float | None = None,
) -> dict[str, Any]:
    return {"num_classes": num_classes, "widths": widths, "rate": rate, "norm": norm, "cap": cap}


def anything(**options: Any) -> dict[str, Any]:
    return options


@pytest.fixture
def users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to start in, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("users_"):
            del sys.modules[name]


def test_every_built_in_name_leads_somewhere() -> None:
    for name, cls in registry.algorithms().items():
        assert registry.algorithm_class(name) is cls
        assert issubclass(cls, Algorithm)
        assert cls.paper, f"{name} names no paper"
    for name, factory in registry.models().items():
        assert registry.model_factory(name) is factory
    for name, factory in registry.data_sets().items():
        assert registry.data_factory(name) is factory


def test_a_model_gets_what_the_run_knows_and_what_the_table_says() -> None:
    table = ModelTable.model_validate({"name": "small_cnn", "channels": [2, 3], "width": 1.0})
    net = registry.build_model(table, input_shape=(1, 28, 28), num_classes=7, unused=0)
    assert net.num_classes == 7
    assert dict(net.space.groups) == {"conv1": 2, "conv2": 3, "fc1": 64}


@pytest.mark.parametrize("own", [{"widths": [1, 2]}, {"rate": 1}, {"cap": 2}, {"norm": "batch"}])
def test_good_options_pass(own: dict[str, Any]) -> None:
    checked = registry.check_options("model", network, own, frozenset({"num_classes"}))
    (value,) = own.values()
    assert checked == {next(iter(own)): tuple(value) if isinstance(value, list) else value}


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"rat": 1.0}, "model.rat: not an option of network; did you mean 'rate'?"),
        ({"zzz": 1.0}, "model.zzz: not an option of network; known: cap, norm, rate, widths"),
        ({"rate": "1"}, "model.rate = '1': input should be a valid number; give a number"),
        (
            {"widths": ["a"]},
            "model.widths = ['a']: input should be a valid integer; give a list such as",
        ),
        ({"norm": "layer"}, "model.norm = 'layer': input should be 'none' or 'batch'"),
        ({"num_classes": 3}, "model.num_classes follows from the run and cannot be set"),
    ],
)
def test_a_wrong_option_is_named(own: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        registry.check_options("model", network, own, frozenset({"num_classes"}))
    assert words in str(caught.value)


def test_a_missing_option_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.num_classes is missing; network needs it"):
        registry.check_options("data", network, {}, frozenset())
    handed = r"model\.num_classes is missing; network needs it; the platform hands over seed, shape"
    with pytest.raises(InputError, match=handed):
        registry.check_options("model", network, {}, frozenset({"shape", "seed"}))


def test_a_factory_may_take_any_option() -> None:
    assert registry.check_options("data", anything, {"x": [1]}, frozenset()) == {"x": [1]}


@pytest.mark.parametrize(
    ("table", "name", "words"),
    [
        ("algorithm", "fedagv", "algorithm.name = 'fedagv': unknown algorithm; did you mean"),
        ("model", "smal_cnn", "model.name = 'smal_cnn': unknown model; did you mean 'small_cnn'?"),
        ("data", "femist", "data.name = 'femist': unknown data set; did you mean"),
        ("model", "json:", "not of the form 'module:attribute'"),
        ("model", ":loads", "not of the form 'module:attribute'"),
        ("model", "users_none:thing", "ModuleNotFoundError: No module named 'users_none'"),
        ("model", "json:loadz", "'json' has no 'loadz'; did you mean 'load'?"),
        ("model", "json:decoder", "a module cannot be called"),
        ("algorithm", "json:loads", "is not a class derived from subfleet.Algorithm"),
    ],
)
def test_a_wrong_name_is_refused(table: str, name: str, words: str) -> None:
    look_up = {
        "algorithm": registry.algorithm_class,
        "model": registry.model_factory,
        "data": registry.data_factory,
    }[table]
    with pytest.raises(InputError) as caught:
        look_up(name)
    assert words in str(caught.value)


def test_the_users_own_is_found_in_the_working_folder(users_folder: Path) -> None:
    (users_folder / "users_data.py").write_text(
        "class Points:\n    def __init__(self, seed: int, *, size: int = 3):\n"
        "        self.seed, self.size = seed, size\n"
    )
    table = DataTable.model_validate({"name": "users_data:Points", "size": 5})
    points = registry.build_data(table, seed=11)
    assert (points.seed, points.size) == (11, 5)
    wrong = DataTable.model_validate({"name": "users_data:Points", "size": "5"})
    with pytest.raises(InputError, match=r"data\.size = '5'"):
        registry.build_data(wrong, seed=11)


def test_a_users_hooks_that_are_missing_are_named(users_folder: Path) -> None:
    (users_folder / "users_sam.py").write_text(
        "from dataclasses import dataclass\n"
        "from subfleet import Algorithm\n"
        "from subfleet.algorithms import FedAvg\n"
        "from subfleet.algorithms.local import IndexedAveraging\n"
        "@dataclass(frozen=True)\nclass Sam(IndexedAveraging):\n    rho: float = 0.1\n"
        "@dataclass(frozen=True)\nclass Bare(Algorithm):\n    pass\n"
        "class Helper:\n    pass\n"
    )
    with pytest.raises(InputError) as caught:
        registry.algorithm_class("users_sam:Sam")
    words = str(caught.value)
    assert "Sam does not define map_of(self, tier: int, round: int) -> IndexMap; define it" in words
    assert "derive from subfleet.algorithms.fedpa.FedPA" in words
    with pytest.raises(InputError) as caught:
        registry.algorithm_class("users_sam:Bare")
    words = str(caught.value)
    assert "phase(self, round: int) -> Phase, plan(self, state: State, cohort: Cohort" in words
    assert "define them, or derive from subfleet.algorithms.local.IndexedAveraging" in words
    # At once, before any data are read.
    experiment = Experiment(data={"name": "femnist"}, algorithm={"name": "users_sam:Sam"})
    with pytest.raises(InputError, match="does not define map_of"):
        registry.check_names(experiment)


def test_results_that_nobody_would_use_are_refused(users_folder: Path) -> None:
    (users_folder / "users_collects.py").write_text(
        "from dataclasses import dataclass, replace\n"
        "from subfleet.algorithms import FedAvg\n"
        "@dataclass(frozen=True)\nclass Collects(FedAvg):\n"
        "    def phase(self, round):\n"
        "        return replace(super().phase(round), reduction='collect')\n"
    )
    table = AlgorithmTable(name="users_collects:Collects")
    setting = toys.setting(toys.linear(2, 2))
    with pytest.raises(InputError, match=r"does not define server_step\(self, state: State, plan:"):
        registry.build_algorithm(table, setting)


def test_a_wrong_name_in_a_users_module_lists_what_can_be_meant(users_folder: Path) -> None:
    (users_folder / "users_mine.py").write_text(
        "from dataclasses import dataclass, replace\nfrom pathlib import Path\n"
        "from subfleet.algorithms import FedAvg\nfrom subfleet.models import vgg\n"
        "class Mine(FedAvg):\n    pass\n"
        "def network():\n    return vgg()\n"
    )
    for look_up, known in (
        (registry.algorithm_class, "known: Mine"),
        (registry.model_factory, "known: Mine, network"),
        (registry.data_factory, "known: Mine, network"),
    ):
        with pytest.raises(InputError) as caught:
            look_up("users_mine:Zzz")
        assert str(caught.value).endswith(f"'users_mine' has no 'Zzz'; {known}")
    with pytest.raises(InputError, match=r"it defines no class derived from subfleet\.Algorithm"):
        registry.algorithm_class("json:Nope")


def test_every_option_of_a_built_in_algorithm_says_what_it_means() -> None:
    for name, cls in registry.algorithms().items():
        options = registry.algorithm_options(cls)
        assert [o.name for o in options] == registry.option_names(cls)[1:]
        assert [o.name for o in options if not o.meaning or o.type == "a value"] == [], name
        # And nothing is explained that is not there.
        assert set(registry.meanings(cls)) == {o.name for o in options}, name


def test_an_option_without_words_has_an_empty_meaning() -> None:
    (first, *rest) = registry.options(network, frozenset({"num_classes"}))
    assert (first.name, first.type, first.default) == ("widths", "a list such as [3, 5]", (4, 8))
    assert {o.meaning for o in (first, *rest)} == {""} and not any(o.needed for o in rest)
    assert registry.options(network)[0].needed and registry.options(network)[0].default is None


def test_what_a_users_module_raises_is_shown(users_folder: Path) -> None:
    (users_folder / "users_broken.py").write_text("import users_missing\n")
    (users_folder / "users_syntax.py").write_text("def (:\n")
    with pytest.raises(InputError, match=r"importing 'users_broken' failed.*'users_missing'"):
        registry.model_factory("users_broken:net")
    with pytest.raises(InputError, match="SyntaxError"):
        registry.model_factory("users_syntax:net")


def test_names_are_checked_before_anything_is_opened() -> None:
    good = {"data": {"name": "synthetic_femnist"}}
    registry.check_names(Experiment(**good))
    with pytest.raises(InputError, match=r"algorithm\.widht: not an option of fedavg"):
        registry.check_names(Experiment(**good, algorithm={"name": "fedavg", "widht": 1.0}))
    with pytest.raises(InputError, match=r"algorithm\.setting follows from the run"):
        registry.check_names(Experiment(**good, algorithm={"name": "fedavg", "setting": 1}))


def test_an_algorithms_options_are_its_fields_after_the_setting() -> None:
    cls = registry.algorithm_class("fedpa")
    assert registry.option_names(cls)[0] == "setting"
    table = AlgorithmTable.model_validate({"name": "fedpa", "normaliser": "each"})
    with pytest.raises(InputError, match=r"algorithm\.normaliser = 'each'"):
        registry.build_algorithm(table, setting=None)  # pyright: ignore[reportArgumentType]
