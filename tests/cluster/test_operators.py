"""Ray's metrics of a run, as Prometheus scrapes them, and the dashboard that shows them."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.request import urlopen

import pytest
from pages import Page

from subfleet.cluster import operators
from subfleet.cluster.operators import BOUNDS_S, METRICS, OperatorMetrics
from subfleet.config import Experiment
from subfleet.launch import Run, assemble, launch
from subfleet.platform.runfolder import RunFolder

SAMPLE = re.compile(r"(\w+)\{(.*)\} (\S+)")
Series = dict[str, dict[str, float]]  # by name, then by the value of the metric's own tag


@pytest.fixture(scope="module", autouse=True)
def often() -> Iterator[None]:
    """Ray hands on its metrics every three seconds, instead of every ten."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "3000")
        yield


@pytest.fixture
def experiment() -> Experiment:
    """Three rounds that are evaluated twice, on one host."""
    return Experiment(
        data={"name": "synthetic_femnist", "clients": 20, "mean_samples": 12.0},
        model={"name": "small_cnn", "channels": [2, 4], "hidden": 8, "norm": "batch"},
        fleet={"tiers": [{"name": "all", "share": 1.0, "width": 1.0}]},
        algorithm={"name": "fedpa"},
        run={"rounds": 3, "cohort": 4, "eval_every": 2, "engine": "loop", "hosts": 1},
    )


def scraped(run: str) -> Series:
    """What the node's endpoint says of a run."""
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: Series = {}
    with urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    tag_of = {name: metric.tag for metric in METRICS for name in metric.exported}
    for name, labels, value in SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if name in tag_of and tags["run"] == run:
            key = tags["le"] if name.endswith("_bucket") else tags.get(tag_of[name], "")
            found.setdefault(name, {})[key] = float(value)
    return found


def awaited(run: str, enough: Callable[[Series], bool]) -> Series:
    """What the endpoint has said, the newest of each series, once that is enough."""
    deadline = time.monotonic() + 120
    found: Series = {}
    while not enough(found):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
        found |= scraped(run)
    return found


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_what_is_scraped_is_what_the_run_wrote_down(experiment: Experiment, tmp_path: Path) -> None:
    import ray

    from subfleet.platform.coordinator import start_coordinator
    from subfleet.platform.host import Hosts

    job = assemble(experiment)
    folder = RunFolder.create(tmp_path / "first run", experiment.to_toml(), job.fingerprint)
    hosts = Hosts(job.work, job.federation, wanted=1, device="cpu")
    coordinator = start_coordinator(job, folder, hosts, [OperatorMetrics()], False)
    summary = ray.get(coordinator.run.remote())
    found = awaited(
        "first run",
        lambda series: (
            series.get("ray_subfleet_rounds_done_total") == {"": 3.0}
            and series.get("ray_subfleet_hosts_alive") == {"": 0.0}
        ),
    )
    ray.kill(coordinator)
    hosts.kill()

    records = Run(folder.path, summary).metrics

    def total(key: str) -> float:
        return sum(record[key] for record in records)

    assert found["ray_subfleet_round"] == found["ray_subfleet_rounds"] == {"": 3.0}
    assert found["ray_subfleet_clients_trained_total"] == {"": total("clients")} == {"": 12.0}
    assert found["ray_subfleet_clients_per_second"][""] == pytest.approx(
        records[-1]["clients_per_s"]
    )
    assert found["ray_subfleet_accuracy"] == pytest.approx(
        {name: summary[f"acc_{name}"] for name in ("global", "local", "own")}
    )
    assert found["ray_subfleet_loss"] == pytest.approx(
        {name: summary[f"loss_{name}"] for name in ("global", "train")}
    )
    assert found["ray_subfleet_simulated_bytes_total"] == {
        "up": total("bytes_up"),
        "down": total("bytes_down"),
    }
    seconds = [record["seconds"] for record in records]
    phases = {name for one in seconds for name in one} - {"total"}
    assert found["ray_subfleet_phase_seconds_total"] == pytest.approx(
        {name: sum(one.get(name, 0.0) for one in seconds) for name in phases}
    )
    assert found["ray_subfleet_round_seconds_count"] == {"": 3.0}
    # Its sum Ray makes of the buckets' middles.
    assert found["ray_subfleet_round_seconds_bucket"] == {
        f"{bound}" if bound < math.inf else "+Inf": sum(one["total"] <= bound for one in seconds)
        for bound in (*BOUNDS_S, math.inf)
    }
    assert found["ray_subfleet_bundles_in_flight"] == {"": 0.0}
    # Nothing was run again: what counts that has no series yet.
    silent = {"ray_subfleet_retries_total", "ray_subfleet_out_of_memory_total"}
    assert set(found) == {name for metric in METRICS for name in metric.exported} - silent


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
def test_a_run_on_ray_exports_them_as_long_as_it_goes_on(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from subfleet.platform import coordinator

    started: list[Any] = []
    start = coordinator.start_coordinator
    monkeypatch.setattr(
        coordinator, "start_coordinator", lambda *args: started.append(start(*args)) or started[0]
    )
    long = experiment.with_overrides(["run.rounds=100000", "run.eval_every=0"])
    ended: list[Run] = []
    wanted = {"ray_subfleet_round", "ray_subfleet_rounds", "ray_subfleet_rounds_done_total"}
    wanted |= {"ray_subfleet_hosts_alive", "ray_subfleet_bundles_in_flight"}
    run = Thread(target=lambda: ended.append(launch(long, out=tmp_path / "long")))
    run.start()
    try:
        found = awaited("long", lambda series: wanted <= set(series))
        # Ray forgets a gauge after two of its intervals; these are set again.
        time.sleep(10)
        later = awaited("long", lambda series: wanted <= set(series))
        assert not ended
    finally:
        started[0].stop.remote()
        run.join()
    assert found["ray_subfleet_rounds"] == later["ray_subfleet_rounds"] == {"": 100000.0}
    assert found["ray_subfleet_hosts_alive"] == later["ray_subfleet_hosts_alive"] == {"": 1.0}
    rounds = "ray_subfleet_rounds_done_total"
    assert 0 < found[rounds][""] < later[rounds][""] <= len(ended[0].metrics)
    assert 0 <= later["ray_subfleet_bundles_in_flight"][""] <= 2


@pytest.fixture
def gauges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float]]:
    """Which of Ray's gauges were set, and to what, as it goes on."""
    told: list[tuple[str, float]] = []

    def noted(gauge: Any, value: float, tags: Any = None) -> None:
        told.append((gauge.info["name"], value))

    monkeypatch.setattr("ray.util.metrics.Gauge.set", noted)
    return told


def begun() -> OperatorMetrics:
    """The metrics of a run of nine rounds, of which none is done."""
    metrics = OperatorMetrics()
    metrics.on_start({"run_folder": "runs/a", "rounds": 9, "start": 0})
    return metrics


def test_rounds_alone_keep_gauges_alive(
    gauges: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "AGAIN_S", 0.2)
    metrics = begun()
    metrics.on_hosts(2, 0)
    # No round says how many hosts there are: that gauge is Ray's to forget.
    for _ in range(2):
        time.sleep(0.3)
        gauges.clear()
        metrics.on_round({"round": 1, "seconds": {"total": 1.0}}, {})
        assert {("subfleet_hosts_alive", 2.0), ("subfleet_rounds", 9.0)} <= set(gauges)


def test_bundles_that_come_and_go_set_no_gauge_until_it_is_due(
    gauges: list[tuple[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "AGAIN_S", 600.0)
    metrics = begun()
    assert sorted(gauges) == [("subfleet_round", 0.0), ("subfleet_rounds", 9.0)]
    gauges.clear()
    for in_flight in (1, 2, 1):
        metrics.on_hosts(2, in_flight)
    assert gauges == [("subfleet_hosts_alive", 2.0), ("subfleet_bundles_in_flight", 1.0)]
    gauges.clear()
    metrics.on_hosts(1, 2)  # one was lost
    metrics.on_hosts(1, 0)  # all is done: the server's step begins
    assert gauges == [
        *[("subfleet_hosts_alive", 1.0), ("subfleet_bundles_in_flight", 2.0)],
        *[("subfleet_hosts_alive", 1.0), ("subfleet_bundles_in_flight", 0.0)],
    ]
    gauges.clear()
    metrics.on_end({})
    assert {("subfleet_hosts_alive", 0.0), ("subfleet_rounds", 9.0)} <= set(gauges)


def test_the_document_states_them_and_no_others() -> None:
    section = Page("cluster.md").text.split("## Watching a cluster")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if "| `ray_" in line]
    assert rows == [
        [
            f"`{metric.exported[0].removesuffix('_bucket')}`",
            metric.kind,
            ", ".join(f"`{tag}`" for tag in metric.tags),
            metric.meaning,
        ]
        for metric in METRICS
    ]


# --- the dashboard -------------------------------------------------------------------------------

DASHBOARD: dict[str, Any] = json.loads(
    resources.files("subfleet.dashboards").joinpath("grafana.json").read_text(encoding="utf-8")
)
PANELS = DASHBOARD["panels"]
QUERIES = [(panel["title"], t["expr"]) for panel in PANELS for t in panel["targets"]]
METRIC_OF = {name: metric for metric in METRICS for name in metric.exported}
WORDS = {
    *("max", "sum", "rate", "scalar", "histogram_quantile", "by"),
}


@pytest.mark.parametrize(("title", "query"), QUERIES, ids=[title for title, _ in QUERIES])
def test_a_query_names_what_is_exported_and_its_labels(title: str, query: str) -> None:
    del title
    named = re.findall(r"(\w+)\{([^}]*)\}(\[\$__rate_interval\])?", query)
    assert named
    labels = set()
    for name, matchers, window in named:
        metric = METRIC_OF[name]
        known = {*metric.tags, *(["le"] if name.endswith("_bucket") else [])}
        labels |= known
        assert set(re.findall(r"(\w+)=", matchers)) <= known
        assert 'run=~"$run"' in matchers
        of_counter = metric.kind in ("counter", "histogram")
        assert bool(window) <= of_counter, "only what counts has a rate"
    for grouped in re.findall(r"by \(([^)]*)\)", query):
        assert {label.strip() for label in grouped.split(",")} <= labels
    rest = re.sub(r"\w+\{[^}]*\}(\[[^\]]*\])?|by \([^)]*\)|[\d.]+", " ", query)
    assert set(re.findall(r"\w+", rest)) <= WORDS
    assert query.count("(") == query.count(")")


def test_every_metric_has_a_panel() -> None:
    shown = {
        METRIC_OF[name].name for _, q in QUERIES for name in re.findall(r"ray_subfleet_\w+", q)
    }
    assert shown == {metric.name for metric in METRICS}


def test_the_dashboard_can_be_imported_and_its_panels_lie_side_by_side() -> None:
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["run"]["query"]["query"] == "label_values(ray_subfleet_round, run)"
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    taken: set[tuple[int, int]] = set()
    for panel in PANELS:
        assert panel["title"] and panel["description"] and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["type"] in ("stat", "timeseries")
        for one in (panel, *panel["targets"]):
            assert one["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            tags = METRIC_OF[re.findall(r"ray_subfleet_\w+", target["expr"])[0]].tags
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= set(tags)
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken
        taken |= cells
