"""How long a report over large runs takes, how large it is, and how fast it opens.

    python benchmarks/report.py [--runs 6] [--rounds 200] [--clients 1000] [--out report.html]

Writes run folders through the platform's own writers, with drawn numbers, each of an experiment of
its own, which draws the most; every client trains in every round. Then times `subfleet report` as a
whole command, and the page's load event in headless Chromium where that and Playwright are
installed. Ends with status 1 beyond 20 s, 8 MB or 2 s.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from subfleet.config import Experiment
from subfleet.core import seeds
from subfleet.platform.measure import local_accuracy
from subfleet.platform.metrics import ClientsLog, MetricsLog, summarise
from subfleet.platform.runfolder import RunFolder

TIERS = ("high", "medium", "low")
GROUPS = {f"block{n}.conv": 16 * 2 ** (n // 6) for n in range(24)}
CHROMIUM = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync")


LIMITS = {"build_s": 20.0, "megabytes": 8.0, "open_s": 2.0}


def write_run(path: Path, algorithm: str, seed: int, rounds: int, clients: int) -> None:
    """One run folder as a finished run leaves it, without weights and checkpoints."""
    experiment = Experiment(
        data={"name": "synthetic_femnist", "clients": clients},
        fleet={"tiers": [{"name": name, "share": 1 / 3, "width": 1.0} for name in TIERS]},
        algorithm={"name": algorithm},
        train={"lr": 0.01 * (seed + 1)},
        run={"rounds": rounds, "cohort": clients, "seed": seed},
    )
    facts = {"name": "synthetic_femnist", "clients": clients, "classes": 62}
    folder = RunFolder.create(path, experiment.to_toml(), "none", data=facts)
    folder.write_network(GROUPS)
    some = np.arange(min(200, clients))
    counts = seeds.generator(seed, "labels").multinomial(100, [1 / 62] * 62, len(some))
    tiers = np.array(TIERS)[some % 3]
    folder.write_labels(pa.table({"client": some, "tier": tiers, "counts": counts.tolist()}))
    metrics, log = MetricsLog(folder.metrics), ClientsLog(folder.clients)
    for round in range(1, rounds + 1):
        draw = seeds.generator(seed, "benchmark", round=round)
        columns = client_rows(draw, clients, round / rounds)
        log.add(round, columns)
        metrics.append(record(columns, round, rounds, draw))
        if round % 10 == 0:
            log.flush()
    log.flush()
    summary: dict[str, Any] = {"params_mean": 1e5, "flops_mean": 1e6, "params_sha256": "0" * 64}
    folder.write_summary(summarise(metrics.read(), seed=seed, finished=True, **summary))
    metrics.close()


def client_rows(draw: np.random.Generator, clients: int, done: float) -> dict[str, np.ndarray]:
    """A row a client."""
    widths = draw.choice([0.5, 0.75, 1.0], clients)
    kept = [" ".join(str(int(size * width)) for size in GROUPS.values()) for width in widths]
    return {
        "client": np.arange(clients),
        "tier": np.array(TIERS)[np.arange(clients) % 3],
        "num_samples": draw.integers(10, 400, clients),
        "loss": (4 - 3 * done) * draw.lognormal(0, 0.3, clients),
        "acc_local": np.clip(done * draw.beta(6, 2, clients), 0, 1),
        "seconds": draw.lognormal(-3, 0.5, clients),
        "params": (widths**2 * 1e5).astype(np.int64),
        "macs": (widths**2 * 1e6).astype(np.int64),
        "units": np.array(kept),
        "flops": widths**2 * 1e9,
        "bytes_up": (widths**2 * 4e5).astype(np.int64),
        "bytes_down": (widths**2 * 4e5).astype(np.int64),
        "steps": draw.integers(5, 40, clients),
        "status": np.where(draw.random(clients) < 0.05, "late", "ok"),
        "sim_seconds": draw.lognormal(1, 0.6, clients),
        "energy_j": draw.lognormal(0, 0.5, clients),
    }


def record(
    columns: dict[str, np.ndarray], round: int, rounds: int, draw: np.random.Generator
) -> dict[str, Any]:
    """The line of `metrics.jsonl` that goes with the rows."""
    accuracy = float(columns["acc_local"].mean() + draw.normal(0, 0.01))
    return {
        "round": round,
        "phase": "train",
        "loss_train": float(columns["loss"].mean()),
        **local_accuracy(columns),
        "acc_global": accuracy,
        "acc_tier": {tier: accuracy - 0.02 * place for place, tier in enumerate(TIERS)},
        "clients": int((columns["status"] == "ok").sum()),
        "late": int((columns["status"] == "late").sum()),
        "dropped": 0,
        "bytes_up": int(columns["bytes_up"].sum()),
        "bytes_down": int(columns["bytes_down"].sum()),
        "flops": float(columns["flops"].sum()),
        "energy_j": float(columns["energy_j"].sum()),
        "sim_time": 10.0 * round,
        "coverage": dict.fromkeys(GROUPS, 300),
        "keep": {group: 0.7 + 0.2 * draw.random() for group in GROUPS},
        "seconds": {"plan": 0.1, "train": 5.0, "reduce": 0.2, "metrics": 0.1, "total": 5.5},
    }


def opened_s(page: Path) -> float | None:
    """Seconds until Chromium's load event, median of 3 windows; None where there is none."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if path is None:
        return None
    seconds = []
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=[*CHROMIUM])
        for _ in range(3):
            window = browser.new_page(viewport={"width": 1280, "height": 900})
            begun = time.perf_counter()
            window.goto(page.as_uri())
            seconds.append(time.perf_counter() - begun)
        browser.close()
    return sorted(seconds)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.html")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(options.runs):
            algorithm = ("fedavg", "fedpa")[number % 2]
            size = (options.rounds, options.clients)
            write_run(folder / f"{algorithm}-s{number // 2}", algorithm, number // 2, *size)
        page = (options.out or folder / "report.html").absolute()
        begun = time.perf_counter()
        command = [sys.executable, "-m", "subfleet", "report", str(folder), "-o", str(page)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - begun
        found = {
            "runs": options.runs,
            "rounds": options.rounds,
            "clients": options.clients,
            "build_s": round(seconds, 2),
            "megabytes": round(page.stat().st_size / 1e6, 2),
            "open_s": opened_s(page),
        }
    print(json.dumps(found, indent=2))
    for name, limit in LIMITS.items():
        if found[name] is not None and found[name] > limit:
            print(f"{name} is beyond {limit:g}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
