"""Exported networks: that they need no subfleet, give the same scores, and say what they are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_launch import TIERS, tables
from torch import Tensor, nn
from torch.func import functional_call
from typer.testing import CliRunner

import subfleet
from subfleet.cli import app
from subfleet.config import Experiment
from subfleet.core.errors import InputError, RunFailed
from subfleet.core.units import IndexMap
from subfleet.export import Exported, export, exported_program
from subfleet.export_card import Input, readme
from subfleet.launch import launch
from subfleet.platform.kept import KeptStore
from subfleet.trained import TrainedRun

OWN_MODEL = """
import torch
from torch import nn
from subfleet.models import supernet
from subfleet.models.elasticity import elastic

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(6, 6, 5, padding=2, groups=6)
        self.mix = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return x + self.mix(torch.relu(self.wide(x)))

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, stride=4)
        self.first, self.second = Block(), Block()
        self.norm = nn.GroupNorm(1, 6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        x = self.norm(self.second(self.first(torch.relu(self.stem(x)))))
        return self.head(self.drop(x.mean(dim=(2, 3))))

def blocks(*, input_shape, num_classes):
    net = supernet(Net(num_classes), torch.zeros(1, *input_shape), name="blocks")
    return elastic(net, stages=[["second"]], kernels={"first.wide": (3,)}, transforms=True)
"""
OWN_DATA = """
import numpy as np
from subfleet.datasets import InMemory

def letters():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 5)).astype(np.float32)
    return InMemory(x, draw.integers(0, 3, 60), np.arange(0, 61, 6), num_classes=3, name="letters")
"""
SMALL_TEXT = {"model__hidden": 8, "model__dense": 8, "data__mean_samples": 6.0}
SMALL_TEXT |= {"data__sd_samples": 2.0, "run__rounds": 1, "data__clients": 12, "run__cohort": 2}
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "cnn": {},
    "vgg": {"model": {"name": "vgg", "channels": [4, 6], "hidden": [8], "norm": "batch"}},
    "own": {
        "model": {"name": "own_model:blocks"},
        "fleet": {"tiers": [TIERS[0], TIERS[1] | {"depth": 0.0, "kernel": 3}]},
        "run__rounds": 1,
    },
    "char": {
        "data": {"name": "synthetic_shakespeare"},
        "model": {"name": "char_lstm"},
        **SMALL_TEXT,
    },
    "sent": {"data": {"name": "synthetic_sent140"}, "model": {"name": "sent_lstm"}, **SMALL_TEXT},
}
TARGETS: dict[str, dict[str, Any]] = {
    "cnn": {"tier": "low"},
    "vgg": {"tier": "low"},
    "own": {"tier": "low"},
    "char": {"tier": "low"},
    "sent": {"client": 3},
}
# Run by a Python that has no subfleet: loads each folder's program and runs its README's snippet.
ELSEWHERE = """
import os, re, sys
from importlib.abc import MetaPathFinder

class Nowhere(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "subfleet":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Nowhere())
try:
    import subfleet
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("subfleet is here")
import torch
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
here, rows = os.getcwd(), load_file("rows.safetensors")
scores = {}
for name, x in rows.items():
    os.chdir(open(os.path.join(here, name)).read())
    (code,) = re.findall("```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
    told = {}
    exec(code, told)
    assert told["scores"].shape == (1, told["net"](x).shape[1]), name
    scores[name] = told["net"](x).detach()
    assert not told["scores"].requires_grad, name
    assert torch.equal(told["net"](x[:1]).detach(), scores[name][:1].detach()) or torch.allclose(
        told["net"](x[:1]), scores[name][:1], atol=1e-5), name
    os.chdir(here)
save_file(scores, "scores.safetensors")
assert "subfleet" not in sys.modules
"""


@dataclass(frozen=True)
class Case:
    run: subfleet.Run
    done: Exported
    rows: Tensor
    scores: Tensor  # of the exported program, elsewhere

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.done.path / "model.safetensors")

    def opened(self) -> TrainedRun:
        return TrainedRun.open(self.run.path)


def experiment(changes: dict[str, Any]) -> Experiment:
    whole = {key: value for key, value in changes.items() if "__" not in key}
    keys = {k.replace("__", "."): v for k, v in changes.items() if "__" in k}
    return Experiment(**tables() | whole).with_values(keys)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    folder = tmp_path_factory.mktemp("exports")
    (folder / "own_model.py").write_text(OWN_MODEL)
    runs, done, rows = {}, {}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        for name, changes in EXPERIMENTS.items():
            runs[name] = launch(experiment(changes), out=folder / "runs" / name, local=True)
            done[name] = export(runs[name].path, **TARGETS[name])
            federation = TrainedRun.open(runs[name].path).job.federation
            x = torch.as_tensor(federation.block(np.array([1, 2, 4]), "all").x)
            rows[name] = x if x.dtype == torch.uint8 else x.to(torch.int64)
            (folder / name).write_text(str(done[name].path))
        save_file(rows, folder / "rows.safetensors")
        (folder / "elsewhere.py").write_text(ELSEWHERE)
        command = [sys.executable, "-I", "elsewhere.py"]
        elsewhere = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert elsewhere.returncode == 0, elsewhere.stderr
        scores = load_file(folder / "scores.safetensors")
        yield {name: Case(runs[name], done[name], rows[name], scores[name]) for name in runs}


def network_input(case: Case) -> Tensor:
    """What evaluation in subfleet makes of stored rows."""
    if case.rows.dtype == torch.int64:
        return case.rows
    return case.opened().job.federation.scale.apply(case.rows.to(torch.float32))


@torch.no_grad()
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_program_gives_the_scores_of_the_sliced_network(
    name: str, cases: dict[str, Case]
) -> None:
    case = cases[name]
    run = case.opened()
    map = IndexMap.of({g: row["kept"] for g, row in case.done.card["units"].items()})
    params = run.net.space.extract(run.params, map)
    if name == "vgg":  # the server holds no statistics: those that were estimated
        params |= {n: t for n, t in case.weights.items() if n in run.net.statistics}
    wanted = functional_call(run.net.module(map).eval(), params, (network_input(case),))
    torch.testing.assert_close(case.scores, wanted, rtol=1e-6, atol=1e-6)
    assert case.scores.dtype == torch.float32
    assert case.done.card["program"]["batch"] == "any"


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_weights_fill_the_small_module(name: str, cases: dict[str, Case]) -> None:
    case = cases[name]
    run, card = case.opened(), case.done.card
    map = IndexMap.of({g: row["kept"] for g, row in card["units"].items()})
    module = run.net.module(map)
    names = {n for n, _ in (*module.named_parameters(), *module.named_buffers())}
    assert set(case.weights) == names == set(card["tensors"])
    assert {n: list(t.shape) for n, t in case.weights.items()} == card["tensors"]
    assert card["cost"]["bytes"] == sum(t.nbytes for t in case.weights.values())
    assert card["cost"]["params"] == sum(p.numel() for p in module.parameters())
    for convention in ("adds", "dwnp"):
        assert card["cost"][f"macs_{convention}"] == run.net.cost(map, convention).macs
    files = {file.name: file.stat().st_size for file in case.done.path.iterdir()}
    assert set(files) == {"model.safetensors", "model.pt2", "model.json", "README.md"}
    assert all(files[file] == size for file, size in card["files"].items())


def test_frozen_word_vectors_come_along(cases: dict[str, Case]) -> None:
    case = cases["sent"]
    vectors = case.opened().job.federation.embedding  # pyright: ignore
    assert torch.equal(case.weights["vectors"], torch.as_tensor(vectors))
    assert case.done.card["cost"]["constants"] == vectors.size
    takes = case.done.card["task"]["input"]
    assert (takes["dtype"], takes["vocabulary"], takes["shape"]) == ("int64", 10_000, ["batch", 25])


def test_the_card_says_what_it_is(cases: dict[str, Case]) -> None:
    case = cases["cnn"]
    card = json.loads((case.done.path / "model.json").read_text())
    assert card == case.done.card
    assert case.done.path == case.run.path / "export" / "low"
    assert card["run"]["params_sha256"] == case.run.summary["params_sha256"]
    assert (card["run"]["round"], card["run"]["rounds"], card["run"]["seed"]) == (4, 4, 0)
    assert card["algorithm"]["name"] == "fedpa"
    assert card["units"]["conv2"] == {"of": 4, "kept": [0, 1]}
    takes = card["task"]["input"]
    assert (takes["dtype"], takes["shape"]) == ("uint8", ["batch", 1, 28, 28])
    assert takes["scaling"] == {"factor": -2.5 / 255, "shift": 2.5}
    # All rows of the held-out clients are fewer than are measured at most: what the run measured.
    accuracy = card["accuracy"]
    assert accuracy["measured"]["accuracy"] == pytest.approx(case.run.summary["acc_tier"]["low"])
    assert accuracy["run"] == {"accuracy": case.run.summary["acc_tier"]["low"], "round": 4}


def test_the_card_says_what_classes_and_tokens_are(cases: dict[str, Case]) -> None:
    texts = {name: (case.done.path / "README.md").read_text() for name, case in cases.items()}
    assert 'class i is character i of `"0123456789ABC' in texts["cnn"]
    assert cases["cnn"].done.card["task"]["labels"][36] == "a"
    assert "0 is negative, 1 is positive" in texts["sent"]
    task = cases["char"].done.card["task"]
    assert len(task["labels"]) == 80 and "80 any other character" in task["input"]["values"]
    assert r'token i is character i of "\n !\"&' in texts["char"]
    assert all("`eval()` is neither needed nor possible" in text for text in texts.values())


def test_the_card_says_what_is_not_counted(cases: dict[str, Case]) -> None:
    card = cases["own"].done.card
    assert card["cost"]["not_counted"] == []
    assert "do not count" not in readme(card)
    cost = card["cost"] | {"not_counted": ["attention (matmul)"]}
    assert "Multiply-accumulates do not count attention (matmul)." in readme(card | {"cost": cost})


def test_skipped_blocks_and_small_kernels_are_told(cases: dict[str, Case]) -> None:
    card, weights = cases["own"].done.card, cases["own"].weights
    assert card["units"]["second.block"] == {"of": 1, "kept": []}
    assert card["units"]["first.wide.kernel"] == {"of": 5, "kept": [1, 2, 3]}
    assert card["units"]["stem"]["kept"] == [0, 1, 2]
    assert not [name for name in weights if name.startswith("second.")]


def test_the_readme_has_six_lines_of_plain_torch(cases: dict[str, Case]) -> None:
    for case in cases.values():
        text = (case.done.path / "README.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(code.splitlines()) == 6 and "torch.no_grad()" in code
        assert "{" not in text and "None" not in text


def test_neither_rows_nor_paths_leave_with_the_program(cases: dict[str, Case]) -> None:
    for case in cases.values():
        inputs = torch.export.load(case.done.path / "model.pt2").example_inputs
        assert inputs is not None
        ((sample,), _) = inputs
        assert not sample.any()
        with zipfile.ZipFile(case.done.path / "model.pt2") as file:
            whole = b"".join(file.read(name) for name in file.namelist())
        for path in (str(case.run.path.parent), "site-packages", "export.py", "own_model.py"):
            assert path.encode() not in whole


# --- BatchNorm's statistics -----------------------------------------------------------------------


def test_a_tier_without_statistics_has_them_estimated(cases: dict[str, Case]) -> None:
    case = cases["vgg"]
    run, said = case.opened(), case.done.card["batchnorm_statistics"]
    assert not run.net.statistics & set(run.params), "FedPA leaves them on the clients"
    assert re.fullmatch(r"estimated at export on \d+ training rows of tier low's clients", said)
    assert case.weights["norm2.running_mean"].abs().max() > 0
    assert case.done.card["cost"]["statistics"] == 2 * (2 + 3)


def test_a_client_brings_its_own_statistics(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["vgg"]
    trained = case.run.clients().column("client").to_pylist()
    client = trained[-1]
    done = export(case.run.path, client=client, out=tmp_path / "out")
    store = KeptStore(tmp_path / "kept")
    store.restore(case.run.path / "checkpoints" / "round-000004" / "kept")
    (row,) = store.read([client])
    weights = load_file(done.path / "model.safetensors")
    assert row and set(row) == set(done.card["clients_own_tensors"])
    for name, value in row.items():
        assert np.array_equal(weights[name].numpy(), value)
    assert done.card["subnetwork"]["tier"] in ("high", "low")
    assert done.card["accuracy"]["measured"]["clients"] == 1
    never = next(c for c in range(20) if c not in trained)
    other = export(case.run.path, client=never, out=tmp_path / "other")
    said = f"training rows of client {never}"
    assert said in other.card["batchnorm_statistics"]


# --- what is a client's own ---


def by_command(run: subfleet.Run, client: int, out: Path) -> tuple[dict, dict[str, Tensor]]:
    """What `subfleet export RUN --client ID` writes: the card, and the tensors."""
    arguments = ["export", str(run.path), "--client", str(client), "--out", str(out), "--json"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.stderr
    card = json.loads((out / "model.json").read_text())
    assert card["weights"] in (out / "README.md").read_text()
    assert json.loads(shown.stdout)["weights"] == card["weights"]
    return card, load_file(out / "model.safetensors")


def last_rows(run: subfleet.Run) -> tuple[dict[int, dict[str, Any]], int]:
    """By client what `clients/` says of it last; and a client that never trained."""
    rows = {row["client"]: row for row in run.clients().sort_by("round").to_pylist()}
    return rows, next(client for client in range(20) if client not in rows)


def test_a_client_that_chose_its_units_gets_these(tmp_path: Path) -> None:
    adds = {"name": "adds", "penalty": 1.5, "arch_lr": 0.1}
    run = launch(experiment({"algorithm": adds}), out=tmp_path / "run", local=True)
    whole = sum(tensor.numel() for tensor in run.params().values())
    rows, never = last_rows(run)
    opened = TrainedRun.open(run.path)
    for client in [*rows][:2]:
        card, weights = by_command(run, client, tmp_path / str(client))
        cost, row = card["cost"], rows[client]
        assert (cost["params"], cost["macs"]) == (row["params"], row["macs"])
        assert cost["params"] == sum(tensor.numel() for tensor in weights.values()) < whole
        units = {group: found["kept"] for group, found in card["units"].items()}
        report = opened.reports[client]
        assert {group: len(kept) for group, kept in units.items()} == report["units"]
        server = opened.net.space.extract(run.params(), IndexMap.of(units))
        assert all(torch.equal(weights[name], value) for name, value in server.items())
        assert "the client itself kept" in card["weights"] and "is gone" in card["weights"]
    card, weights = by_command(run, never, tmp_path / "never")
    assert card["cost"]["params"] == whole
    assert card["weights"] == "the server's, for the client has not trained"
    shutil.rmtree(run.path / "checkpoints")
    card, weights = by_command(run, client, tmp_path / "final")
    assert card["cost"]["params"] == whole and "without a checkpoint" in card["weights"]


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_personal_model_is_the_clients(norm: str, tmp_path: Path) -> None:
    model = {"name": "vgg", "channels": [4, 6], "hidden": [8], "norm": norm}
    told = {"algorithm": {"name": "pfedme", "personal_lr": 0.06}, "model": model, "run__rounds": 2}
    run = launch(experiment(told), out=tmp_path / "run", local=True)
    rows, never = last_rows(run)
    client, row = next((c, r) for c, r in rows.items() if r["acc_local"] is not None)
    card, weights = by_command(run, client, tmp_path / "own")
    store = KeptStore(tmp_path / "kept")
    store.restore(run.path / "checkpoints" / "round-000002" / "kept")
    (kept,) = store.read([client])
    assert kept is not None
    theta = {n.removeprefix("theta/"): v for n, v in kept.items() if n.startswith("theta/")}
    assert weights.keys() == theta.keys()
    assert all(np.array_equal(weights[name].numpy(), value) for name, value in theta.items())
    assert card["weights"] == "the client's personal model, as of its last training"
    # What the run measured of the same network on the same rows.
    assert card["accuracy"]["measured"]["accuracy"] == pytest.approx(row["acc_local"])
    card, weights = by_command(run, never, tmp_path / "never")
    server = TrainedRun.open(run.path)
    small = server.net.space.extract(server.params, server.views["low"])
    assert all(torch.equal(weights[name], value) for name, value in small.items())
    assert card["weights"] == "the server's, for the client has not trained"


def test_whose_the_weights_are_is_told(cases: dict[str, Case], tmp_path: Path) -> None:
    """The slice of a tier's client is the server's; its BatchNorm statistics may be its own."""
    assert cases["cnn"].done.card["weights"] == "the server's"
    run = cases["vgg"].run
    rows, _ = last_rows(run)
    card, _ = by_command(run, next(iter(rows)), tmp_path / "own")
    assert card["weights"] == "the server's, with what the client keeps for itself"


# --- other runs ---


class Cut:
    """An observer that ends a run in round 3."""

    def on_start(self, info: dict) -> None:
        pass

    def on_round(self, record: dict, coverage: dict) -> None:
        if record["round"] == 3:
            raise RunFailed("cut")

    def on_end(self, summary: dict) -> None:
        pass


def test_a_checkpoint_is_enough(tmp_path: Path, cases: dict[str, Case]) -> None:
    with pytest.raises(RunFailed):
        launch(experiment({}), out=tmp_path / "run", local=True, observers=[Cut()])
    done = export(tmp_path / "run", tier="low")
    assert done.card["run"]["round"] == 2
    assert done.card["accuracy"]["run"]["round"] == 2
    assert done.card["run"]["params_sha256"] != cases["cnn"].run.summary["params_sha256"]


def test_the_final_weights_are_enough(tmp_path: Path, cases: dict[str, Case]) -> None:
    case = cases["cnn"]
    shutil.copytree(case.run.path, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    done = export(tmp_path / "run", width=0.5, out=tmp_path / "out")
    assert done.card["run"]["params_sha256"] == case.run.summary["params_sha256"]
    again = load_file(done.path / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in case.weights.items())
    assert done.card["accuracy"].keys() == {"measured"}
    assert done.card["subnetwork"] == {"width": 0.5, "tier": None, "units": 7, "units_of": 14}


def test_data_that_are_gone_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_letters.py").write_text(OWN_DATA)
    model = {"name": "own_letters_model:mlp"}
    (tmp_path / "own_letters_model.py").write_text(
        "from torch import nn\n"
        "from subfleet.models import chain\n"
        "def mlp(*, input_shape, num_classes):\n"
        "    layers = nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, num_classes)\n"
        "    return chain('mlp', layers, input_shape)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    told = {"data": {"name": "own_letters:letters"}, "model": model, "run__rounds": 1}
    run = launch(experiment(told), out=tmp_path / "run", local=True)
    there = export(run.path, tier="low")
    assert there.card["task"]["input"]["dtype"] == "float32"
    (tmp_path / "own_letters.py").unlink()
    monkeypatch.delitem(sys.modules, "own_letters")
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    done = export(run.path, tier="low", force=True)
    accuracy = done.card["accuracy"]
    assert accuracy["measured"] is None and "own_letters" in accuracy["why_not"]
    assert accuracy["run"] == there.card["accuracy"]["run"]
    assert done.card["task"]["input"]["scaling"] is None
    assert done.card["task"]["labels"] is None
    assert "what the labels stand for is not known" in (done.path / "README.md").read_text()
    assert len(done.warnings) == 2 and "scaled" in done.warnings[1]
    assert export(run.path, client=3).card["subnetwork"]["client"] == 3


def rename_data(run: Path, lines: str) -> None:
    """Gives a run's config another [data]."""
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(
        re.sub(r"\[data\].*?\n\n", f"[data]\n{lines}\n\n", text, flags=re.S)
    )


def test_how_a_built_in_set_scales_is_known_without_its_files(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    shutil.copytree(cases["cnn"].run.path, tmp_path / "run")
    rename_data(tmp_path / "run", 'name = "femnist"\nsource = "/gone"')
    done = export(tmp_path / "run", tier="low", out=tmp_path / "out")
    assert "'/gone' does not exist" in done.card["accuracy"]["why_not"]
    assert done.card["task"]["data"] == "femnist" and not done.card["task"]["data_options"]
    assert done.card["task"]["input"] == cases["cnn"].done.card["task"]["input"]
    assert len(done.warnings) == 1


def test_data_that_changed_are_not_measured_on(cases: dict[str, Case], tmp_path: Path) -> None:
    shutil.copytree(cases["cnn"].run.path, tmp_path / "run")
    rename_data(tmp_path / "run", 'name = "synthetic_femnist"\nclients = 30')
    done = export(tmp_path / "run", tier="low", out=tmp_path / "out")
    assert "they changed since the run began: clients" in done.card["accuracy"]["why_not"]


def test_what_cannot_do_without_its_data_says_so(cases: dict[str, Case], tmp_path: Path) -> None:
    shutil.copytree(cases["sent"].run.path, tmp_path / "sent")
    rename_data(tmp_path / "sent", 'name = "sent140"\nsource = "/gone"')
    with pytest.raises(InputError, match=r"embedding.weight.*'/gone' does not exist"):
        export(tmp_path / "sent", tier="low")
    shutil.copytree(cases["vgg"].run.path, tmp_path / "vgg")
    rename_data(tmp_path / "vgg", 'name = "femnist"\nsource = "/gone"')
    with pytest.raises(InputError, match=r"no BatchNorm statistics for tier low.*'/gone'"):
        export(tmp_path / "vgg", tier="low", force=True)


def test_a_network_bound_to_its_batch_takes_rows_one_by_one() -> None:
    class RowByRow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([self.fc(row) for row in x])

    program, batch = exported_program(RowByRow().eval(), Input((4,), torch.float32, None))
    assert batch == 1 and program.module()(torch.ones(1, 4)).shape == (1, 3)


# --- bad input, and the command ---


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tier": "lwo"}, "--tier lwo: the run has no such tier; did you mean 'low'"),
        ({"client": 20}, "--client 20: the run's clients are 0 to 19; give one of these"),
        ({"client": -1}, "--client -1"),
        ({"width": 1.5}, "--width: width 1.5 is out of range"),
        ({}, "none given; give one of"),
        ({"tier": "low", "client": 3}, "--tier and --client given; give one of"),
    ],
)
def test_a_wrong_target_is_refused(
    options: dict[str, Any], said: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        export(cases["cnn"].run.path, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def no_folder(run: Path) -> None:
    shutil.rmtree(run)


def no_config(run: Path) -> None:
    (run / "config.toml").unlink()


def no_weights(run: Path) -> None:
    (run / "final.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")


def damaged_weights(run: Path) -> None:
    (run / "final.safetensors").unlink()
    for file in run.glob("checkpoints/*/tensors.safetensors"):
        file.write_bytes(file.read_bytes()[:-8])


def another_model(run: Path) -> None:
    config = run / "config.toml"
    config.write_text(config.read_text().replace("hidden = 8", "hidden = 9"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_folder, "is no folder of a run; give the folder that `subfleet run` printed last"),
        (no_config, "holds no run (no config.toml)"),
        (no_weights, "has no weights yet, neither a checkpoint nor final.safetensors"),
        (damaged_weights, "checkpoints is whole"),
        (another_model, "has 'fc1.bias' of shape (9,), the run's weights have it (8,)"),
    ],
)
def test_a_folder_that_cannot_be_exported_is_refused(
    spoil: Callable[[Path], None], said: str, cases: dict[str, Case], tmp_path: Path
) -> None:
    shutil.copytree(cases["cnn"].run.path, tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(InputError, match=re.escape(said)):
        export(tmp_path / "run", tier="high", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_stays_unless_forced(cases: dict[str, Case], tmp_path: Path) -> None:
    run, out = cases["cnn"].run.path, tmp_path / "out"
    export(run, tier="low", out=out)
    with pytest.raises(InputError, match="is not empty; --force replaces"):
        export(run, tier="high", out=out)
    (out / ".writing-ended").mkdir()  # as of an export that was killed
    done = export(run, tier="high", out=out, force=True)
    assert json.loads((out / "model.json").read_text()) == done.card
    assert done.card["subnetwork"]["tier"] == "high"
    with pytest.raises(InputError, match="is a file; give a folder"):
        export(run, tier="low", out=out / "model.json")


def test_what_is_no_export_is_never_replaced(cases: dict[str, Case], tmp_path: Path) -> None:
    run, out = cases["cnn"].run.path, tmp_path / "project"
    out.mkdir()
    (out / "README.md").write_text("mine")
    for change in (lambda: None, lambda: (out / "model.json").write_text('{"mine": 1}')):
        change()
        for force in (False, True):
            with pytest.raises(InputError, match=r"no export \(README.md\); give another --out"):
                export(run, tier="high", out=out, force=force)
        assert (out / "README.md").read_text() == "mine"
    export(run, tier="low", out=tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no export \(notes.txt\); give another --out"):
        export(run, tier="high", out=tmp_path / "out", force=True)
    with pytest.raises(InputError, match=r"no export \(checkpoints, clients, config.toml\)"):
        export(run, tier="high", out=run, force=True)


def test_an_export_says_what_takes_its_time(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    case = next(iter(cases.values()))
    export(case.run.path, width=0.5, out=tmp_path / "a", step=steps.append)
    assert steps == ["cutting out the network", "writing the program", "measuring the network"]
    monkeypatch.setattr("subfleet.dashboards.console.SLOW_S", 0.0)
    words = ["export", str(case.run.path), "--width", "0.5", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(app, words)
    assert "reading the run ... 0s" in result.stderr, result.output


def test_the_command_prints_a_table_or_the_card(cases: dict[str, Case], tmp_path: Path) -> None:
    run, runner = str(cases["cnn"].run.path), CliRunner()
    shown = runner.invoke(app, ["export", run, "--width", "0.5", "--out", str(tmp_path / "a")])
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.splitlines()[-1] == str(tmp_path / "a")
    arguments = ["export", run, "--client", "3", "--out", str(tmp_path / "b"), "--json"]
    card = json.loads(runner.invoke(app, arguments).stdout)
    assert card["subnetwork"]["client"] == 3 and card["path"] == str(tmp_path / "b")
    for wrong in ([], ["--tier", "low", "--width", "0.5"]):
        refused = runner.invoke(app, ["export", run, *wrong])
        assert refused.exit_code == 2 and "give one of --tier NAME" in refused.stderr
    shown = runner.invoke(app, ["export", "--help"])
    assert re.search(r"^\s+subfleet export runs/a --tier low", shown.stdout, re.MULTILINE)
