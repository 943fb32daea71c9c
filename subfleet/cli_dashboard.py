"""The command `subfleet dashboard`: TensorBoard on a folder of runs."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from contextlib import redirect_stderr
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any
from urllib.request import ProxyHandler, build_opener

import typer

from subfleet.cli_support import DebugOption, reported
from subfleet.core.errors import InputError, RunFailed

HOST = "127.0.0.1"
ANSWER_S = 60.0  # how long TensorBoard may take to read the first runs
_PORTS = range(1, 1 << 16)
# All points of a run and all its pictures, not a sample of them; histograms are large.
_ALL = {"scalars": 1_000_000, "images": 1_000, "histograms": 500}


@reported
def dashboard(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run's folder, or one with runs below it.")
    ],
    port: Annotated[
        int | None, typer.Option(metavar="P", help="Serve on this port; else the first free one.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Show runs in TensorBoard, on this machine alone, until Ctrl-C.

    Runs that are going on are followed. The address is printed once it answers.

    \b
    Examples:
      subfleet dashboard runs
      subfleet dashboard runs/quickstart --port 7007
      subfleet dashboard cells
    """
    if port is not None and port not in _PORTS:
        raise InputError(f"--port {port}: give a number from 1 to {_PORTS[-1]}, or leave it out")
    runs = count_runs(folder)
    typer.echo("starting TensorBoard ...", err=True)
    address = started(folder, port)
    shown = "1 run" if runs == 1 else f"{runs} runs"
    typer.echo(f"TensorBoard shows {shown} of {folder}; Ctrl-C ends it", err=True)
    typer.echo(address)
    threading.Event().wait()  # TensorBoard serves from a thread


def count_runs(folder: Path) -> int:
    """How many runs TensorBoard will find; `InputError` where there is none."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {what}; give the folder of a run, or one with runs below it")
    runs = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    if not runs:
        raise InputError(
            f"{folder}: no run has written anything for TensorBoard there (tb/ in its folder); "
            "give the folder of a run or of a sweep, or start one with --out"
        )
    return len(runs)


def started(folder: Path, port: int | None) -> str:
    """Starts TensorBoard in threads of this process; its address, once it answers with runs.

    Raises `InputError` for a port that cannot be had.
    """
    # A proxy, where one is set, would be asked for TensorBoard's own second process.
    os.environ.setdefault("no_grpc_proxy", "localhost")
    from tensorboard import program
    from tensorboard.util import tb_logging

    tb_logging.get_logger().setLevel("ERROR")  # it advertises what it was not given
    board = program.TensorBoard()
    try:
        with redirect_stderr(io.StringIO()):
            board.configure(
                logdir=str(folder),
                host=HOST,
                port=port,
                reload_interval=2,  # seconds
                samples_per_plugin=_ALL,
                window_title=f"subfleet: {folder}",
            )
            address = board.launch()
    except program.TensorBoardPortInUseError:
        raise InputError(
            f"--port {port}: another program has it; give another, or leave --port out to have "
            "a free one found"
        ) from None
    except program.TensorBoardServerException as error:
        raise InputError(f"--port {port}: {error.msg}; leave --port out") from None
    wait_for_runs(address)
    return address


def wait_for_runs(address: str) -> None:
    """Waits until TensorBoard at this address has read a run; `RunFailed` after a minute."""
    opener = build_opener(ProxyHandler({}))
    until = time.monotonic() + ANSWER_S
    while time.monotonic() < until:
        try:
            with opener.open(f"{address}data/runs", timeout=5.0) as answer:
                found: Any = json.load(answer)
            if found:
                return
        except (OSError, HTTPException, ValueError):
            pass  # it is still starting, and may hang up or answer by half
        time.sleep(0.1)
    raise RunFailed(f"TensorBoard at {address} does not answer after {ANSWER_S:g} s")
