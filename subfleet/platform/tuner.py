"""Who decides how each variant is computed, and writes it into the engine record.

Before a variant is first sent out, a host tries a few ways on some of its clients; what
they return is thrown away. The fastest goes into the record, and into a file, so that the
next run on such a machine need not try again. Compiled steps are tried by a process
beside the run, and take over at a round's boundary. Out of memory halves the clients side
by side, from the round on that is run again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from subfleet.core.algorithm import Phase, RoundPlan
from subfleet.core.errors import InputError, RunFailed
from subfleet.core.folders import cache_folder
from subfleet.core.program import ClientProgram, ClientTask, LossProgram
from subfleet.platform.aside import Aside
from subfleet.platform.bundles import Trial
from subfleet.platform.executor import Executor
from subfleet.platform.files import json_bytes, write_atomic
from subfleet.platform.job import Job
from subfleet.platform.record import (
    CLEARLY,
    Choice,
    candidates,
    fastest,
    possible,
    variant_name,
)
from subfleet.platform.runfolder import RunFolder

TRIALS = 3  # the version of what a trial does; times of another are no use
MOST_TRIED = 3  # variants; the others go by the one nearest in arithmetic


class Tuner:
    """The engine record of a run, and how it grows in the run's folder."""

    def __init__(self, job: Job, executor: Executor, folder: RunFolder):
        self.net, self.executor, self.options = job.work.net, executor, job.options
        self.record, self._folder = job.record, folder
        self._aside = Aside(job.work, job.federation, executor.device)
        self._compiling: dict[str, Future[list[float]]] = {}
        self._files = cache_folder() / "trials"
        self._phase_name = lru_cache(lambda round: job.work.algorithm.phase(round).name)

    def choices(
        self,
        phase: Phase,
        plan: RoundPlan,
        round: int,
        tell: Callable[[int, int], None] = lambda done, variants: None,
    ) -> dict[str, Choice]:
        """How each variant of a plan is computed; written down before it is sent out.

        `tell` hears how many of the variants that are tried out are done.
        """
        ways = possible(self.net, phase.program)
        tasks: dict[str, list[ClientTask]] = {}
        for task in plan.tasks:
            tasks.setdefault(variant_name(task.variant), []).append(task)
        held = {name: self._held(name, round) for name in sorted(tasks)}
        for name, choice in held.items():
            if choice is not None and choice.way not in ways:
                raise InputError(
                    f"engine record: variant {name} has way={choice.way!r}, but this experiment's "
                    f"clients can be computed by {', '.join(sorted(ways))} alone; give a record of "
                    "this experiment"
                )
        new = [name for name, choice in held.items() if choice is None]
        if new:
            some = {name: tasks[name] for name in new}
            self._extend(self._chosen(some, phase, plan, round, tell))
            self._compile(new, tasks, plan, round)
        return {name: self._at(name, round) for name in held}

    def close(self) -> None:
        """Ends the process beside, if there is one."""
        self._aside.close()

    # -- compiled steps

    def _compile(
        self,
        names: Sequence[str],
        tasks: Mapping[str, list[ClientTask]],
        plan: RoundPlan,
        round: int,
    ) -> None:
        """Begins to compile variants that are new, beside the run; so many at most."""
        if not self.options.compile:
            return
        for name in names[: MOST_TRIED - len(self._compiling)]:
            choice = self._at(name, round)
            if choice.way != "loop" and not choice.compiled:
                some = tuple(tasks[name][: max(2, choice.side_by_side)])
                trial = Trial(0, round, some, (choice, replace(choice, compiled=True)))
                self._compiling[name] = self._aside.start(trial, plan.shared)

    def settle(self, round: int) -> list[str]:
        """Between two rounds: what was compiled meanwhile holds from `round` on, if it pays.

        What there is to say about steps that do not.
        """
        told = []
        for name in [name for name, trial in self._compiling.items() if trial.done()]:
            trial, choice = self._compiling.pop(name), self._held(name, round)
            if choice is None:  # its phase is over
                continue
            if (error := trial.exception()) is not None:
                told.append(f"engine: {name} is not compiled: {error}")
                continue
            before, after = trial.result()
            if after > CLEARLY * before:
                told.append(
                    f"engine: {name} stays as it is: {1e3 * after:.3g} ms a client's step "
                    f"compiled, {1e3 * before:.3g} not"
                )
                continue
            why = f"{1e3 * after:.3g} ms a client's step beside the run; {1e3 * before:.3g} before"
            self._extend([replace(choice, compiled=True, from_round=round, reason=why)])
        return told

    def narrow(self, variant: str, round: int) -> None:
        """After a device ran out of memory: half as many clients side by side from now on."""
        choice = self._at(variant, round)
        if choice.side_by_side < 2:
            raise RunFailed(
                f"round {round}: a single client of variant {variant} does not fit into the memory "
                f"of the {choice.device} device; lower run.hosts or train.batch_size, or give its "
                "tier a smaller width"
            )
        half = choice.side_by_side // 2
        why = f"out of memory with {choice.side_by_side} side by side"
        # Steps compiled for the old width, or just being compiled, are of no use any more.
        self._compiling.pop(variant, None)
        less = replace(choice, side_by_side=half, compiled=False, from_round=round, reason=why)
        self._extend([less])

    def _held(self, variant: str, round: int) -> Choice | None:
        """What was chosen in a round of the same phase: other phases compute something else."""
        phase = self._phase_name(round)
        return self.record.at(
            variant, self.executor.device, round, lambda other: self._phase_name(other) == phase
        )

    def _at(self, variant: str, round: int) -> Choice:
        choice = self._held(variant, round)
        assert choice is not None
        return choice

    def _extend(self, choices: Sequence[Choice]) -> None:
        self.record = self.record.extended(choices)
        self._folder.write_record(self.record)

    # -- trying out

    def _chosen(
        self,
        tasks: Mapping[str, list[ClientTask]],
        phase: Phase,
        plan: RoundPlan,
        round: int,
        tell: Callable[[int, int], None],
    ) -> list[Choice]:
        options, ways = self.options, possible(self.net, phase.program)
        worth = {
            name: candidates(
                self.net,
                some[0].variant,
                self.executor.device,
                options.engine,
                options.dtype,
                ways=ways,
                round=round,
            )
            for name, some in tasks.items()
        }
        if all(len(choices) == 1 for choices in worth.values()) or options.engine != "auto":
            return [choices[0] for choices in worth.values()]
        macs = {name: self.net.cost(some[0].map).macs for name, some in tasks.items()}
        order = sorted(worth, key=lambda name: (macs[name], name))
        some, tried = _spread(order, MOST_TRIED), {}
        for name in some:
            tell(len(tried), len(some))
            tried[name] = self._best(tasks[name], worth[name], phase, plan, round)
        return [
            _like(worth[name], tried[min(tried, key=lambda t: (abs(macs[t] - macs[name]), t))])
            for name in worth
        ]

    def _best(
        self,
        tasks: Sequence[ClientTask],
        worth: Sequence[Choice],
        phase: Phase,
        plan: RoundPlan,
        round: int,
    ) -> Choice:
        """The fastest of the choices, or the first where no other is clearly faster."""
        file = self._files / f"{self._fingerprint(tasks[0], worth, phase)}.json"
        seconds = _read(file, len(worth))
        if seconds is None:
            widest = max(choice.side_by_side for choice in worth)
            trial = Trial(0, round, tuple(tasks[: max(widest, 2)]), tuple(worth))
            (result,) = self.executor.run([trial], plan.shared)
            seconds = result.table["seconds"].tolist()
            with suppress(OSError):  # a cache that cannot be written is none
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, json_bytes(seconds))
        best = fastest(seconds)
        others = ", ".join(
            f"{choice.name} {1e3 * s:.3g}"
            for i, (choice, s) in enumerate(zip(worth, seconds, strict=True))
            if i != best
        )
        why = f"{1e3 * seconds[best]:.3g} ms a client's step; {others}"
        return replace(worth[best], reason=why)

    def _fingerprint(self, task: ClientTask, worth: Sequence[Choice], phase: Phase) -> str:
        """What the times of a trial depend on."""
        device = self.executor.device
        machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
        told: list[Any] = [
            *(machine, os.cpu_count(), torch.__version__, self.net.name, task.variant),
            *(self.net.cost(task.map), _told(phase.program), self.net.input_shape),
            *(phase.reduction, task.num_samples.bit_length(), TRIALS),
            [asdict(replace(choice, from_round=1)) for choice in worth],
        ]
        return hashlib.sha256(repr(told).encode()).hexdigest()[:32]


def _told(program: ClientProgram) -> str:
    """A program in words that do not change from process to process."""
    if isinstance(program, LossProgram):
        function = program.loss
        name = f"{function.__module__}.{getattr(function, '__qualname__', type(function))}"
        rule = replace(program.rule, lr=1.0, schedule=None)  # no step takes longer for these
        return f"{name} {rule} {program.stream} {program.finish is None}"
    return f"{type(program).__name__} {getattr(program, 'streams', '')}"


def _spread(names: Sequence[str], most: int) -> list[str]:
    """At most `most` of the names, the first and the last among them.

    >>> _spread("abcdefg", 3)
    ['a', 'd', 'g']
    """
    if len(names) <= most:
        return list(names)
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _like(worth: Sequence[Choice], tried: Choice) -> Choice:
    """The choice for a variant that goes by another's trial."""
    alike = [choice for choice in worth if choice.way == tried.way]
    found = next((c for c in alike if c.products == tried.products), (alike or worth)[0])
    same = found.variant == tried.variant
    return tried if same else replace(found, reason=f"as variant {tried.variant}")


def _read(file: Path, count: int) -> list[float] | None:
    try:
        seconds = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(seconds, list) or len(seconds) != count:
        return None
    seconds = [float("inf") if s is None else s for s in seconds]  # what did not fit
    return seconds if all(isinstance(s, float) and s > 0 for s in seconds) else None
