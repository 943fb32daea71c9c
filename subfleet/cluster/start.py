"""Ray for one run: started in this process, or joined at an address; gone at the end."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from subfleet.core.errors import InputError, RunFailed
from subfleet.platform.job import Job
from subfleet.platform.metrics import Observer
from subfleet.platform.runfolder import RunFolder


@dataclass(frozen=True)
class Placement:
    """How many hosts run, and what each reserves of its node."""

    hosts: int
    device: str
    cpus: float
    gpus: float


@contextmanager
def ray_session(address: str | None) -> Iterator[Any]:
    """Ray for the length of the block.

    Without an address Ray runs in this process, without a dashboard and with its
    token authentication left on, and every process of it ends with the block.
    """
    # Before the import: Ray reads these when it is loaded.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        yield ray
        return
    path = os.pathsep.join(p for p in (*sys.path, os.environ.get("PYTHONPATH", "")) if p)
    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        # The user's own modules are importable here; make them so on the hosts.
        "runtime_env": {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    }
    try:
        if address is None:
            ray.init(include_dashboard=False, **options)
        else:
            ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"--address {address}" if address else "starting Ray"
        raise InputError(
            f"{where}: {error}; give the address of a running cluster, "
            "leave --address out to start Ray here, or use --local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def placement(nodes: Sequence[dict[str, Any]], wanted_hosts: int, device: str) -> Placement:
    """Hosts and their shares, counted node by node.

    One host a core, or one a GPU. Hosts leave one core in all to the data tasks
    that feed them; a coordinator reserves nothing.

    >>> node = {"Alive": True, "Resources": {"CPU": 2.0}}
    >>> placement([node], 0, "auto")
    Placement(hosts=2, device='cpu', cpus=0.5, gpus=0.0)
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    cpus = sum(int(resources.get("CPU", 0)) for resources in alive)
    gpus = sum(int(resources.get("GPU", 0)) for resources in alive)
    if device == "cuda" and not gpus:
        raise InputError(
            'run.device = "cuda": no node of the cluster has a GPU; use "auto" or "cpu"'
        )
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    hosts = wanted_hosts or max(1, gpus if on_gpu else cpus)
    # Rounded down to what Ray can count, a ten-thousandth.
    each = max(0, cpus - 1) * 10_000 // hosts / 10_000
    return Placement(
        hosts=hosts,
        device="cuda" if on_gpu else "cpu",
        cpus=min(1.0, each),
        gpus=min(1.0, gpus / hosts) if on_gpu else 0.0,
    )


def run_on_ray(
    job: Job,
    folder: RunFolder,
    observers: Sequence[Observer],
    progress: Observer | None,
    *,
    address: str | None,
    hosts: int,
    device: str,
) -> dict[str, Any]:
    """Runs the job on Ray: a coordinator and its hosts; returns the summary.

    Raises what the coordinator raised, `RunFailed` when it died.
    """
    with ray_session(address) as ray:
        from subfleet.platform.coordinator import follow, start_coordinator
        from subfleet.platform.host import start_hosts

        where = placement(ray.nodes(), hosts, device)
        actors = start_hosts(
            where.hosts,
            job.work,
            job.federation,
            device=where.device,
            cpus=where.cpus,
            gpus=where.gpus,
        )
        coordinator = start_coordinator(job, folder, actors, where.device, list(observers))
        try:
            return follow(coordinator, progress)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, InputError | RunFailed):
                raise cause from None
            raise RunFailed(f"the coordinator failed: {error}") from error
        except ray.exceptions.RayActorError as error:
            raise RunFailed(
                f"the coordinator's process died ({error}); the run folder holds the last "
                "checkpoint: run the same command again with --resume"
            ) from error
        finally:
            for actor in (coordinator, *actors):
                ray.kill(actor)
