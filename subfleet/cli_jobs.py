"""`subfleet submit` and `subfleet jobs`: experiments as jobs of a Ray cluster."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from subfleet.cli_support import DebugOption, JsonOption, print_json, print_table, reported, waiting
from subfleet.core.errors import InputError, RunFailed

ADDRESS = "http://127.0.0.1:8265"

jobs_app = typer.Typer(
    help="""Look after the jobs of a Ray cluster.

    \b
    Examples:
      subfleet jobs list --address http://head:8265
      subfleet jobs logs subfleet-1a2b3c4d --follow
    """,
    no_args_is_help=True,
    rich_markup_mode=None,
)
AddressOption = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="RAY_API_SERVER_ADDRESS",
        help="The cluster's job server: its dashboard's address.",
    ),
]
JobArgument = Annotated[str, typer.Argument(metavar="ID", help="The job's id.")]


@reported
def submit(
    experiment: Annotated[
        Path, typer.Argument(metavar="EXPERIMENT.toml", help="The experiment's TOML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="Set one key of the experiment; repeatable."),
    ] = None,
    address: AddressOption = ADDRESS,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="The run folder, a path on the cluster, best on storage that every node sees; "
            "by default subfleet-runs/ID in the home folder there.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="ID", help="The job's id; by default a new one.")
    ] = None,
    more: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="PATH", help="A file or folder to send along; repeatable."),
    ] = None,
    restarts: Annotated[
        int,
        typer.Option(metavar="N", help="How often to go on by itself when the coordinator dies."),
    ] = 3,
    fetch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Bring the run folder here at the end, without checkpoints."
        ),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow the log until the job ends.")
    ] = True,
    debug: DebugOption = False,
) -> None:
    """Submit an experiment to a Ray cluster as a job.

    This package and the modules of your own that the experiment names are sent along. Paths in
    the experiment are those of the cluster, whose token must be here too, in ~/.ray/auth_token or
    RAY_AUTH_TOKEN. The command ends with the job's own exit status. With --no-wait the last line
    printed is the job's id, else the run folder's path. Submitted again with the same --out, a run
    goes on from its newest checkpoint.

    \b
    Examples:
      subfleet submit examples/quickstart.toml --address http://head:8265 --out /shared/runs/a
      subfleet submit e.toml --set run.rounds=500 --no-wait
      subfleet submit e.toml --fetch runs/a
    """
    from subfleet.cluster.fetch import check_free, refused
    from subfleet.cluster.fetch import fetch as fetch_folder
    from subfleet.cluster.jobs import JobServer, exit_status
    from subfleet.cluster.submit import Submission
    from subfleet.config import Experiment

    if fetch is not None and not wait:
        raise InputError("--fetch waits for the job's end; leave out --no-wait")
    if fetch is not None:
        check_free(fetch)
    loaded = Experiment.load(experiment, overrides or ())
    named = {} if name is None else {"id": name}
    submission = Submission(
        loaded.to_toml(), out=out, restarts=restarts, more=tuple(more or ()), **named
    )
    with waiting(f"asking {address}") as step:
        server = JobServer(address)
        typer.echo(f"sending the code to {server.address} ...", err=True)
        step("sending the code")
        submission.send(server)
    typer.echo(f"job {submission.id} is submitted; its run folder: {submission.folder}", err=True)
    if not wait:
        typer.echo(f"follow it: subfleet jobs logs {submission.id} --follow", err=True)
        typer.echo(submission.id)
        return
    job = _followed(server, submission.id)
    if fetch is not None and refused(server, job):
        typer.echo("no run was begun: there is nothing to fetch", err=True)
    elif fetch is not None and job.status != "STOPPED":
        typer.echo(f"fetching {submission.folder} ...", err=True)
        try:
            with waiting("fetching"):
                fetch_folder(server, submission.folder, fetch)
            typer.echo(str(fetch))
        except RunFailed as error:
            if not exit_status(job):
                raise
            typer.echo(f"warning: {error}", err=True)  # a job that failed may have left nothing
    _end(job)


@jobs_app.command("list")
@reported
def list_jobs(
    address: AddressOption = ADDRESS, as_json: JsonOption = False, debug: DebugOption = False
) -> None:
    """List the jobs that were submitted to the cluster, the newest first.

    \b
    Example:
      subfleet jobs list --address http://head:8265
    """
    from subfleet.cluster.jobs import JobServer

    rows = [job_row(job) for job in JobServer(address).jobs()]
    if as_json:
        print_json(rows)
    elif not rows:
        typer.echo(f"no jobs at {address}")
    else:
        print_jobs(rows)


@jobs_app.command()
@reported
def logs(
    id: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job ends, with its status.")
    ] = False,
    address: AddressOption = ADDRESS,
    debug: DebugOption = False,
) -> None:
    """Show what a job has written.

    \b
    Example:
      subfleet jobs logs subfleet-1a2b3c4d --follow
    """
    from subfleet.cluster.jobs import JobServer

    server = JobServer(address)
    if follow:
        _end(_followed(server, id))
    typer.echo(server.log(id), nl=False)


@jobs_app.command()
@reported
def fetch(
    id: JobArgument,
    to: Annotated[Path, typer.Argument(metavar="DIR", help="A folder here, absent or empty.")],
    address: AddressOption = ADDRESS,
    debug: DebugOption = False,
) -> None:
    """Bring a job's run folder here, without checkpoints.

    \b
    Example:
      subfleet jobs fetch subfleet-1a2b3c4d runs/a
    """
    from subfleet.cluster.fetch import fetch as fetch_folder
    from subfleet.cluster.fetch import refused
    from subfleet.cluster.jobs import JobServer

    server = JobServer(address)
    job = server.job(id)
    folder = job.metadata.get("out")
    if folder is None:
        raise InputError(
            f"job {id}: was not submitted by `subfleet submit`, so its run folder is not known; "
            f"copy it with scp, say, from where the job's command puts it: {job.entrypoint}"
        )
    if refused(server, job):
        raise InputError(
            f"job {id}: was refused before it began a run (`subfleet jobs logs {id}` says why); if "
            f"{folder} holds one, it is another job's: fetch it by that job's id"
        )
    if not job.over:
        typer.echo(f"job {id} is {job.status}: what is there of its run is fetched", err=True)
    with waiting(f"fetching {folder}"):
        fetch_folder(server, folder, to)
    typer.echo(str(to))


@jobs_app.command()
@reported
def stop(id: JobArgument, address: AddressOption = ADDRESS, debug: DebugOption = False) -> None:
    """Stop a job; its last finished round is saved first.

    Submitted again with the same --out, the run goes on from there.

    \b
    Example:
      subfleet jobs stop subfleet-1a2b3c4d
    """
    from subfleet.cluster.jobs import JobServer

    server = JobServer(address)
    if server.job(id).over:
        typer.echo(f"job {id} had ended before", err=True)
    with waiting(f"job {id} saves its last finished round"):
        job = server.stop(id)
    if not job.over:
        raise RunFailed(f"job {id} was told to stop and has not ended yet; it is {job.status}")
    typer.echo(f"{job.id}: {job.status}")
    if job.status == "STOPPED":
        typer.echo(_how_to_go_on(server.log(id)), err=True, nl=False)


def _followed(server: Any, id: str) -> Any:
    with ExitStack() as starting:
        starting.enter_context(waiting(f"job {id} is starting"))

        def write(text: str) -> None:
            starting.close()
            typer.echo(text, nl=False)

        return _until_the_end(server, id, write)


def _until_the_end(server: Any, id: str, write: Callable[[str], None]) -> Any:
    try:
        return server.follow(id, write)
    except KeyboardInterrupt:
        typer.echo(
            f"\nno longer following; job {id} goes on: subfleet jobs stop {id} ends it", err=True
        )
        raise


def _how_to_go_on(log: str) -> str:
    """What a stopped run said last: what it left, and the command that takes it up."""
    said = re.findall(r"^stopped; .*\n(?:  .*\n)?", log, re.MULTILINE)
    return said[-1] if said else ""


def _end(job: Any) -> None:
    """Ends the command as the job ended."""
    from subfleet.cluster.jobs import exit_status

    status = exit_status(job)
    if status:
        typer.echo(f"job {job.id}: {job.status}, exit status {status}", err=True)
        if job.exit_status is None and job.message:
            typer.echo(job.message, err=True)
    raise typer.Exit(status)


def job_row(job: Any) -> dict[str, Any]:
    """A job as `jobs list --json` has it."""
    ended = job.ended or datetime.now().timestamp()
    return {
        "id": job.id,
        "status": job.status,
        "exit_status": job.exit_status,
        "started": job.started and datetime.fromtimestamp(job.started).isoformat(" ", "seconds"),
        "seconds": round(ended - job.started, 1) if job.started else None,
        "run_folder": job.metadata.get("out"),
        "entrypoint": job.entrypoint,
    }


def print_jobs(rows: Sequence[dict[str, Any]]) -> None:
    """The same as a table."""
    print_table([_shown(row) for row in rows], hide=("entrypoint", "seconds", "exit"))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row as a table has it: narrow, so that there is room for the folder."""
    started, status = row["started"], row["exit_status"]
    cells = {
        "id": row["id"],
        "status": row["status"],
        "exit": None if status is None else str(status),
        "started": started and started[5:16],  # month, day, hours and minutes
        "seconds": row["seconds"],
        "run_folder": row["run_folder"],
        "entrypoint": row["entrypoint"],
    }
    return {key: "–" if value is None else value for key, value in cells.items()}
