"""Run folders fetched from a cluster through its job server, which is the one door it has.

A second job packs the folder and writes it to its log; here it is unpacked. Checkpoints and
the clients' own states stay there: they are large, and of use where the run may go on.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import sys
import tarfile
from pathlib import Path
from secrets import token_hex

from subfleet.cluster.jobs import FETCH, JobInfo, JobServer, exit_status
from subfleet.cluster.submit import code, quoted
from subfleet.core.errors import InputError, RunFailed

STAYS = ("checkpoints", "kept")
NO_RUN = 3  # the exit status of a job that finds no run to fetch
REFUSED = 2  # of a run whose input is wrong
_ROUND = re.compile(r"\bround \d+/\d+")  # how a run's log says that something was trained
_LINE = 1 << 16
_ARCHIVE = re.compile(r"<subfleet archive ([0-9a-f]{64})>\s(.*?)<end of archive>", re.DOTALL)


def check_free(target: Path) -> None:
    """InputError where a fetched folder would meet files."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target}: is there already; give a folder that is not, or an empty one")


class NoRun(RunFailed):
    """There is no run in the folder."""


def refused(server: JobServer, job: JobInfo) -> bool:
    """Whether a job ended before it trained anything, for its input was wrong.

    What lies in its folder, if anything, is another job's run: that it was is such an input.
    """
    return exit_status(job) == REFUSED and not _ROUND.search(server.log(job.id))


def fetch(server: JobServer, folder: str, target: Path) -> None:
    """Brings a run folder of the cluster to `target` here.

    Raises `NoRun` where there is none, `RunFailed` where it cannot be read, or came damaged.
    """
    check_free(target)
    id = f"{FETCH}{token_hex(4)}"
    with code() as package:
        server.submit(
            id,
            f"python -m subfleet.cluster.fetch {quoted(folder)}",
            runtime_env={"py_modules": [package]},
            metadata={"subfleet": "fetch"},
        )
    job = server.ended(id)
    log = server.log(id)
    server.client.delete_job(id)
    if (status := exit_status(job)) == NO_RUN:
        raise NoRun(f"{folder} at {server.address} holds no run; nothing is fetched")
    if status:
        last = (log.strip().splitlines() or [job.message])[-1]
        raise RunFailed(f"{folder} cannot be fetched from {server.address} ({status}): {last}")
    unpack(log, target)


def pack(folder: Path) -> str:
    """A folder as text, without what stays."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for item in sorted(folder.iterdir()):
            if item.name not in STAYS:
                archive.add(item, arcname=item.name)
    data = buffer.getvalue()
    text = base64.b64encode(data).decode()
    lines = [text[at : at + _LINE] for at in range(0, len(text), _LINE)]
    return "\n".join(
        [f"<subfleet archive {hashlib.sha256(data).hexdigest()}>", *lines, "<end of archive>"]
    )


def unpack(text: str, target: Path) -> None:
    """The folder that `pack` made a text of; RunFailed where that is not whole."""
    found = _ARCHIVE.search(text)
    try:
        data = base64.b64decode(found[2] if found else "")
    except ValueError:  # no multiple of four characters
        data = b""
    if found is None or hashlib.sha256(data).hexdigest() != found[1]:
        raise RunFailed(
            f"what came for {target} is damaged; `subfleet jobs fetch` fetches it again"
        )
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            archive.extractall(target, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise RunFailed(f"{target}: cannot be written ({error}); give another folder") from error


if __name__ == "__main__":
    there = Path(sys.argv[1])
    if not (there / "config.toml").is_file():
        sys.exit(NO_RUN)
    print(pack(there), flush=True)
