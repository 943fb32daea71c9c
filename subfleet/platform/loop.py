"""Clients one after the other in resident buffers: the plain loop.

No model is built and no optimiser made per client: parameters are copied in
place and gradients applied by foreach kernels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from itertools import chain, islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from subfleet.core import seeds
from subfleet.core.program import (
    Batch,
    ClientResult,
    LossProgram,
    Noise,
    Params,
    RunContext,
    RunProgram,
    StepProgram,
    Stream,
)
from subfleet.platform import returned
from subfleet.platform.chunks import Chunk, Trained
from subfleet.platform.resident import Resident, finite
from subfleet.platform.steps import Stepper


def run(chunk: Chunk, resident: Resident) -> Iterator[Trained]:
    """Runs the chunk's clients in task order, whatever the form of the program."""
    resident.module.train()
    for index in range(len(chunk.tasks)):
        if resident.has_dropout:  # outside a step it draws from torch's own generator
            torch.manual_seed(chunk.noise_key(index))
        yield _client(chunk, index, resident)


def _client(chunk: Chunk, index: int, net: Resident) -> Trained:
    if isinstance(chunk.program, LossProgram):
        return _loss_client(chunk, index, net, chunk.program)
    if isinstance(chunk.program, StepProgram):
        return _step_client(chunk, index, net, chunk.program)
    return _run_client(chunk, index, net, chunk.program)


def _batches(
    chunk: Chunk, index: int, part: str, net: Resident, schedule: list[np.ndarray]
) -> Iterator[Batch]:
    """The batches of a schedule; rows are gathered a pass at a time and then cut as views."""
    x, y = chunk.stored(index, part)
    step = 0
    while step < len(schedule):
        group = [schedule[step]]
        size = len(group[0])
        while step + len(group) < len(schedule):
            more = schedule[step + len(group)]
            if size + len(more) > len(y):
                break
            group.append(more)
            size += len(more)
        rows = torch.from_numpy(np.concatenate(group)).to(y.device)
        sizes = [len(batch) for batch in group]
        found = net.images(x.index_select(0, rows), chunk.scale)
        parts = zip(found.split(sizes), y.index_select(0, rows).split(sizes), strict=True)
        yield from (Batch(x_B, y_B, None) for x_B, y_B in parts)
        step += len(group)


def _mean(losses: list[Tensor], schedule: list[np.ndarray]) -> float:
    """The mean loss over all rows seen, NaN when there were none."""
    if not losses:
        return float("nan")
    rows = sum(map(len, schedule))
    values = torch.stack(losses).tolist()
    return sum(v * len(batch) for v, batch in zip(values, schedule, strict=True)) / rows


def _schedule(chunk: Chunk, index: int, stream: Stream) -> list[Tensor]:
    rows = chunk.schedule(index, stream)
    return [torch.from_numpy(batch).to(chunk.device) for batch in rows]


def _loss_client(chunk: Chunk, index: int, net: Resident, program: LossProgram) -> Trained:
    start, inputs = chunk.start(index), chunk.inputs(index)
    schedule = chunk.schedule(index, program.stream)
    batches = _batches(chunk, index, program.stream.part, net, schedule)
    keys = (chunk.noise_key(index) + torch.arange(len(schedule), device=chunk.device)).unbind()
    stepping = net.prepared(program, chunk.round)
    stepper = Stepper(net, stepping, net.weights, net.statistics, inputs, clients=False)
    whole = program.stream.batch if chunk.choice.way == "traced" else None
    losses = []
    with torch.no_grad():
        first = list(islice(batches, 1))
        factored = _factor(chunk, index, net, stepper, schedule, keys, first)
        net.load({name: value for name, value in start.items() if name not in factored})
        for number, batch in enumerate(chain(first, batches)):
            if len(batch.y) == whole:
                loss = stepper.step(keys[number], batch[:2])
            elif factored:
                loss = stepper.step(keys[number], _padded(batch, whole))
            else:  # others come in too many sizes to trace
                loss = stepper.plain_step(Noise(keys[number]), batch)
            losses.append(loss)
        (healthy,) = stepper.finish()
        trained, factors = stepper.trained()
        trained |= net.statistics
        if program.finish is None:
            result = ClientResult(trained)
        else:
            made = program.finish(start, trained, chunk.kept(index), inputs)
            result = returned.result(program.finish, made)
        rows = sum(map(len, schedule))
        loss = _mean(losses, schedule)
    healthy = healthy and (rows == 0 or math.isfinite(loss))
    params = trained if factors else net.params
    return Trained(result, loss, len(schedule), rows, healthy, params, factors)


def _factor(
    chunk: Chunk,
    index: int,
    net: Resident,
    stepper: Stepper,
    schedule: list[np.ndarray],
    keys: Sequence[Tensor],
    first: Sequence[Batch],
) -> Collection[str]:
    """Lets the stepper hold weights as factors, where that can be and pays; their names."""
    assert isinstance(chunk.program, LossProgram)
    whole = chunk.program.stream.batch
    if not chunk.sums or chunk.choice.way != "traced" or whole is None or not first:
        return ()
    parts = [len(rows) for rows in schedule if len(rows) != whole]
    if parts and not net.weighs_rows:
        return ()
    rows = (len(schedule) - len(parts)) * whole + sum(n + _missing(n, whole) for n in parts)
    batch = first[0][:2] if len(first[0].y) == whole else _padded(first[0], whole)
    most = chunk.most_steps([index]) * whole
    return stepper.factor(chunk.start(index), rows, most, keys[0], batch)


def _missing(rows: int, whole: int) -> int:
    """Rows of padding in a part batch, to the next quarter of a whole one: few sizes to trace."""
    return -rows % -(-whole // 4)


def _padded(batch: Batch, whole: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """A part batch, its padding, and the weights that tell them apart."""
    assert whole is not None
    more = _missing(len(batch.y), whole)
    x, y = (F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, more]) for rows in batch[:2])
    # Of real rows, as for mapped clients: what is all zeros some networks divide by.
    x[len(batch.x) :], y[len(batch.y) :] = batch.x[0], batch.y[0]
    return x, y, F.pad(torch.ones(len(batch.y), device=x.device), [0, more])


def _own_copy(params: Params, net: Resident) -> Params:
    """A client's start that it may write to: BatchNorm updates its statistics in place."""
    images = torch.channels_last if net.channels_last else torch.contiguous_format
    return {
        name: value.clone(memory_format=images if value.dim() == 4 else torch.contiguous_format)
        for name, value in params.items()
    }


def _step_client(chunk: Chunk, index: int, net: Resident, program: StepProgram) -> Trained:
    inputs = chunk.inputs(index)
    local = program.init(net, _own_copy(chunk.start(index), net), chunk.kept(index), inputs)
    feeds = {
        name: (chunk.data(index, stream.part, net), _schedule(chunk, index, stream))
        for name, stream in program.streams.items()
    }
    first = next(iter(feeds))
    key = chunk.noise_key(index)
    total, rows = torch.zeros((), device=chunk.device), 0
    for number in range(len(feeds[first][1])):
        given = {}
        for name, ((x, y), schedule) in feeds.items():
            if schedule:
                batch = schedule[number % len(schedule)]
                given[name] = Batch(x[batch], y[batch], None)
            else:  # an empty weight, so that the batch's mean is 0 as under vmap, and not NaN
                given[name] = Batch(x[:0], y[:0], torch.zeros(0, device=chunk.device))
        extra = {} if program.kind is None else {"kind": program.kind(number)}
        noise = Noise(key + number, chunk.device)
        with net.step.entered(noise):
            out = program.step(net, local, given, noise, inputs, **extra)
        local, metrics = returned.stepped(program.step, out)
        size = len(given[first].y)
        if "loss" in metrics:
            total = total + metrics["loss"].detach() * size
        rows += size
    result = returned.result(program.final, program.final(net, local, inputs))
    healthy = bool(torch.isfinite(total)) and finite(list(result.update.values()))
    loss = float(total) / rows if rows else float("nan")
    return Trained(result, loss, len(feeds[first][1]), rows, healthy, None)


def _run_client(chunk: Chunk, index: int, net: Resident, program: RunProgram) -> Trained:
    task = chunk.tasks[index]

    def generator(purpose: str) -> np.random.Generator:
        return seeds.generator(chunk.seed, purpose, round=chunk.round, client=task.client)

    context = RunContext(
        supernet=chunk.net,
        params=_own_copy(chunk.start(index), net),
        kept=chunk.kept(index),
        inputs=chunk.inputs(index),
        task=task,
        data=lambda part: chunk.data(index, part, net),
        generator=generator,
    )
    result = returned.result(program.run, program.run(context))
    loss = result.metrics.get("loss", float("nan"))
    healthy = not result.update or finite(list(result.update.values()))
    return Trained(result, loss, 0, task.num_samples, healthy, None)
