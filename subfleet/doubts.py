"""Settings that are allowed, and yet do not do what they seem to: warnings before round 1."""

from __future__ import annotations

from subfleet.config import Experiment, RunTable
from subfleet.core.program import LossProgram
from subfleet.platform.job import Job
from subfleet.platform.record import possible


def doubts(experiment: Experiment, job: Job) -> list[str]:
    """In words, for the platform, the algorithm and the engine."""
    return [
        *_of_the_fleet(experiment, job),
        *job.work.algorithm.doubts(),
        *_of_the_start(experiment, job),
        *_of_the_engine(experiment, job),
        *_of_the_cohort(experiment, job),
    ]


def _of_the_start(experiment: Experiment, job: Job) -> list[str]:
    wanted = job.work.algorithm.builds_on
    if not wanted or job.start is not None:
        return []
    return [
        f"run.start_from is not set, and {experiment.algorithm.name} expects {wanted}: it begins "
        "with weights drawn at random"
    ]


def _of_the_fleet(experiment: Experiment, job: Job) -> list[str]:
    doubts, net = [], job.work.net
    cut = [tier.name for tier in experiment.fleet.tiers if tier.width not in (None, 1.0)]
    if cut and not job.work.net.elastic:
        doubts.append(
            f"the width of tier {', '.join(cut)} has no effect: {experiment.model.name} has no "
            "units that can be left out, so every tier trains all of it"
        )
    for name, stated, elastic in (
        ("depth", [t for t in experiment.fleet.tiers if t.depth < 1], job.work.net.stages),
        ("kernel", [t for t in experiment.fleet.tiers if t.kernel], job.work.net.space.kernels),
    ):
        if stated and not elastic:
            doubts.append(
                f"the {name} of tier {', '.join(tier.name for tier in stated)} has no effect: "
                f"{experiment.model.name} is not elastic in it"
            )
    unused = {"deadline": None, "over_select": 1.0}
    for name in (n for n, v in unused.items() if getattr(experiment.run, n) != v):
        if job.devices is None:
            doubts.append(
                f"run.{name} = {getattr(experiment.run, name):g} has no effect: no device has a "
                "profile, so nobody is late; say in [fleet.device] what devices can do"
            )
    if net.uncounted:
        doubts.append(
            f"costs of {experiment.model.name} leave out {', '.join(net.uncounted[:3])}: its "
            "flops are too low"
        )
    return doubts


def _of_the_cohort(experiment: Experiment, job: Job) -> list[str]:
    doubts = []
    if job.work.algorithm.pools and experiment.run.cohort != RunTable().cohort:
        doubts.append(
            f"run.cohort = {experiment.run.cohort} has no effect: {experiment.algorithm.name} "
            "trains on one pool of all training clients' rows"
        )
    held_out = len(job.split[1])
    wanted = experiment.run.eval_clients
    if held_out and wanted > held_out and wanted != RunTable().eval_clients:
        doubts.append(
            f"run.eval_clients = {wanted}, and {held_out} clients are held out: "
            "accuracy is measured on these"
        )
    return doubts


def _of_the_engine(experiment: Experiment, job: Job) -> list[str]:
    """Ways of computing clients that are asked for and not possible."""
    run, doubts = experiment.run, []
    program = job.work.algorithm.phase(1).program
    ways = possible(job.work.net, program)
    what = f"{experiment.algorithm.name} on {experiment.model.name}"
    if run.engine not in ("auto", *ways):
        doubts.append(
            f'run.engine = "{run.engine}" has no effect: clients of {what} can be computed by '
            f"{', '.join(sorted(ways))} alone"
        )
    if run.compile and (not isinstance(program, LossProgram) or ways == {"loop"}):
        why = (
            "takes its gradients itself, and only the engine's own steps are compiled"
            if not isinstance(program, LossProgram)
            else "has recurrent layers, which are not compiled"
        )
        doubts.append(f"run.compile = true has no effect: {what} {why}")
    return doubts
