"""The page on algorithms: its algorithm of one's own runs, one by one and side by side alike."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toys
from pages import Page
from typer.testing import CliRunner

from subfleet import registry
from subfleet.algorithms import ALGORITHMS
from subfleet.cli import app
from subfleet.config import Experiment
from subfleet.core.budget import width_map
from subfleet.core.program import LocalRule
from subfleet.launch import launch

PAGE = Page("algorithms.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the page's files, from which its modules are imported."""
    with PAGE.written(tmp_path_factory.mktemp("page")) as folder:
        yield folder


@pytest.mark.parametrize("command", PAGE.commands)
def test_its_commands_run(command: str, folder: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "subfleet"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.stderr
    if arguments[0] == "run":
        run = folder / arguments[arguments.index("--out") + 1]
        summary = json.loads((run / "summary.json").read_text())
        assert summary["finished"] and "warning" not in done.stderr
        rounds = (run / "metrics.jsonl").read_text().splitlines()
        losses = [loss for line in rounds if (loss := json.loads(line)["loss_train"]) is not None]
        assert losses[-1] < losses[0]
    else:
        assert "How far to look from w" in done.stdout


def test_its_clients_choose_and_train_what_they_chose(folder: Path) -> None:
    experiment = Experiment.load(folder / "best_width.toml")
    run = launch(experiment, out=folder / "chosen", local=True)
    assert [r["phase"] for r in run.metrics] == ["first", "first", "choose", "second", "second"]
    tried, rows = run.traces().to_pylist(), run.clients().to_pylist()
    tier = {row["client"]: row["tier"] for row in rows if row["round"] == 3}
    assert {row["client"] for row in tried} == set(tier), "all that train choose"
    widths = {c: {r["width"]: r["loss"] for r in tried if r["client"] == c} for c in tier}
    assert all(
        list(losses) == ([0.25, 0.5, 1.0] if tier[c] == "phone" else [0.25, 0.5])
        for c, losses in widths.items()
    )
    net = registry.build_model(experiment.model, input_shape=(1, 28, 28), num_classes=62)
    for row in rows:
        if row["round"] > 3:
            losses = widths[row["client"]]
            map = width_map(net, min(losses, key=losses.__getitem__))
            assert row["macs"] == net.cost(map).macs


def test_its_step_is_the_formula(folder: Path) -> None:
    """One client's round by autograd, as the page's words have it."""
    del folder
    cls = importlib.import_module("fedsam").FedSAM
    net, data = toys.linear(6, 3), toys.all_train([4], (6,), 3)
    setting = toys.setting(net, rule=LocalRule(0.5))
    algorithm, shared = cls(setting, rho=0.3), net.init(0)
    program = algorithm.phase(1).program
    x, y, _ = data.block(torch.tensor([0]).numpy(), "train")
    x, y = torch.from_numpy(x), torch.from_numpy(y)

    def gradient(w: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        w = {name: value.clone().requires_grad_() for name, value in w.items()}
        scores = x @ w["fc.weight"].T + w["fc.bias"]
        loss = torch.nn.functional.cross_entropy(scores, y)
        return dict(zip(w, torch.autograd.grad(loss, list(w.values())), strict=True))

    g = gradient(shared)
    norm = sum(float(part.square().sum()) for part in g.values()) ** 0.5
    g = gradient({name: w + 0.3 * g[name] / norm for name, w in shared.items()})
    for way in ("loop", "vmap"):
        ((update, *_),) = toys.each(net, program, [toys.task(net, 0)], data, shared, way)
        for name, w in shared.items():
            assert torch.allclose(update[name], w - 0.5 * g[name], atol=1e-5), (way, name)


def test_its_table_has_every_algorithm() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE.text, re.MULTILINE)) == set(ALGORITHMS)
