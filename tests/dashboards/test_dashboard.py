"""`subfleet dashboard` as a user has it: a process, TensorBoard's answers, and its pages."""

from __future__ import annotations

import html
import json
import signal
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import pytest
from browser import Chromium, Opened, coloured, ink, pixels_of
from commands import Commands, left_over
from test_launch import TIERS
from toys import Crash, StopAfter
from typer.testing import CliRunner

from subfleet.cli import app
from subfleet.cli_dashboard import wait_for_runs
from subfleet.config import Experiment
from subfleet.dashboards.tensorboard import scalars
from subfleet.dashboards.tensorboard_values import LAYOUT
from subfleet.launch import Run, launch

ROUNDS = 6
EXPERIMENT = Experiment(
    data={"name": "synthetic_femnist", "clients": 20, "mean_samples": 30.0},
    model={"name": "small_cnn", "channels": [2, 4], "hidden": 8},
    fleet={"tiers": TIERS},
    algorithm={"name": "fedpa"},
    run={"rounds": ROUNDS, "cohort": 4, "eval_every": 2, "checkpoint_every": 4, "engine": "loop"},
)


class Board:
    """TensorBoard at an address."""

    def __init__(self, address: str):
        self.address = address
        self._opener = build_opener(ProxyHandler({}))

    def raw(self, path: str, **query: Any) -> bytes:
        return self._opener.open(f"{self.address}data/{path}?{urlencode(query)}", timeout=30).read()

    def get(self, path: str, **query: Any) -> Any:
        return json.loads(self.raw(path, **query))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self.address}data/{path}", json.dumps(body).encode(), headers)
        return json.loads(self._opener.open(request, timeout=30).read())

    def matching(self, expression: str) -> set[str]:
        """The tags of a run that a chart with this expression shows."""
        found = self.get("plugin/custom_scalars/scalars", run="fast/tb", tag=expression)
        assert found["regex_valid"]
        return set(found["tag_to_events"])

    def images(self, run: str, tag: str) -> dict[int, np.ndarray]:
        """Pixels by step."""
        found = self.get("plugin/images/images", run=run, tag=tag, sample=0)
        pngs = {
            entry["step"]: self._opener.open(
                f"{self.address}data/plugin/images/individualImage?{entry['query']}"
            ).read()
            for entry in found
        }
        return {step: pixels_of(png) for step, png in pngs.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs; one broke off after five rounds and went on from the fourth."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("slow", 0.01), ("fast", 0.1)):
        launch(EXPERIMENT.with_values({"train.lr": rate}), out=folder / name, local=True)
    one = EXPERIMENT.with_values({"train.lr": 0.05})
    with pytest.raises(Crash):
        launch(one, out=folder / "resumed", local=True, observers=[StopAfter(5)])
    launch(one, out=folder / "resumed", local=True, resume=True)
    return folder


@pytest.fixture(scope="module")
def board(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    """The command on these runs; after the tests Ctrl-C must leave nothing behind."""
    commands = Commands(tmp_path_factory.mktemp("home"))
    process = commands.start("-m", "subfleet", "dashboard", str(runs))
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:"), process.communicate()
    yield Board(address)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert told.splitlines() == [
        "starting TensorBoard ...",
        f"TensorBoard shows 3 runs of {runs}; Ctrl-C ends it",
        "interrupted",
    ]
    assert left_over(process.pid) == {}


def of(runs: Path, name: str) -> Run:
    return Run(runs / name, json.loads((runs / name / "summary.json").read_text()))


@pytest.mark.parametrize("name", ["slow", "fast", "resumed"])
def test_scalars_are_those_of_the_metrics_each_round_once(
    name: str, runs: Path, board: Board
) -> None:
    want: dict[str, list[tuple[int, float]]] = {}
    for record in of(runs, name).metrics:
        for tag, value in scalars(record):
            want.setdefault(tag, []).append((record["round"], value))
    tags = board.get("plugin/scalars/tags")[f"{name}/tb"]
    assert {tag for tag in tags if not tag.startswith("final/")} == set(want)
    assert {"accuracy/tier/low", "platform/memory", "fleet/coverage_min"} < set(want)
    for tag, points in want.items():
        got = board.get("plugin/scalars/scalars", run=f"{name}/tb", tag=tag)
        assert [step for _, step, _ in got] == [step for step, _ in points]
        assert [value for _, _, value in got] == pytest.approx([v for _, v in points], rel=1e-6)
    for key in ("best_acc_global", "total_bytes_up", "params_mean"):
        ((_, step, value),) = board.get(
            "plugin/scalars/scalars", run=f"{name}/tb", tag=f"final/{key}"
        )
        assert step == ROUNDS and value == pytest.approx(of(runs, name).summary[key])


def test_the_layout_finds_tags_in_every_chart(board: Board) -> None:
    found = board.get("plugin/custom_scalars/layout")["category"]
    charts = {
        part["title"]: {c["title"]: tuple(c["multiline"]["tag"]) for c in part["chart"]}
        for part in found
    }
    assert list(charts) == ["accuracy", "cost", "platform", "fairness"]  # devices have no profile
    assert charts == {title: LAYOUT[title] for title in charts}
    for category in charts.values():
        for title, expressions in category.items():
            shown = [tag for expression in expressions for tag in board.matching(expression)]
            assert shown and len(shown) == len(set(shown)), title
    assert board.matching("accuracy/tier/") == {"accuracy/tier/high", "accuracy/tier/low"}


@pytest.mark.parametrize("name", ["fast", "resumed"])
def test_histograms_are_of_the_clients_rows(name: str, runs: Path, board: Board) -> None:
    rows = of(runs, name).clients().to_pylist()
    for tier in (None, "high", "low"):
        tag = "clients/acc_local" + (f"/{tier}" if tier else "")
        got = board.get("plugin/histograms/histograms", run=f"{name}/tb", tag=tag)
        want = {}
        for round in (2, 4, 6):
            known = [
                row["acc_local"]
                for row in rows
                if row["round"] == round
                and row["acc_local"] is not None
                and tier in (None, row["tier"])
            ]
            if known:
                want[round] = np.histogram(known, np.linspace(0, 1, 21))[0].tolist()
        bars = {step: [height for _, _, height in bars] for _, step, bars in got}
        assert bars == want and len(want) >= 2


def test_pictures_show_each_round_once_also_after_a_resume(runs: Path, board: Board) -> None:
    for name in ("fast", "resumed"):
        assert list(board.images(f"{name}/tb", "heatmap/coverage")) == [1, 2, 3, 4, 5, 6]
    # The rate changes no cohort: who trained what is the same in both.
    for tag in ("heatmap/coverage", "heatmap/keep_ratio"):
        whole, resumed = (board.images(f"{name}/tb", tag) for name in ("fast", "resumed"))
        assert all((whole[step] == resumed[step]).all() for step in whole)
        assert len({picture.tobytes() for picture in whole.values()}) > 1
        assert min(ink(picture) for picture in whole.values()) > 0.1


def test_the_text_is_the_experiment(runs: Path, board: Board) -> None:
    written = (runs / "fast" / "config.toml").read_text()
    (found,) = board.get("plugin/text/text", run="fast/tb", tag="experiment/text_summary")
    assert html.unescape(found["text"]).split("<code>")[1].startswith(written)
    assert found["step"] == 0


def test_runs_can_be_sorted_by_their_last_metrics(runs: Path, board: Board) -> None:
    wanted = {"hparamsLimit": 1000, "includeMetrics": True}
    experiment = board.post("plugin/hparams/experiment", wanted)
    differing = [info["name"] for info in experiment["hparamInfos"] if info["differs"]]
    assert differing == ["train.lr"]
    assert experiment["hparamInfos"][0]["name"] == "train.lr"  # shown first
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert metrics[:2] == ["accuracy/global", "accuracy/local"]
    assert {"accuracy/local_worst10", "cost/bytes_up", "final/total_flops"} < set(metrics)
    column = {"metric": {"tag": "loss/global"}, "order": "ORDER_ASC"}
    asked = {"startIndex": 0, "sliceSize": 10, "colParams": [column]}
    # The page asks for all statuses; success alone must be enough here.
    asked["allowedStatuses"] = ["STATUS_SUCCESS"]
    groups = board.post("plugin/hparams/session_groups", asked)["sessionGroups"]
    losses = {f"{name}/tb": of(runs, name).summary["loss_global"] for name in ("slow", "fast")}
    losses["resumed/tb"] = of(runs, "resumed").summary["loss_global"]
    assert [group["name"] for group in groups] == sorted(losses, key=lambda name: losses[name])
    for group in groups:
        (session,) = group["sessions"]
        assert session["status"] == "STATUS_SUCCESS"
        assert session["endTimeSecs"] > session["startTimeSecs"]
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        assert values["loss/global"] == pytest.approx(losses[group["name"]], rel=1e-6)
        assert group["hparams"]["fleet.tiers.low.width"] == 0.5


def lines_drawn(opened: Opened, charts: str, count: int) -> bool:
    """Whether each of the first charts has lines of the runs' colours; they come in steps."""
    seen = opened.pixels(charts, count)
    return len(seen) == count and all(coloured(pixels) > 0.002 for pixels in seen)


@pytest.mark.parametrize("width", [1280, 390])
def test_charts_are_drawn(width: int, board: Board, browser: Chromium) -> None:
    opened = browser.open_page(f"{board.address}#custom_scalars", width)
    charts = "tf-custom-scalar-multi-line-chart-card vz-line-chart2"
    count = len(LAYOUT["accuracy"])  # those that are in sight first
    opened.page.locator(f"{charts} path.line[d]").nth(2 * count).wait_for(state="attached")
    until = time.monotonic() + 60
    while not (drawn := lines_drawn(opened, charts, count)) and time.monotonic() < until:
        opened.page.wait_for_timeout(200)
    assert drawn
    assert opened.errors == []
    assert all(request.startswith(board.address) for request in opened.requests)


@pytest.mark.parametrize("width", [1280, 390])
def test_pictures_are_shown(width: int, board: Board, browser: Chromium) -> None:
    opened = browser.open_page(f"{board.address}#images", width)
    pictures = "tf-image-loader #main-image-container img"
    opened.page.locator(pictures).nth(5).wait_for()  # two of each run
    assert all(ink(pixels) > 0.05 for pixels in opened.pixels(pictures))
    assert opened.errors == []


def test_the_table_of_settings_is_shown(board: Board, browser: Chromium) -> None:
    opened = browser.open_page(f"{board.address}#hparams", 1920)
    for words in ("train.lr", "accuracy/global", "resumed/tb"):
        opened.page.get_by_text(words, exact=True).first.wait_for()
    assert opened.errors == []


def test_a_server_that_hangs_up_or_answers_by_half_is_asked_again() -> None:
    answers = [b'["run"]', b"[]", b'["ru', b"", None]  # the last comes first

    class Starting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if (answer := answers.pop()) is not None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Starting) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        try:
            wait_for_runs(f"http://127.0.0.1:{server.server_port}/")
        finally:
            server.shutdown()
            serving.join()
    assert answers == []


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    for folder, words in (
        (tmp_path / "none", "none: no such folder"),
        (tmp_path, "no run has written anything for TensorBoard there"),
    ):
        done = CliRunner().invoke(app, ["dashboard", str(folder)])
        assert done.exit_code == 2 and done.stdout == ""
        assert str(folder) in done.stderr and words in done.stderr


@pytest.mark.parametrize("port", ["0", "65536"])
def test_an_impossible_port_is_refused(port: str, runs: Path) -> None:
    done = CliRunner().invoke(app, ["dashboard", str(runs), "--port", port])
    assert done.exit_code == 2 and f"--port {port}: give a number from 1 to 65535" in done.stderr


def test_a_port_that_is_taken_is_refused(runs: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = Commands(tmp_path).start(
            "-m", "subfleet", "dashboard", str(runs), "--port", str(port)
        )
        printed, told = process.communicate(timeout=60)
    assert process.returncode == 2 and printed == ""
    assert f"error: --port {port}: another program has it" in told
    assert left_over(process.pid) == {}
