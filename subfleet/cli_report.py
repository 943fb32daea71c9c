"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from subfleet.cli_support import DebugOption, loading, reported


@reported
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run folders, or folders that hold runs."),
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE.html", help="The page; replaced.")
    ] = Path("report.html"),
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="Draw this against costs; by default acc_global, acc_own or acc_local.",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            help="Compare the costs of reaching this accuracy; by default what all reach.",
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="The page's title.")] = None,
    debug: DebugOption = False,
) -> None:
    """Write one self-contained HTML page that compares runs.

    Runs of several seeds are averaged. Runs that go on, crashed, or are of another version take
    part, and are marked as what they are.

    \b
    Examples:
      subfleet report runs/a runs/b
      subfleet report cells -o sweep.html --title "Width sweep"
      subfleet report runs --metric acc_own --target 0.6
    """
    loading()
    from subfleet.dashboards.report import report as write_report

    path = write_report(
        *(runs, out),
        metric=metric,
        target=target,
        title=title,
        say=lambda text: typer.echo(text, err=True),
    )
    typer.echo(path)
