"""The command `subfleet stress`: a ladder of client counts, and what gives out first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from subfleet.cli_support import (
    DebugOption,
    JsonOption,
    loading,
    print_json,
    print_table,
    reported,
    stderr,
)
from subfleet.core.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from subfleet.cluster.stress import Rung
    from subfleet.ladder import Outcome

STATUS_NOTHING_WORKED = 1
SAY_S = 5.0  # between two lines on progress
SPEED = {
    "planning": "plan",
    "training on the hosts": "train",
    "reading and summing on the hosts": "read",
    "merging on the coordinator": "merge",
}
HIDE = ("overhead", "clients/s", "rest")  # of which the others say most


@reported
def stress(
    clients: Annotated[
        str, typer.Option(metavar="1e2,1e4", help="Registered clients of the rungs.")
    ] = "1e2,1e3,1e4,1e5,1e6",
    cohort: Annotated[
        str, typer.Option(metavar="100,1000", help="Clients a round; each with all of --clients.")
    ] = "100,1000",
    tiers: Annotated[
        str, typer.Option(metavar="1.0,0.5", help="Widths of the tiers, equally many clients each.")
    ] = "1.0,0.5,0.25",
    rounds: Annotated[
        int, typer.Option(metavar="N", help="Rounds that count, between a first and a last one.")
    ] = 5,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=c", help="Set one key of every rung; repeatable."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="M", help="Stop the ladder after so many minutes.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Run without Ray, a process a rung.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(metavar="A", help="Use the Ray cluster at this address, or 'auto'."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where runs, stress.json and .png go.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure rounds of more and more clients: what gives out first?

    The clients are synthetic. Each rung is a run of its own processes, with little training, so
    that what is around it shows. A rung that fails says why and the ladder goes on; the status is
    1 if none ended well. Memory is that of this machine.

    \b
    Examples:
      subfleet stress
      subfleet stress --clients 1e4,1e6 --cohort 1000 --rounds 20 --out runs/stress
      subfleet stress --clients 1e5 --cohort 1e4 --set model.name=leaf_cnn --json
    """
    if local and address is not None:
        raise InputError(f"--local and --address {address} exclude each other; give one of them")
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: is below 1; give the rounds that count, e.g. 5")
    if minutes is not None and not minutes > 0:
        raise InputError(f"--minutes {minutes:g}: is not above 0; give e.g. 10, or leave it out")
    where = out if out is not None else _new_folder()
    if (where / "stress.json").exists():
        raise InputError(f"--out {where}: holds a ladder already; give another folder")
    from subfleet.cluster.address import check_address
    from subfleet.cluster.stress import Rung, parse_counts, parse_widths

    counts, cohorts = parse_counts("--clients", clients), parse_counts("--cohort", cohort)
    widths = tuple(parse_widths(tiers))
    check_address(address)
    loading(always=True)
    from subfleet.dashboards.ladder_plot import ladder_plot
    from subfleet.ladder import Ladder, climb, write
    from subfleet.platform.runfolder import environment

    ladder = Ladder(
        out=where.absolute(),
        widths=widths,
        rounds=rounds,
        overrides=tuple(overrides or ()),
        local=local,
        address=address,
        minutes=minutes,
    )
    rungs = [Rung(size, n) for size in cohorts for n in counts]
    facts, outcomes = {"environment": environment()}, []
    console = stderr()
    say = _teller(console, rungs, rounds + 2)
    for outcome in climb(ladder, rungs, say):
        outcomes.append(outcome)
        found = write(ladder, outcomes, facts)
        ladder_plot(found["rungs"], where / "stress.png")
        console.print(f"  {_said_of(outcome)}", highlight=False, soft_wrap=True, markup=False)
    if as_json:
        print_json(found)
    else:
        print_ladder(outcomes, local=local)
        typer.echo(f"{where / 'stress.json'}\n{where / 'stress.png'}")
    if not any(outcome.status == "ok" for outcome in outcomes):
        raise typer.Exit(STATUS_NOTHING_WORKED)


def _new_folder() -> Path:
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-stress"


def _teller(console: Console, rungs: Sequence[Rung], rounds: int) -> Callable[[Rung, int], None]:
    """Says how far a rung is: where it begins, and every few seconds."""
    began, said, last = 0.0, 0.0, None

    def say(rung: Rung, done: int) -> None:
        nonlocal began, said, last
        now = time.monotonic()
        if rung != last or now - said > SAY_S:
            began, said, last = began if rung == last else now, now, rung
            number = f"rung {list(rungs).index(rung) + 1} of {len(rungs)}"
            state = f"round {done} of {rounds}" if done else "starting ..."
            if now - began > SAY_S:
                state += f" {now - began:.0f} s"
            console.print(f"{number}: {rung}: {state}", highlight=False, soft_wrap=True)

    return say


def _said_of(outcome: Outcome) -> str:
    """A rung in a line: what gives out first, or why there are no figures."""
    figures = outcome.figures
    if outcome.status == "ok":
        return f"{outcome.rung}: {figures['bottleneck']}, {figures['figure']}"
    return f"{outcome.rung}: {outcome.status}: {outcome.why}"


def print_ladder(outcomes: Sequence[Outcome], *, local: bool) -> None:
    """Two tables that fit 80 columns, of time and of sizes, and a line a rung."""
    done = [outcome for outcome in outcomes if outcome.status == "ok"]
    if done:
        title = "seconds a round, medians"
        print_table([_speed(outcome) for outcome in done], title=title, hide=HIDE)
        title = "peaks of memory, bytes a round, MB"
        print_table([_size(outcome, local=local) for outcome in done], title=title)
    typer.echo("what gives out first:" if done else "no rung ended well:")
    for outcome in outcomes:
        typer.echo(f"  {_said_of(outcome)}")


def _head(outcome: Outcome) -> dict[str, Any]:
    return {"clients": outcome.rung.clients, "cohort": outcome.rung.cohort}


def _speed(outcome: Outcome) -> dict[str, Any]:
    figures = outcome.figures
    parts = figures["parts"]
    rest = sum(seconds for name, seconds in parts.items() if name not in SPEED)
    # Medians of parts may exceed that of the whole by a little.
    seconds = {
        "startup": figures["startup_s"],
        "round": figures["round_s"],
        **{short: parts[name] for name, short in SPEED.items()},
        "rest": max(0.0, rest),
        "overhead": figures["overhead_s"],
    }
    shown = {name: round(float(f"{value:.3g}"), 3) for name, value in seconds.items()}
    return {**_head(outcome), **shown, "clients/s": round(figures["clients_per_s"])}


def _size(outcome: Outcome, *, local: bool) -> dict[str, Any]:
    figures = outcome.figures
    peaks = {role: round(size / 1e6) for role, size in figures["peaks"].items()}
    if local:  # one process is all of it
        peaks = {"memory": peaks["all"]}
    moved = {name: figures[f"bytes_{name}"] for name in ("up", "down")}
    # A figure is not rounded away: 12 clients of a small network send less than 0.1 MB.
    shown = {name: float(f"{size / 1e6:.3g}") for name, size in moved.items()}
    return {**_head(outcome), **peaks, **shown}
