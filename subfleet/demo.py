"""The demo: what budgeted sub-networks are good for, in minutes, without a download."""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import nullcontext
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from subfleet.config import Experiment
from subfleet.core.errors import InputError
from subfleet.dashboards.console import duration, final_table
from subfleet.dashboards.plots import accuracy_plot
from subfleet.launch import Run, launch

if TYPE_CHECKING:
    from rich.console import Console

# What each run of the demo is called, and what it changes in the experiment.
RUNS = {
    "fedpa": ("FedPA: each client trains what its budget allows", {}),
    "fedavg": (
        "FedAvg: everybody trains the network of the poorest",
        {"algorithm.name": "fedavg"},
    ),
}


def quickstart() -> Experiment:
    """The experiment of the demo, `examples/quickstart.toml`."""
    text = resources.files("subfleet").joinpath("quickstart.toml").read_text(encoding="utf-8")
    return Experiment.from_toml(text, "quickstart.toml")


def demo(
    *,
    out: str | os.PathLike | None = None,
    local: bool = False,
    console: Console | None = None,
    experiment: Experiment | None = None,
) -> dict[str, Run]:
    """Runs FedPA and FedAvg at the smallest width on the same fleet; shows both.

    Prints a table of tiers, the accuracies side by side, and what to type next;
    the last line is the run folder of FedPA. Returns both runs by name.
    """
    base = experiment or quickstart()
    folder = _folder(out)
    started = time.perf_counter()
    runs = {}
    if console is not None and not local:
        console.print("starting Ray ...", highlight=False)
    with nullcontext() if local else _ray():
        for name, (title, changes) in RUNS.items():
            if console is not None:
                console.print(f"\n{title}", style="bold", highlight=False)
            one = base.with_values(changes)
            runs[name] = launch(one, out=folder / name, local=local, progress=console)
    _show(runs, folder, time.perf_counter() - started)
    return runs


def _ray():
    from subfleet.cluster.start import ray_session

    return ray_session(None)


def _folder(out: str | os.PathLike | None) -> Path:
    folder = Path(out) if out is not None else Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    for name in RUNS:
        if (folder / name).exists():
            raise InputError(f"--out {folder}: holds a demo already; give another folder")
    return folder


def _show(runs: dict[str, Run], folder: Path, seconds: float) -> None:
    from rich.console import Console

    console = Console()
    accuracy = {name: run.summary["acc_global"] for name, run in runs.items()}
    console.print(final_table(runs["fedpa"].tiers, title="\nFedPA, tier by tier"))
    gain = 100 * (accuracy["fedpa"] - accuracy["fedavg"])
    console.print(
        f"FedPA's network reaches {accuracy['fedpa']:.3f} on writers it never saw; FedAvg at the "
        f"smallest width {accuracy['fedavg']:.3f}: {gain:+.1f} points. "
        f"Both runs took {duration(seconds)}.",
        highlight=False,
    )
    picture = accuracy_plot(
        {"FedPA": runs["fedpa"].metrics, "FedAvg, smallest width": runs["fedavg"].metrics},
        folder / "accuracy.png",
    )
    console.print(f"\npicture   {picture}", soft_wrap=True, highlight=False)
    for line in _next(folder):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    typer.echo(str(runs["fedpa"].path))


def _next(folder: Path) -> list[str]:
    """What to type next; first the environment, when its commands are not found as it is."""
    activate = Path(sys.executable).with_name("activate")
    here = shutil.which("subfleet") is None and activate.exists()
    lines = [f". {activate}"] if here else []
    lines += [
        f"subfleet dashboard {folder}",
        "subfleet run examples/quickstart.toml --set algorithm.name=fedrolex",
        "subfleet models describe small_cnn --budget flops=100k",
    ]
    return [("next      " if i == 0 else "          ") + line for i, line in enumerate(lines)]
