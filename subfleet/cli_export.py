"""The command `subfleet export`: a run's small network for those who have no subfleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from subfleet.cli_support import DebugOption, loading, print_json, print_table, reported, waiting


@reported
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    tier: Annotated[
        str | None, typer.Option(metavar="NAME", help="The sub-network of this tier's devices.")
    ] = None,
    client: Annotated[
        int | None,
        typer.Option(metavar="ID", help="The network of this client, with what it keeps itself."),
    ] = None,
    width: Annotated[
        float | None, typer.Option(metavar="W", help="The sub-network of this width, e.g. 0.5.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where to; by default export/NAME in the run's folder."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the files of an earlier export.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the card as JSON instead of a table.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Write a run's small network as files that plain PyTorch loads.

    The folder holds model.pt2 (a torch.export program, from rows as they are stored to class
    scores), model.safetensors (its tensors), model.json and README.md (its card). Its path is
    the last line printed.

    \b
    Examples:
      subfleet export runs/a --tier low
      subfleet export runs/a --client 17 --out phone
      subfleet export runs/a --width 0.5 --json
    """
    from subfleet.core.errors import InputError

    if sum(option is not None for option in (tier, client, width)) != 1:
        raise InputError("give one of --tier NAME, --client ID and --width W: which sub-network")
    loading(always=True)
    from subfleet.export import export as write

    with waiting("reading the run") as step:
        done = write(run, tier=tier, client=client, width=width, out=out, force=force, step=step)
    for words in done.warnings:
        typer.echo(f"warning: {words}", err=True)
    if as_json:
        print_json(done.card | {"path": str(done.path)})
        return
    print_table([_row(done.card)])
    typer.echo(str(done.path))


def _row(card: dict[str, Any]) -> dict[str, Any]:
    accuracy, cost = card["accuracy"], card["cost"]
    measured = accuracy.get("measured") or accuracy.get("run") or {}
    return {
        "model": card["model"]["name"],
        "tier": card["subnetwork"]["tier"],
        "params": cost["params"],
        "macs": cost["macs"],
        "weights_bytes": card["files"]["model.safetensors"],
        "program_bytes": card["files"]["model.pt2"],
        "accuracy": measured.get("accuracy"),
    }
