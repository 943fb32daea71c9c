"""The job server of a Ray cluster: asked about its jobs, followed, stopped, over HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from subfleet.core.errors import InputError, RunFailed
from subfleet.platform.ray_executor import brief

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ANSWER_S = 5.0  # how long a server may take to answer a knock
POLL_S = 0.5
FETCH = "subfleet-fetch-"  # how the ids of jobs begin that fetch a folder
TOLD_S = 2.0  # in which a failed job's exit status follows
_HOST_PORT = re.compile(r"[\w.-]+:\d+")
STOPPED = 143  # of a job that was stopped before it told its own status, as after SIGTERM


@dataclass(frozen=True)
class JobInfo:
    """A job of the cluster; times are seconds since 1970, None before they are known."""

    id: str
    status: str
    entrypoint: str
    started: float | None
    ended: float | None
    exit_status: int | None
    message: str
    metadata: dict[str, str]

    @property
    def over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


class JobServer:
    """The job server at an address such as http://HEAD:8265.

    Raises `InputError` within seconds where none answers, where it refuses the token, and
    where the cluster runs another version of Ray than this process.
    """

    def __init__(self, address: str):
        self.address = checked(address)
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # These would replace the address that was given.
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
            os.environ.pop(name, None)
        self.client = self._connected()

    def _connected(self) -> JobSubmissionClient:
        import ray
        import requests
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        # What they say of packages and sockets is Ray's own affair.
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.ERROR)
        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
        logging.getLogger("ray._private.runtime_env.packaging").setLevel(logging.WARNING)
        try:
            # The client itself would wait for ever; whether the token is right, it says.
            requests.get(f"{self.address}/api/version", timeout=ANSWER_S)
            client = JobSubmissionClient(self.address)
            version = client._do_request("GET", "/api/version", timeout=ANSWER_S).json()
        except AuthenticationError as error:
            raise InputError(
                f"--address {self.address}: the cluster wants its token, and here is none, or "
                "another one; put it into ~/.ray/auth_token or RAY_AUTH_TOKEN "
                "(`ray get-auth-token` on the head shows it)"
            ) from error
        except (ConnectionError, RuntimeError, ValueError, requests.RequestException) as error:
            # Of what speaks another protocol requests quotes the bytes.
            broken = isinstance(error, requests.ConnectionError)
            why = "it does not speak HTTP" if broken else error
            raise InputError(
                f"--address {self.address}: what answers is no job server of Ray ({why}); give "
                "the dashboard's address, http://HEAD:8265 by default"
            ) from error
        there = version["ray_version"]
        if there != ray.__version__:
            raise InputError(
                f"--address {self.address}: the cluster runs Ray {there}, this is Ray "
                f"{ray.__version__}; install the same version on both (constraints.txt pins it)"
            )
        return client

    def submit(
        self, id: str, entrypoint: str, *, runtime_env: dict[str, Any], metadata: dict[str, str]
    ) -> None:
        """Submits a command as a job. InputError where the cluster does not take it."""
        try:
            self.client.submit_job(
                entrypoint=entrypoint,
                submission_id=id,
                runtime_env=runtime_env,
                metadata=metadata,
            )
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.address} does not take the job {id}: {brief(error)}"
            ) from error

    def jobs(self) -> list[JobInfo]:
        """All jobs that were submitted, the newest first, without those that fetch folders."""
        found = [_told(one) for one in self.client.list_jobs() if one.submission_id]
        # Ray may write a job down once more just after it was deleted.
        found = [job for job in found if not job.id.startswith(FETCH)]
        return sorted(found, key=lambda job: -(job.started or 0.0))

    def job(self, id: str) -> JobInfo:
        """One job; `InputError` names those that there are where it is unknown."""
        if (job := self.find(id)) is not None:
            return job
        known = ", ".join(job.id for job in self.jobs()[:5]) or "none"
        raise InputError(f"job {id!r}: {self.address} knows no such job; it knows {known}")

    def find(self, id: str) -> JobInfo | None:
        """The job of this id, None where there is none."""
        try:
            return _told(self.client.get_job_info(id))
        except RuntimeError:
            return None

    def log(self, id: str) -> str:
        """All that a job has written so far."""
        self.job(id)
        return self.client.get_job_logs(id)

    def follow(self, id: str, write: Callable[[str], None]) -> JobInfo:
        """Hands on what a job writes until it ends; the job as it ended."""
        self.job(id)

        async def tail() -> None:
            async for lines in self.client.tail_job_logs(id):
                write(lines)

        try:
            asyncio.run(tail())
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            raise self._gone(id, error) from error
        return self.ended(id)

    def ended(self, id: str) -> JobInfo:
        """Waits for a job's end; the job as it ended."""
        while not (job := self.job(id)).over:
            time.sleep(POLL_S)
        until = time.monotonic() + TOLD_S
        while job.status == "FAILED" and job.exit_status is None and time.monotonic() < until:
            time.sleep(POLL_S)  # its exit status may still be on its way
            job = self.job(id)
        return job

    def _gone(self, id: str, error: Exception) -> RunFailed:
        return RunFailed(
            f"{self.address} does not answer any more while job {id} runs ({brief(error)}): the "
            "cluster's head may be lost. Once there is one again, submit with the same --out, "
            "and the run goes on from its newest checkpoint"
        )

    def stop(self, id: str, *, wait_s: float = 60.0) -> JobInfo:
        """Asks a job to end, as by SIGTERM, and waits until it has."""
        if not self.job(id).over:
            self.client.stop_job(id)
        until = time.monotonic() + wait_s
        while not (job := self.job(id)).over and time.monotonic() < until:
            time.sleep(POLL_S)
        return job


def exit_status(job: JobInfo) -> int:
    """What a command that followed a job ends with: the job's own status.

    Ray's own command gives 1 for any failure.
    """
    if job.status == "SUCCEEDED":
        return 0
    if job.exit_status is not None and job.exit_status > 0:
        return job.exit_status
    if job.exit_status is not None and job.exit_status < 0:
        return 128 - job.exit_status  # ended by a signal, as shells tell it
    return STOPPED if job.status == "STOPPED" else 1


def checked(address: str) -> str:
    """The address, when somebody answers there; Ray itself would try for minutes."""
    parts = urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        port = 0
    web = parts.scheme in ("http", "https") and not parts.path.strip("/")
    if not web or not parts.hostname or not port:
        meant = f"http://{address}" if _HOST_PORT.fullmatch(address) else "http://HEAD:8265"
        raise InputError(
            f"--address {address}: is not of the form http://HOST:PORT; give the address of the "
            f"cluster's dashboard, such as {meant}, or leave --address out for that of this machine"
        )
    try:
        with socket.create_connection((parts.hostname, port), timeout=ANSWER_S):
            return address.rstrip("/")
    except OSError as error:
        raise InputError(
            f"--address {address}: nobody answers there ({error}); check host and port, and that "
            "`ray start --head` runs there with its dashboard"
        ) from error


def _told(details: Any) -> JobInfo:
    return JobInfo(
        id=details.submission_id,
        status=str(getattr(details.status, "value", details.status)),
        entrypoint=details.entrypoint,
        started=details.start_time and details.start_time / 1000,
        ended=details.end_time and details.end_time / 1000,
        exit_status=details.driver_exit_code,
        message=details.message or "",
        metadata=dict(details.metadata or {}),
    )
