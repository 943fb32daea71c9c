"""The engine: runs a bundle's clients and sums what they return.

It knows torch, NumPy and the core types; neither Ray nor where data come from.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from time import perf_counter, process_time

import numpy as np
import torch
from torch import Tensor

from subfleet.core import aggregate
from subfleet.core.algorithm import Algorithm, Collected
from subfleet.core.program import (
    ClientProgram,
    ClientResult,
    ClientTask,
    LossProgram,
    Params,
    RunProgram,
    StepProgram,
)
from subfleet.core.scaling import Scaling
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.platform import evaluation, loop, mapped
from subfleet.platform import own as own_networks
from subfleet.platform.bundles import (
    BundleResult,
    EvalBundle,
    TrainBundle,
    Trial,
    flops,
    kept_units,
)
from subfleet.platform.chunks import Chunk, Rows, Trained
from subfleet.platform.memory import OutOfMemory, charged_to, keep_freed_memory
from subfleet.platform.record import Choice, candidates, variant_name
from subfleet.platform.resident import Resident, finite

RESIDENTS = 64  # networks kept between calls: where every client has its own shape, few return
TRIAL_STEPS = 4  # of each client; enough to tell ways apart by more than the noise
OK, SKIPPED = "ok", "skipped"  # skipped: its training was not finite


@dataclass(frozen=True)
class Work:
    """What every host of a run has: the network, the algorithm, and the data's scale."""

    net: SuperNetwork
    algorithm: Algorithm
    scale: Scaling
    seed: int


def parts_needed(program: LossProgram | StepProgram | RunProgram, local_test: bool) -> set[str]:
    """The parts of a client's data that a program reads.

    A `RunProgram` may ask for any part: "val" is empty where the data have none.
    """
    if isinstance(program, LossProgram):
        parts = {program.stream.part}
    elif isinstance(program, StepProgram):
        parts = {stream.part for stream in program.streams.values()}
    else:
        parts = {"train", "val", "test"}
    return parts | ({"test"} if local_test else set())


class Engine:
    """Runs bundles on one device, keeping each variant's network between calls."""

    def __init__(self, work: Work, device: str):
        self.work = work
        self.device = device
        self._residents: OrderedDict[Choice, Resident] = OrderedDict()
        if device == "cpu":
            torch.set_num_threads(1)
            keep_freed_memory()
        else:
            # cuBLAS is deterministic with a workspace of fixed size only; torch insists on it.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False

    def resident(self, map: IndexMap, choice: Choice) -> Resident:
        """The network of a variant, built on first use; the last `RESIDENTS` are kept."""
        key = replace(choice, from_round=1, reason="")
        if key not in self._residents:
            self._residents[key] = Resident(self.work.net, map, choice)
            if len(self._residents) > RESIDENTS:
                self._residents.popitem(last=False)
        self._residents.move_to_end(key)
        return self._residents[key]

    def train(
        self, bundle: TrainBundle, blocks: Mapping[str, Rows], shared: Mapping[int, Params]
    ) -> BundleResult:
        """Trains a bundle's clients and returns their partial sum, in client order."""
        phase = self.work.algorithm.phase(bundle.round)
        program, collect = phase.program, phase.reduction == "collect"
        started = perf_counter()
        tally = _Tally(self.work.net, program, len(bundle.tasks), collect=collect)
        sums = isinstance(program, LossProgram) and program.finish is None and not collect
        for variant, positions in bundle.chunks():
            tasks = [bundle.tasks[i] for i in positions]
            choice = bundle.choices[variant_name(variant)]
            own = [self._own(bundle, i) for i in positions]
            chunk = Chunk(
                net=self.work.net,
                program=program,
                choice=choice,
                tasks=tasks,
                positions=positions,
                blocks=blocks,
                own=own,
                shared=shared,
                seed=self.work.seed,
                round=bundle.round,
                scale=self.work.scale,
                sums=sums,
            )
            resident = self.resident(tasks[0].map, choice)
            way = mapped if choice.way == "vmap" else loop
            clock = perf_counter()
            with charged_to(choice.variant, choice.device):
                for task, position, trained in zip(
                    tasks, positions, way.run(chunk, resident), strict=True
                ):
                    seconds = perf_counter() - clock
                    tested = None
                    if bundle.local_test and trained.healthy and (network := trained.network):
                        rows = evaluation.rows_of(blocks["test"], position)
                        tested = evaluation.score(resident, network, *rows, self.work.scale)
                    tally.add(task, position, trained, seconds, tested)
                    clock = perf_counter()
                tally.settle()
        return tally.result(bundle.number, {"train": perf_counter() - started})

    def trial(
        self, trial: Trial, blocks: Mapping[str, Rows], shared: Mapping[int, Params]
    ) -> BundleResult:
        """Seconds that one step of one client takes by each choice: the table's "seconds".

        Infinity for a choice that the device has not enough memory for.
        """
        # Programs stay as they are: how weights are held goes by the steps that there will be.
        tasks = tuple(replace(task, steps=TRIAL_STEPS) for task in trial.tasks)
        bundles = [
            TrainBundle(
                *(trial.number, trial.round, tasks[: max(2, choice.side_by_side)]),
                *({choice.variant: choice}, 0.0),
            )
            for choice in trial.choices
        ]
        # The first time traces, and warms up. Then in turns: what disturbs only ever slows, and
        # it disturbs most at a run's start, while other processes begin.
        turns = [[self._step_seconds(b, blocks, shared) for b in bundles] for _ in range(3)]
        return BundleResult(trial.number, {"seconds": np.min(turns[1:], axis=0)}, {})

    def _step_seconds(
        self, bundle: TrainBundle, blocks: Mapping[str, Rows], shared: Mapping[int, Params]
    ) -> float:
        # The processor's seconds, since others may run beside; a GPU's only the clock knows.
        clock = process_time if self.device == "cpu" else perf_counter
        started = clock()
        try:
            result = self.train(bundle, blocks, shared)
        except OutOfMemory:
            return float("inf")
        return (clock() - started) / max(1, int(result.table["steps"].sum()))

    def _own(self, bundle: TrainBundle, position: int) -> Params | None:
        if not self.work.algorithm.keeps:
            return None
        held = bundle.own[position] if bundle.own else None
        if held is None:
            return self.work.algorithm.initial_kept(bundle.tasks[position])
        return {name: torch.as_tensor(value) for name, value in held.items()}

    def evaluate(
        self, bundle: EvalBundle, blocks: Mapping[str, Rows], shared: Mapping[int, Params]
    ) -> BundleResult:
        """Scores every view of the shared tree, and perhaps its own network, on every client."""
        started = perf_counter()
        how = self.work.algorithm.evaluation
        table: dict[str, np.ndarray] = {"client": bundle.ids}
        distinct: dict[bytes, tuple[np.ndarray, ...]] = {}
        for name, map in bundle.views.items():
            if map.key not in distinct:
                variant = self.work.net.space.counts(map)
                choice = self._evaluating(variant, bundle.round)
                net = self.resident(map, choice)
                params = self.work.net.space.extract(shared[0], map)
                adapting = self._adapting(bundle, blocks, shared, map, net, choice)
                with charged_to(choice.variant, choice.device):
                    distinct[map.key] = evaluation.run(
                        *(self.work.net, net, params, how, blocks, bundle.part),
                        *(self.work.scale, adapting),
                    )
            correct, loss, count = distinct[map.key]
            table |= {f"{name}/correct": correct, f"{name}/loss": loss, f"{name}/count": count}
        if bundle.own:
            table |= self._own_networks(bundle, blocks, shared[0])
        return BundleResult(bundle.number, table, {"evaluate": perf_counter() - started})

    def _own_networks(
        self, bundle: EvalBundle, blocks: Mapping[str, Rows], model: Params
    ) -> dict[str, np.ndarray]:
        """Scores every client's own network; clients of equal maps take turns in one."""
        sharing: dict[bytes, list[int]] = {}
        for k, (map, _) in enumerate(bundle.own):
            sharing.setdefault(map.key, []).append(k)
        scores = np.zeros((len(bundle.own), 3))
        for positions in sharing.values():
            map = bundle.own[positions[0]].map
            choice = self._evaluating(self.work.net.space.counts(map), bundle.round)
            with charged_to(choice.variant, choice.device):
                scores[positions] = own_networks.run(
                    *(self.work.algorithm, self.resident(map, choice), bundle, positions),
                    *(model, blocks, self.work.scale),
                )
        correct, loss, count = scores.T
        # No view's key: these have a slash.
        return {"own_correct": correct, "own_loss": loss, "own_count": count}

    def _evaluating(self, variant: object, round: int) -> Choice:
        """One client after the other, in full precision."""
        (choice, *_) = candidates(
            self.work.net, variant, self.device, "loop", "float32", ways=("loop",), round=round
        )
        return choice

    def _adapting(
        self,
        bundle: EvalBundle,
        blocks: Mapping[str, Rows],
        shared: Mapping[int, Params],
        map: IndexMap,
        resident: Resident,
        choice: Choice,
    ) -> Chunk | None:
        """The evaluated clients with the program that they run before they test, if any."""
        program = self.work.algorithm.evaluation.prepare
        if program is None:
            return None
        sizes = np.diff(blocks[program.stream.part].offsets).tolist()
        return Chunk(
            net=self.work.net,
            program=replace(program, finish=None),
            choice=choice,
            tasks=[
                ClientTask(client, map, choice.variant, float(size), size, tier=0)
                for client, size in zip(bundle.ids.tolist(), sizes, strict=True)
            ],
            positions=range(len(sizes)),
            blocks=blocks,
            # Statistics that the server does not hold begin at their start.
            own=[{n: v for n, v in resident.fresh.items() if n not in shared[0]}] * len(sizes),
            shared=shared,
            seed=self.work.seed,
            round=bundle.round,
            scale=self.work.scale,
        )


class _Tally:
    """A bundle's running sum and its table, client by client."""

    def __init__(self, net: SuperNetwork, program: ClientProgram, count: int, *, collect: bool):
        self.net = net
        self.program = program
        self.update = None if collect else aggregate.Update()
        self.collected: list[Collected] | None = [] if collect else None
        self.kept: list[Params | None] = [None] * count
        self.reports: dict[int, dict] = {}
        self.traces: dict[int, dict[str, np.ndarray]] = {}
        self.rows: list[dict] = []
        self._costs: dict[bytes, tuple[int, int, int, str]] = {}

    def _cost(self, map: IndexMap) -> tuple[int, int, int, str]:
        """(Parameters, MACs of one forward pass, bytes of the map on the wire, kept units)."""
        if map.key not in self._costs:
            self._costs[map.key] = (
                self.net.stored_params(map, "local"),
                self.net.cost(map).macs,
                map.wire_bytes(self.net.space),
                kept_units(self.net, map),
            )
        return self._costs[map.key]

    def add(
        self,
        task: ClientTask,
        position: int,
        trained: Trained,
        seconds: float,
        tested: tuple[float, float, int] | None,
    ) -> None:
        """Adds one client; one with a NaN or an infinity anywhere is left out of the sum."""
        result = trained.result
        healthy = trained.healthy and finite(unchecked(self.program, self.net, result))
        map = covered(task, result)
        params, macs, map_bytes, units = self._cost(map)
        # What it trained, which may be more than what it returns.
        trained_macs = macs if map is task.map else self._cost(task.map)[1]
        spent = flops(self.program, trained_macs, trained.rows)
        entries = [v.numel() for tree in (result.update, trained.factors) for v in tree.values()]
        sent = 4 * sum(entries)
        if healthy:
            if self.update is not None:
                written = {name: value.cpu() for name, value in result.update.items()}
                update = {**written, **trained.factors}
                aggregate.accumulate(self.update, self.net.space, map, update, task.weight)
            elif self.collected is not None:
                self.collected.append(Collected(task, _detached(result)))
            if result.kept is not None:
                self.kept[position] = _copied(result.kept)
            if result.report is not None:
                self.reports[task.client] = result.report
            if result.trace and len(next(iter(result.trace.values()))):
                self.traces[task.client] = {
                    n: np.asarray(column) for n, column in result.trace.items()
                }
        self.rows.append(
            {
                "client": task.client,
                "tier": task.tier,
                "num_samples": task.num_samples,
                "loss": trained.loss,
                "steps": trained.steps,
                "seconds": seconds,
                "params": params,
                "macs": macs,
                "units": units,
                "flops": spent if result.flops is None else float(result.flops),
                "bytes_up": sent + map_bytes if result.wire_bytes is None else result.wire_bytes,
                # What an algorithm encodes itself has no map but its own.
                "bytes_map": map_bytes if result.wire_bytes is None else 0,
                "acc_local": tested[0] / tested[2] if tested and tested[2] else float("nan"),
                "status": OK if healthy else SKIPPED,
            }
        )

    def settle(self) -> None:
        """Multiplies out what was only noted down, while the clock still runs."""
        if self.update is not None:
            aggregate.settle(self.update)

    def result(self, number: int, seconds: dict[str, float]) -> BundleResult:
        """The bundle's result; the table has one row per client, in task order."""
        names = self.rows[0] if self.rows else {}
        table = {name: np.array([row[name] for row in self.rows]) for name in names}
        return BundleResult(
            *(number, table, seconds, self.update, self.collected),
            *(self.kept, self.reports, self.traces),
        )


def covered(task: ClientTask, result: ClientResult) -> IndexMap:
    """The map that a result covers: the task's, or what the client chose itself."""
    if result.units is None:
        return task.map
    return IndexMap.from_masks({g: mask.cpu().numpy() for g, mask in result.units.items()})


def unchecked(program: ClientProgram, net: SuperNetwork, result: ClientResult) -> list[Tensor]:
    """What is merged or kept but was not known to be finite when training ended.

    A loss program's training looked at the weights; the others' at the whole update.
    """
    leaves = list(result.kept.values()) if result.kept else []
    if isinstance(program, LossProgram):
        if program.finish is not None:
            leaves += result.update.values()
        elif net.statistics:
            leaves += [v for name, v in result.update.items() if name in net.statistics]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _copied(tree: Params) -> Params:
    """In main memory, where no later client overwrites it: a looped client's lies in buffers."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tree.items()}


def _detached(result: ClientResult) -> ClientResult:
    """A collected result that no later client can overwrite."""
    return ClientResult(
        update=_copied(result.update),
        units=result.units,
        kept=None,
        report=result.report,
        metrics=result.metrics,
        wire_bytes=result.wire_bytes,
    )
