"""`subfleet models`: tables that add up, budgets, conventions, memory, users' own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from subfleet.cli import app
from subfleet.cli_models import layer_rows, parse_budget
from subfleet.cli_support import fitted
from subfleet.core.budget import width_map
from subfleet.core.cost import CONVENTIONS
from subfleet.core.errors import InputError
from subfleet.core.memory import training_memory
from subfleet.core.units import IndexMap
from subfleet.describe import OTHERS, describe
from subfleet.models import ZOO, supernet
from subfleet.models.elasticity import elastic

runner = CliRunner()


def shown(*arguments: str) -> Any:
    result = runner.invoke(app, ["models", *arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def described(*arguments: str) -> dict[str, Any]:
    return shown("describe", *arguments)


# --- tables ---------------------------------------------------------------------------------------


def test_a_layer_table_by_hand() -> None:
    found = described("small_cnn", "--width", "0.5")
    total, layers = found["total"], found["layers"]
    assert [row["inputs"] for row in layers] == [1, 4, 8 * 49, 32]
    assert [row["inputs_of"] for row in layers] == [1, 8, 16 * 49, 64]
    assert [row["units"] for row in layers] == [4, 8, 32, 62]
    assert [row["of"] for row in layers] == [8, 16, 64, 62]
    # conv 9*1*4, conv 9*4*8, fc 8*49*32, fc 32*62; each conv over 28^2 and 14^2 positions.
    assert [row["weights"] for row in layers] == [36, 288, 12_544, 1_984]
    assert [row["params"] for row in layers] == [36 + 4, 288 + 8, 12_544 + 32, 1_984 + 62]
    assert [row["macs"] for row in layers] == [36 * 784, 288 * 196, 12_544, 1_984]
    # Wire: the same plus biases, four bytes each, and two bytes for each of three groups.
    assert sum(row["wire_bytes"] for row in layers) == 4 * (14_852 + 4 + 8 + 32 + 62)
    assert total["map_bytes"] == 6
    assert total["wire_bytes"] == 4 * (14_852 + 4 + 8 + 32 + 62) + 6
    assert found["groups"] == [
        {"group": "conv1", "kept": 4, "of": 8},
        {"group": "conv2", "kept": 8, "of": 16},
        {"group": "fc1", "kept": 32, "of": 64},
    ]


@pytest.mark.parametrize("name", sorted(set(ZOO) - {"resnet34", "resnet56"}))  # as resnet18
def test_tables_of_the_zoo_add_up(name: str) -> None:
    net = ZOO[name]()
    map = width_map(net, 0.4)
    found = describe(net, map, batch=2)
    for key in ("params", "weights", "macs"):
        assert found.total[key] == sum(row[key] for row in found.layers)
    wire = sum(row["wire_bytes"] for row in found.layers)
    assert found.total["wire_bytes"] == wire + found.total["map_bytes"]
    assert OTHERS not in [row["layer"] for row in found.layers]
    assert found.total["units"] == sum(row["kept"] for row in found.groups)


def test_what_no_layer_holds_has_a_row_of_its_own() -> None:
    import plain_modules

    build, example = plain_modules.EXAMPLES["layer_norm"]  # with a learnt scale of 6
    found = describe(supernet(build(), example), IndexMap.full())
    assert found.layers[-1]["layer"] == OTHERS and found.layers[-1]["params"] == 6
    assert found.total["params"] == sum(row["params"] for row in found.layers)


def test_skipped_blocks_and_small_kernels_cost_what_they_cost() -> None:
    net = elastic(
        ZOO["resnet18"](width=0.1), stages=[["layer1.1"]], kernels={"layer2.1.first.conv": [1]}
    )
    map = width_map(net, 1.0, depth=0.0, kernel=1)
    found = describe(net, map, batch=2)
    rows = {row["layer"]: row for row in found.layers}
    assert rows["layer1.1.first.conv"] | {"of": 0, "inputs_of": 0} == dict.fromkeys(
        rows["stem.conv"], 0
    ) | {"layer": "layer1.1.first.conv", "kind": "conv"}
    assert rows["layer2.1.first.conv"]["params"] == 13 * 13
    kept = {row["group"]: row["kept"] for row in found.groups}
    assert kept["layer1.1.first.conv"] == kept["layer1.1.block"] == 0
    assert kept["layer2.1.first.conv.kernel"] == 1
    small = net.module(map)
    assert found.total["params"] == sum(p.numel() for p in small.parameters())
    assert found.total["units"] == sum(kept[group] for group in net.space.widths)


def test_the_list_counts_parameters_as_describe_does() -> None:
    listed = {row["name"]: row["params"] for row in shown("list")}
    assert listed["small_cnn"] == 55_518
    assert listed.keys() == ZOO.keys()
    for name in ("small_cnn", "vgg"):
        assert described(name)["total"]["params"] == listed[name]


def test_the_text_shows_kept_units_thousands_and_bytes() -> None:
    text = runner.invoke(app, ["models", "describe", "small_cnn", "--width", "0.5"]).stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "small_cnn at width 0.5" in lines
    assert "conv2 conv 4/8 8/16 296 288 56,448 1,184" in lines
    assert "total 44/88 14,958 14,852 99,200 59,838" in lines
    assert "fc1 32 64" in lines
    assert "on the wire, each way 59,838" in lines
    assert any(line.startswith("training memory, batch 20, sgd ") for line in lines)


@pytest.mark.parametrize(("name", "width"), [("mobilenet_v2", 0.5), ("resnet18", 1.0)])
def test_layers_fit_a_terminal_of_80_columns(name: str, width: float) -> None:
    from rich.console import Console
    from rich.table import Table

    net = ZOO[name]()
    hide = ["kind", "wire_bytes", "inputs", "weights"]
    rows, hidden = fitted(layer_rows(describe(net, width_map(net, width), batch=2)), 80, hide)
    assert list(rows[0]) == ["layer", "units", "params", "weights", "macs"]
    assert hidden == ["kind", "wire bytes", "inputs"]
    table = Table(*rows[0], pad_edge=False)
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    console = Console(width=80)
    assert table.__rich_measure__(console, console.options.update(max_width=200)).maximum <= 80


def lines(*arguments: str, columns: int) -> list[str]:
    result = runner.invoke(app, ["models", *arguments], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


def test_pipes_have_the_columns_that_they_are_told() -> None:
    narrow = lines("list", columns=80)
    assert max(map(len, narrow)) <= 80 and len(narrow) < 40
    assert narrow[-1] == "hidden: what (a wider terminal, or --json)"
    assert not any("ADDS's" in line for line in narrow)
    for option in ("bidirectional", "standardise", "transforms", "embedding_size"):
        assert any(option in line for line in narrow)
    assert any("ADDS's MobileNet" in line for line in lines("list", columns=150))
    described = lines("describe", "resnet18", "--width", "0.5", columns=80)
    assert max(map(len, described)) <= 80
    assert "hidden: kind, wire bytes, inputs (a wider terminal, or --json)" in described


# --- which sub-network ----------------------------------------------------------------------------


def test_a_budget_gives_the_widest_that_meets_it() -> None:
    total = described("small_cnn", "--budget", "flops=0.1M,params=20k")["total"]
    assert total["macs"] <= 100_000
    assert total["weights"] <= 20_000
    net = ZOO["small_cnn"]()
    wider = net.cost(width_map(net, total["width"] + 1 / 64))
    assert wider.macs > 100_000 or wider.params > 20_000
    text = runner.invoke(app, ["models", "describe", "small_cnn", "--budget", "flops=0.1M"]).stdout
    assert text.splitlines()[0].startswith("small_cnn at width 0.5")
    assert "the largest within flops=0.1M" in text.splitlines()[0]


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        ("flops=30M", {"flops": 30_000_000}),
        ("flops=2g, params=1.5k", {"flops": 2 * 10**9, "params": 1500}),
        ("params=7", {"params": 7}),
    ],
)
def test_budgets_may_have_suffixes(text: str, limits: dict[str, int]) -> None:
    assert parse_budget(text) == limits


def test_a_limit_that_stands_there_twice_is_refused() -> None:
    with pytest.raises(InputError, match="flops stands there twice; give one limit"):
        parse_budget("flops=30M,flops=20M")


def notes(*arguments: str) -> list[str]:
    stderr = runner.invoke(app, ["models", "describe", *arguments]).stderr
    return [line for line in stderr.splitlines() if line.startswith("note: ")]


def test_what_has_no_effect_is_noted() -> None:
    flexible = ["mobilenet_v2", "--set", "kernels=[3, 5, 7]", "--set", "width=0.1"]
    assert notes(*flexible, "--kernel", "5") == []
    assert notes(*flexible, "--kernel", "2", "--depth", "0.5") == [
        "note: --depth has no effect: mobilenet_v2 is not elastic in it",
        "note: --kernel 2 is below the smallest there is; layers have 3 instead",
    ]


@pytest.mark.parametrize("text", ["", "flops", "flops=", "flops=M", "flops=-1", "flops=nan", "x=1"])
def test_a_malformed_budget_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"write e\.g\. flops=30M"):
        parse_budget(text)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_and_what_weights_count(convention: str) -> None:
    net = ZOO["vgg"]()
    map = width_map(net, 0.5)
    total = described("vgg", "--width", "0.5", "--convention", convention)["total"]
    assert (total["weights"], total["macs"]) == net.cost(map, convention)  # type: ignore[arg-type]
    counted = described("vgg", "--width", "0.5", "--count-bias", "--count-norm")["total"]
    assert counted["weights"] == counted["params"] == total["params"] > total["weights"]


def test_memory_by_batch_and_optimizer() -> None:
    net = ZOO["small_cnn"]()
    for batch, optimizer in ((20, "sgd"), (7, "adam")):
        options = ["--batch", str(batch), "--optimizer", optimizer] if batch == 7 else []
        found = described("small_cnn", "--width", "0.3", *options)["memory"]
        memory = training_memory(net, width_map(net, 0.3), batch=batch, optimizer=optimizer)
        assert found == {
            "batch": batch, "optimizer": optimizer, **memory._asdict(), "total": memory.total
        }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["smal_cnn"], "did you mean 'small_cnn'?"),
        (["small_cnn", "--width", "2"], "width 2.0 is out of range; give a number above 0"),
        (["small_cnn", "--width", "0"], "width 0.0 is out of range"),
        (["small_cnn", "--depth", "2"], "depth 2.0 is out of range"),
        (["small_cnn", "--kernel", "0"], "kernel 0 is out of range"),
        (["small_cnn", "--budget", "flops=9M", "--width", "1"], "exclude"),
        (["small_cnn", "--budget", "flop=1"], "is not flops=N or params=N"),
        (
            ["vgg", "--budget", "flops=1"],
            "below the smallest sub-network of 'vgg', which takes flops=",
        ),
        (["small_cnn", "--convention", "mac"], "unknown cost convention 'mac'; did you mean"),
        (["small_cnn", "--optimizer", "adma"], "unknown optimizer 'adma'; did you mean 'adam'"),
        (["small_cnn", "--batch", "0"], "a batch of 0 samples"),
        (["small_cnn", "--set", "chanels=[1,2]"], "did you mean 'channels'?"),
        (
            ["small_cnn", "--set", "channels"],
            "write e.g. --set 'channels=[8, 16]'; small_cnn has channels, hidden, kernel,",
        ),
        (["logreg", "--set", "=3"], "logreg has no keys"),
        (["small_cnn", "--set", "channels=3"], "give a list such as [3, 5]"),
        (["mobilenet_v2", "--set", "transforms=true"], "model.kernels = [3] is one size alone"),
        (["resnet56", "--set", "channels=[64, 32, 16]"], "give sizes that do not decrease"),
        (["no_such_module:net"], "importing 'no_such_module' failed"),
    ],
)
def test_bad_input_ends_with_status_2(arguments: list[str], words: str) -> None:
    result = runner.invoke(app, ["models", "describe", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert words in result.stderr
    assert "Traceback" not in result.stderr


# --- users' own -----------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn
from subfleet.models import supernet


def module(classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(16, classes),
    )


def net(num_classes: int = 5):
    return supernet(module(num_classes), torch.zeros(1, 3, 8, 8), name="own", fixed=["5"])


def plain():
    return module(5)


class Plain(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(*module(num_classes))


def sized(*, input_shape: tuple[int, ...], num_classes: int):
    return net(num_classes)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cli_models_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def test_a_users_own_network_is_described(own: None) -> None:
    found = described("cli_models_own:net", "--set", "num_classes=7", "--width", "0.5")
    assert found["groups"] == [{"group": "3", "kept": 3, "of": 6}]
    assert found["layers"][-1]["units"] == 7
    given = ["--set", "input_shape=[3,8,8]", "--set", "num_classes=7", "--width", "0.5"]
    assert described("cli_models_own:sized", *given)["layers"] == found["layers"]


def test_a_plain_class_is_described_by_name(own: None) -> None:
    given = ["--set", "input_shape=[3, 8, 8]", "--set", "num_classes=7"]
    found = described("cli_models_own:Plain", *given)
    assert found["layers"][-1]["units"] == 7
    assert [row["group"] for row in found["groups"]] == ["3", "5"]
    again = described("cli_models_own:plain", "--set", "input_shape=[3, 8, 8]")
    assert again["groups"] == found["groups"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sized"], "missing, which a run takes from its data; give --set 'input_shape=[1, 28, 28"),
        (["sized", "--set", "input_shape=[3, 8, 8]"], "give --set 'num_classes=10'"),
        (["Plain", "--set", "num_classes=7"], "data to say what that takes; give --set 'input_sha"),
        (["plain", "--set", "input_shape=3"], "model.input_shape = 3"),
        (["net", "--set", "input_shape=[3, 9, 9]"], "model.input_shape: not an option of"),
    ],
)
def test_what_data_would_say_is_asked_for(arguments: list[str], words: str, own: None) -> None:
    result = runner.invoke(
        app, ["models", "explain", f"cli_models_own:{arguments[0]}", *arguments[1:]]
    )
    assert result.exit_code == 2
    assert words in result.stderr


def test_a_users_own_network_is_explained(own: None) -> None:
    rows = {row["layer"]: row for row in shown("explain", "cli_models_own:net")}
    assert "a group norm of 2 groups" in rows["0"]["reason"] and rows["0"]["groups"] == []
    assert rows["3"] == {"layer": "3", "groups": ["3"], "reason": ""}
    assert rows["5"]["reason"] == "kept by the model's definition"
    assert rows["7"]["reason"] == "the class scores"
    text = runner.invoke(app, ["models", "explain", "cli_models_own:net"]).stdout
    assert "the class scores" in text


@pytest.mark.parametrize("name", ["leaf_cnn", "metagater_b", "resnet56", "char_lstm"])
def test_explanations_agree_with_the_zoos_groups(name: str) -> None:
    rows = shown("explain", name)
    assert {group for row in rows for group in row["groups"]} == set(ZOO[name]().elastic)
    assert all(row["groups"] or row["reason"] for row in rows)


def test_the_zoo_says_why_it_keeps_units() -> None:
    rows = {row["layer"]: row["reason"] for row in shown("explain", "resnet56")}
    assert rows["stem.conv"] == rows["layer1.3.second.norm"] == rows["layer3.8.second.conv"]
    assert rows["stem.conv"].startswith("the stream that blocks add to")
    rows = {row["layer"]: row["reason"] for row in shown("explain", "mobilenet_v2")}
    assert (
        rows["head.conv"] == rows["head.norm"] == "widths leave the head whole, as the paper has it"
    )


@pytest.mark.parametrize("command", ["describe", "explain"])
def test_a_plain_module_needs_to_know_its_input(command: str, own: None) -> None:
    result = runner.invoke(app, ["models", command, "cli_models_own:plain"])
    assert result.exit_code == 2
    assert "it makes a plain module, and there are no data to say what that" in result.stderr
