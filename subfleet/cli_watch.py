"""The command `subfleet watch`: a run that was started elsewhere, followed here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subfleet.cli_support import DebugOption, loading, reported, stderr
from subfleet.core.errors import InputError, RunFailed

if TYPE_CHECKING:
    from subfleet.dashboards.following import Ended
    from subfleet.platform.runfolder import RunFolder


@reported
def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    last: Annotated[
        int, typer.Option(metavar="N", help="How many of the last rounds to show first.")
    ] = 5,
    patience: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="After so long without a sign of life a run of which no process is on this "
            "machine has stopped; by default three of its longest rounds, at least 30.",
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Follow a run that goes on elsewhere: in another terminal, or as a job on shared storage.

    Nothing is written to its folder, and Ctrl-C ends the watching alone. Shows the last rounds,
    the line of progress that the run itself shows, and its table at the end. Ends with status 1
    where the run seems to have stopped, and says how to go on.

    \b
    Examples:
      subfleet watch runs/a
      subfleet watch /shared/runs/first --last 20
      subfleet watch /shared/runs/first --patience 3600
    """
    if last < 0:
        raise InputError(f"--last {last}: is below 0; give how many rounds to show, e.g. 5")
    if patience is not None and not patience >= 0:
        raise InputError(f"--patience {patience:g}: is below 0; give seconds, e.g. 600")
    _check(run)
    loading()
    from subfleet.dashboards.console import ConsoleProgress, print_end
    from subfleet.dashboards.following import Following, rounds_table
    from subfleet.launch import Run
    from subfleet.platform.runfolder import RunFolder

    folder = RunFolder.find(run)
    console = stderr()
    line = ConsoleProgress(0, console)
    following = Following(folder, line, patience_s=patience)
    try:
        if last and following.records:
            console.print(rounds_table(following.records, last))
        ended = following.follow()
    except (KeyboardInterrupt, SystemExit):
        line.close()
        typer.echo(f"no longer watching {folder.path}; the run itself is left alone", err=True)
        raise
    finally:
        line.close()
    if ended.summary is None:
        raise RunFailed(_stopped(folder, ended))
    if not ended.summary.get("finished"):
        typer.echo(f"its time was over after {_how_far(ended)}; {_go_on(folder)}", err=True)
    tiers: list[dict[str, Any]] = []
    if folder.tiers.is_file():
        tiers = Run(folder.path, ended.summary).tiers
    print_end(tiers, folder.path, summary=ended.summary)


def _check(run: Path) -> None:
    """InputError for a folder of runs, which names the newest; others `RunFolder.find` refuses."""
    if (run / "config.toml").is_file() or not run.is_dir():
        return
    runs = [config.parent for config in run.glob("*/config.toml")]
    if runs:
        newest = max(runs, key=lambda one: one.stat().st_mtime)
        raise InputError(f"{run}: holds runs and is none; give one of them, such as {newest}")


def _how_far(ended: Ended) -> str:
    return f"{ended.rounds_done} of {ended.rounds} rounds"


def _stopped(folder: RunFolder, ended: Ended) -> str:
    head = f"{folder.path} seems to have stopped after {_how_far(ended)}: {ended.why}"
    if not folder.config.is_file():
        return f"{head}; start it again"
    return f"{head}; if it has, {_go_on(folder)}"


def _go_on(folder: RunFolder) -> str:
    from subfleet.going_on import resume_command
    from subfleet.platform import checkpoint
    from subfleet.platform.files import last_checkpoint

    newest = last_checkpoint(folder.metrics)
    where = "from the start" if newest is None else f"from round {checkpoint.number(newest)}"
    # Its folder does not say where it was run.
    also = "with (and --local or --address, where it was run so)"
    return f"go on {where} {also}\n  {resume_command(folder)}"
