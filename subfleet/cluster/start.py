"""Ray for one run: started in this process, or joined at an address; gone at the end."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from subfleet.cluster.address import check_address, loaded_ray
from subfleet.core.errors import InputError, RunFailed
from subfleet.platform.files import last_checkpoint
from subfleet.platform.job import Job
from subfleet.platform.metrics import Observer, tell
from subfleet.platform.placement import placement
from subfleet.platform.ray_executor import brief
from subfleet.platform.runfolder import RunFolder
from subfleet.platform.signals import terminable

ROOM_S = 300.0  # how long nodes may take to join
ZIPPED_STDLIB = f"/python{sys.version_info.major}{sys.version_info.minor}.zip"


def ray_started() -> bool:
    """Whether this process has a Ray session already."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


@contextmanager
def ray_session(address: str | None) -> Iterator[Any]:
    """Ray for the length of the block.

    Without an address Ray runs in this process, without a dashboard and with its
    token authentication left on, and every process of it ends with the block. A
    SIGTERM unwinds the block too, then ends the process with status 143.

    Raises `InputError` when nobody answers at the address.
    """
    ray = loaded_ray()
    if ray.is_initialized():
        yield ray
        return
    check_address(address)
    try:
        # Ray prints what befalls its processes; our standard output is for results.
        with terminable() as take_sigterm, redirect_stdout(sys.stderr):
            _connect(ray, address)
            take_sigterm()
            yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    # The user's own modules are importable here; make them so on the hosts.
    variables = {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"}
    try:
        if address is None:
            # Handed down, not given as a runtime environment: that would leave the workers
            # which Ray starts ahead unused, and cost two seconds.
            with _environment(variables):
                ray.init(address="local", include_dashboard=False, **options)
        else:
            ray.init(address=address, runtime_env={"env_vars": variables}, **options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if address is None:
            raise RunFailed(
                f"Ray does not start: {brief(error)}; use --local, or name a running cluster "
                "with --address"
            ) from error
        if "Version mismatch" in str(error):
            raise InputError(
                f"--address {address}: {' '.join(str(error).split())}; install the same versions "
                "of Ray and Python here and on all nodes (constraints.txt pins Ray)"
            ) from error
        raise InputError(
            f"--address {address}: {brief(error)}; give the address that `ray start` printed, on "
            "a machine of the cluster, with the cluster's token in ~/.ray/auth_token or in "
            "RAY_AUTH_TOKEN"
        ) from error


def _python_path() -> str:
    """The folders to import from, without Python's own and its packages."""
    own = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    own |= {f"{path}/lib-dynload" for path in own}
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys(path for path in (*sys.path, *given) if path and path not in own)
    return os.pathsep.join(path for path in paths if not path.endswith(ZIPPED_STDLIB))


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Environment variables for what is started within the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class CoordinatorLost(RunFailed):
    """The coordinator's process died; what it had saved is there."""


def run_on_ray(
    job: Job,
    folder: RunFolder,
    observers: Sequence[Observer],
    progress: Observer | None,
    *,
    address: str | None,
    hosts: int,
    device: str,
    restarts: int = 0,
) -> dict[str, Any]:
    """Runs the job on Ray: a coordinator and its hosts; returns the summary.

    A coordinator whose process dies is started again up to `restarts` times, and goes on
    from the newest checkpoint. Raises what the coordinator raised, `RunFailed` when it died
    once too often.
    """
    with ray_session(address) as ray:
        _wait_for_room(ray, progress)
        for again in range(1, restarts + 2):
            try:
                return _coordinated(ray, job, folder, observers, progress, hosts, device)
            except CoordinatorLost:
                if again > restarts:
                    raise
                if progress is not None:
                    newest = last_checkpoint(folder.metrics)
                    begin = "the start" if newest is None else newest.name
                    words = f"the coordinator's process died; going on from {begin}"
                    tell([progress], f"{words} (restart {again} of {restarts})")
    raise AssertionError  # every turn returns or raises


def _wait_for_room(ray: Any, progress: Observer | None) -> None:
    """Waits for a node with a core: a job may begin before the nodes of its cluster are there."""
    until = time.monotonic() + ROOM_S
    told = False
    while not placement(ray.nodes(), 0, "auto").hosts:
        if time.monotonic() > until:
            raise RunFailed(
                f"no node of the cluster has had a core to train on for {ROOM_S:g} s; add nodes "
                "(`ray status` shows them), or start the head without --num-cpus=0"
            )
        if progress is not None and not told:
            tell([progress], "waiting for nodes: none has a core yet")
            told = True
        time.sleep(1.0)


def _coordinated(
    ray: Any,
    job: Job,
    folder: RunFolder,
    observers: Sequence[Observer],
    progress: Observer | None,
    wanted_hosts: int,
    device: str,
) -> dict[str, Any]:
    from subfleet.cluster.operators import OperatorMetrics
    from subfleet.platform.coordinator import follow, start_coordinator
    from subfleet.platform.host import Hosts

    hosts = Hosts(job.work, job.federation, wanted=wanted_hosts, device=device)
    watching = [*observers, OperatorMetrics()]
    coordinator = start_coordinator(job, folder, hosts, watching, progress is not None)
    try:
        return follow(coordinator, progress)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, InputError | RunFailed):
            raise cause from None
        raise RunFailed(
            f"the coordinator failed: {brief(error)}; run with --local --debug to see where"
        ) from error
    except ray.exceptions.RayActorError as error:
        if error.actor_init_failed:
            raise RunFailed(f"the coordinator cannot start: {brief(error)}") from error
        remedy = (
            "the run folder holds what was finished: run the same command again with --resume, "
            "or give --restarts"
            if folder.begun
            else "no round was finished: free memory, or set fewer run.hosts, and start again"
        )
        raise CoordinatorLost(
            f"the coordinator's process died, as it does when memory runs out; {remedy}"
        ) from error
    finally:
        ray.kill(coordinator)
        hosts.kill()
