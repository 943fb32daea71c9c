"""Commands on data: prepare a publisher's files, describe and plot what clients hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subfleet.cli_catalog import first_line, print_rows
from subfleet.cli_support import (
    DebugOption,
    JsonOption,
    loading,
    print_json,
    print_table,
    reported,
    stderr,
    waiting,
)
from subfleet.core.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from subfleet.dashboards.console import Preparation
    from subfleet.datasets import Federation

data_app = typer.Typer(
    help="Data sets and partitions.", no_args_is_help=True, rich_markup_mode=None
)

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a=b", help="Set one key of [data]; repeatable."),
]
WhatArgument = Annotated[
    str,
    typer.Argument(metavar="WHAT", help="A store, an EXPERIMENT.toml, or a data set's name."),
]


@data_app.command("list")
@reported
def data_list(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the data sets with the options of their own and those that many share.

    \b
    Examples:
      subfleet data list
      subfleet data list --json
    """
    loading()
    from subfleet import registry
    from subfleet.datasets.published import deal, open_set

    files, dealing = (registry.option_names(f, registry.DATA_GIVEN)[1:] for f in (open_set, deal))
    rows = []
    for name, factory in sorted(registry.data_sets().items()):
        options = registry.option_names(factory, registry.DATA_GIVEN)
        shared = "files" if "source" in options else "dealt" if "partition" in options else ""
        own = [key for key in options if not shared or key not in files]
        row = {"name": name, "options": ", ".join(own), "and those of": shared}
        rows.append(row | {"what": first_line(factory)})
    print_rows(rows, as_json)
    if not as_json:
        typer.echo(f"dealt: {', '.join(dealing)}")
        typer.echo(f"files: {', '.join(files)}")


@data_app.command("prepare")
@reported
def data_prepare(
    name: Annotated[str, typer.Argument(help="The data set, as `subfleet data list` names it.")],
    out: Annotated[Path, typer.Option(metavar="STORE", help="The store to write, a folder.")],
    source: Annotated[
        str, typer.Option(metavar="DIR", help="The publisher's files: a folder or a file.")
    ] = "",
    options: SetOption = None,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch the files first, where that can be done.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out, and count, what cannot be used.")
    ] = False,
    local: Annotated[
        bool, typer.Option("--local", help="Parse in this process, without starting Ray.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(metavar="A", help="Use the Ray cluster at this address, or 'auto'."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Parse a publisher's files in parallel into a store; a killed one goes on where it was.

    \b
    Examples:
      subfleet data prepare femnist --source leaf/femnist/data --out stores/femnist
      subfleet data prepare celeba --source celeba --out stores/celeba --set size=84
      subfleet data prepare cifar10 --download --out stores/cifar10
    """
    loading()
    from subfleet.cluster.start import ray_session
    from subfleet.datasets.parallel import parse_all
    from subfleet.datasets.prepare import prepare
    from subfleet.datasets.published import find_source

    reader = _reader(name, options or [])
    if not source and not download:
        raise InputError(
            f"the files of {name} are missing; give their folder with --source DIR, or --download "
            "where there is a network"
        )
    _refuse_occupied(out)
    said = _said()
    settings: dict[str, Any] = {"skip_bad": skip_bad, "progress": said}
    with waiting("looking at the files") as step:
        files = find_source(reader, source, download=download, progress=said)
        if local:
            step("preparing data")
            prepare(reader, files, out.absolute(), **settings)
        else:
            reader.shards(files)  # wrong input is said before Ray starts
            step("starting Ray" if address is None else f"joining Ray at {address}")
            with ray_session(address):
                step("preparing data")
                prepare(reader, files, out.absolute(), parse_all=parse_all, **settings)
    _report_store(out)


def _reader(name: str, options: list[str]) -> Any:
    from subfleet import registry
    from subfleet.config import Experiment
    from subfleet.datasets import READERS

    if name not in READERS:
        raise InputError(f"unknown data set {name!r}; {did_you_mean(name, READERS)}")
    overrides = [f"data.{option}" for option in options]
    table = Experiment(data={"name": name}).with_overrides(overrides).data
    return READERS[name](
        **registry.check_options("data", READERS[name], table.options, frozenset())
    )


def _refuse_occupied(out: Path) -> None:
    if not out.exists():
        return
    if (out / "manifest.json").exists():
        raise InputError(f"{out} is a store already; remove it or give another --out")
    if not out.is_dir() or any(out.iterdir()):
        raise InputError(f"{out} is not empty and no store; give another --out")
    out.rmdir()


def _report_store(out: Path) -> None:
    from subfleet.datasets.store import read_manifest

    manifest = read_manifest(out)
    found = manifest["found"]
    for text in found["warnings"]:
        typer.echo(f"warning: {text}", err=True)
    for kind, count in found["counts"].items():
        typer.echo(f"left out: {count} x {kind}, e.g. {found['examples'].get(kind, '')}", err=True)
    if manifest["dropped"]:
        typer.echo(f"left out: {manifest['dropped']} clients with one sample or none", err=True)
    typer.echo(f"{manifest['rows']:,} samples of {manifest['name']}; read them with", err=True)
    typer.echo(f"  --set data.name={manifest['name']} --set data.source={out.absolute()}", err=True)
    typer.echo(str(out))


@data_app.command("describe")
@reported
def data_describe(
    what: WhatArgument,
    options: SetOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Of a store: compare every file with its sum.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print clients, samples, mean, sd, classes and quantiles, and what a partition repaired.

    \b
    Examples:
      subfleet data describe stores/femnist --verify
      subfleet data describe synthetic_cifar10 --set partition=dirichlet --set alpha=0.1
      subfleet data describe examples/cifar10.toml --json
    """
    loading()
    from subfleet.datasets.census import census

    said = _said()
    if verify:
        _verify(Path(what), said)
    data = _federation(what, options or [], said)
    with waiting("counting"):
        found = census(data, said)
    found["report"] = getattr(data, "report", {})
    if verify:
        found["verified"] = True
    if as_json:
        print_json(found)
        return
    alone = ("quantiles", "class_quantiles", "report", "parts", "input_shape")
    print_table([{"data": k.replace("_", " "), "": v} for k, v in found.items() if k not in alone])
    print_table(
        [
            {"a client's": "samples", **_short(found["quantiles"])},
            {"a client's": "classes", **_short(found["class_quantiles"])},
        ],
        title="quantiles",
    )
    print_table([found["parts"]], title="samples by part")
    for text in found["report"].get("warnings", []):
        typer.echo(f"note: {text}")


def _short(quantiles: dict[str, float]) -> dict[str, float]:
    """For a table, where a fraction of a thousand samples says nothing."""
    return {name: round(value) if value >= 1000 else value for name, value in quantiles.items()}


def _verify(store: Path, said: Preparation) -> None:
    from subfleet.datasets.writing import verify_store

    if not (store / "manifest.json").exists():
        raise InputError(f"--verify: {store} is no store; name one that data prepare wrote")
    with waiting(f"checking {store}"):
        verify_store(store, said)


@data_app.command("plot")
@reported
def data_plot(
    what: WhatArgument,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.png", help="The picture.")],
    options: SetOption = None,
    clients: Annotated[
        int, typer.Option(metavar="N", help="How many clients the heat map shows.")
    ] = 100,
    debug: DebugOption = False,
) -> None:
    """Draw who holds which labels, and how many samples, into a PNG file.

    \b
    Examples:
      subfleet data plot examples/cifar10.toml -o partition.png
      subfleet data plot synthetic_cifar10 --set alpha=0.1 --set clients=50 -o skewed.png
    """
    loading()
    from subfleet.dashboards.data_plots import partition_plot

    data = _federation(what, options or [], _said())
    with waiting("drawing"):
        path = partition_plot(data, out, clients=clients)
    typer.echo(str(path))


def _said() -> Preparation:
    """Says on stderr how far a long preparation has come."""
    from subfleet.dashboards.console import Preparation

    return Preparation(stderr())


def _federation(what: str, options: list[str], said: Preparation) -> Federation:
    """The data set that a store's folder, an experiment's file or a name stands for."""
    from subfleet import registry
    from subfleet.config import Experiment
    from subfleet.datasets import SETS

    overrides = [f"data.{option}" for option in options]
    path = Path(what)
    if (path / "manifest.json").exists():
        from subfleet.datasets.store import read_manifest

        table = {"name": read_manifest(path)["name"], "source": str(path)}
        experiment = Experiment(data=table).with_overrides(overrides)
    elif path.suffix == ".toml":
        experiment = Experiment.load(path, overrides)
    elif what not in SETS and path.is_dir():
        raise InputError(
            f"{what} is a folder, but no store (no manifest.json); name the data set instead, and "
            f"where its files are: NAME --set source={what}"
        )
    else:
        experiment = Experiment(data={"name": what}).with_overrides(overrides)
    with waiting("reading the data"):
        return registry.build_data(experiment.data, seed=experiment.run.seed, progress=said)
