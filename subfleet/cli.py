"""The command `subfleet`: what each command takes, and how errors end.

Commands import what they need when they run, so that `--help` does not wait for
torch and Ray. Exit statuses: 0 done, 1 the run failed, 2 the input is wrong, 130
interrupted, 143 terminated; errors are one message on stderr, without a traceback unless
`--debug` asks for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subfleet.cli_catalog import algorithms
from subfleet.cli_dashboard import dashboard
from subfleet.cli_data import data_app
from subfleet.cli_export import export
from subfleet.cli_jobs import jobs_app, submit
from subfleet.cli_models import models_app
from subfleet.cli_report import report
from subfleet.cli_stress import stress
from subfleet.cli_support import DebugOption, loading, reported, stderr
from subfleet.cli_watch import watch
from subfleet.cluster.address import check_address
from subfleet.core.errors import InputError

app = typer.Typer(
    name="subfleet",
    help="Simulate federated learning at scale, each client training the sub-network that fits it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.command("algorithms")(algorithms)
app.command("export")(export)
app.command("dashboard")(dashboard)
app.command("submit")(submit)
app.add_typer(jobs_app, name="jobs")
app.command("stress")(stress)
app.command("report")(report)
app.command("watch")(watch)

ExperimentFile = Annotated[
    Path, typer.Argument(metavar="EXPERIMENT.toml", help="The experiment's TOML file.")
]
LocalOption = Annotated[
    bool, typer.Option("--local", help="Run in this process, without starting Ray.")
]
AddressOption = Annotated[
    str | None, typer.Option(metavar="A", help="Use the Ray cluster at this address, or 'auto'.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from subfleet import __version__

        typer.echo(f"subfleet {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    del version


@app.command()
@reported
def run(
    experiment: ExperimentFile,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="Set one key of the experiment; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder; by default a new one.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint in --out.")
    ] = False,
    local: LocalOption = False,
    address: AddressOption = None,
    engine_record: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An engine.json whose choices to replay, bit by bit."),
    ] = None,
    restarts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Go on from the newest checkpoint when the coordinator dies, up to N times, and "
            "with the run that --out holds already.",
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Run one experiment. The last line printed is the run folder's path.

    \b
    Examples:
      subfleet run examples/quickstart.toml
      subfleet run examples/femnist.toml --set run.rounds=20 --set train.lr=0.1
      subfleet run examples/femnist.toml --out runs/a --resume
    """
    from subfleet.config import Experiment

    if resume and out is None:
        raise InputError("--resume needs --out; name the folder of the run to continue")
    loaded = Experiment.load(experiment, overrides or ())
    _one_place(local, address)
    loading(always=True)
    from subfleet.dashboards.console import print_end
    from subfleet.launch import launch

    finished = launch(
        loaded,
        out=out,
        resume=resume,
        local=local,
        address=address,
        engine_record=engine_record,
        restarts=restarts,
        progress=stderr(),
    )
    print_end(finished.tiers, finished.path, summary=finished.summary)


@app.command()
@reported
def sweep(
    experiment: ExperimentFile,
    seeds: Annotated[
        str, typer.Option(metavar="0,1,2", help="The seeds of each cell, separated by commas.")
    ] = "0",
    grid: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=1,2", help="One axis of the grid; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The sweep's folder; cells in it are kept.")
    ] = None,
    local: LocalOption = False,
    address: AddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Run a grid of experiments; finished cells are not run again.

    \b
    Examples:
      subfleet sweep examples/femnist.toml --seeds 0,1,2
      subfleet sweep examples/femnist.toml --seeds 0,1 --set algorithm.name=fedavg,fedpa
    """
    from subfleet.config import Experiment
    from subfleet.config_text import parse_grid

    loaded = Experiment.load(experiment)
    axes = dict(parse_grid(axis) for axis in grid or ())
    chosen_seeds = parse_seeds(seeds)
    _one_place(local, address)
    loading(always=True)
    from subfleet.sweep import sweep as run_sweep

    run_sweep(
        loaded,
        seeds=chosen_seeds,
        grid=axes,
        out=out,
        local=local,
        address=address,
        as_json=as_json,
        console=stderr(),
    )


@app.command()
@reported
def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the demo's runs go.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Train sub-networks on 1,000 synthetic clients in three tiers.

    It takes a minute or two.
    """
    loading(always=True)
    from subfleet.demo import demo as run_demo

    run_demo(out=out, console=stderr())


def _one_place(local: bool, address: str | None) -> None:
    if local and address is not None:
        raise InputError(f"--local and --address {address} exclude each other; give one of them")
    check_address(address)


def parse_seeds(text: str) -> list[int]:
    """`0,1,2` as numbers; raises `InputError` for anything else and for repeats.

    >>> parse_seeds("0, 1,2")
    [0, 1, 2]
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = [part for part in parts if not part.isdecimal()]
    if wrong:
        raise InputError(
            f"--seeds {text}: {wrong[0]!r} is not a whole number from 0 up; write e.g. 0,1,2"
        )
    if len(set(parts)) < len(parts):
        raise InputError(f"--seeds {text}: a seed is given twice; give each once")
    return [int(part) for part in parts]


def main() -> None:
    """The entry point of the console script and of `python -m subfleet`."""
    app()
