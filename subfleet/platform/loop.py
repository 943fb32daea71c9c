"""Clients one after the other in resident buffers: the plain loop.

No model is built and no optimiser made per client: parameters are copied in
place and gradients applied by foreach kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from subfleet.core import seeds
from subfleet.core.algorithm import (
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
from subfleet.platform import rule
from subfleet.platform.chunk import Chunk, Trained
from subfleet.platform.resident import TORCH_RANDOM, Resident, finite


def run(chunk: Chunk, resident: Resident) -> Iterator[Trained]:
    """Runs the chunk's clients in task order, whatever the form of the program."""
    resident.module.train()
    for index in range(len(chunk.tasks)):
        if not resident.has_dropout:
            yield _client(chunk, index, resident)
            continue
        with TORCH_RANDOM:
            torch.manual_seed(chunk.noise_key(index))
            trained = _client(chunk, index, resident)
        yield trained


def _client(chunk: Chunk, index: int, net: Resident) -> Trained:
    if isinstance(chunk.program, LossProgram):
        return _loss_client(chunk, index, net, chunk.program)
    if isinstance(chunk.program, StepProgram):
        return _step_client(chunk, index, net, chunk.program)
    return _run_client(chunk, index, net, chunk.program)


def _schedule(chunk: Chunk, index: int, stream: Stream) -> list[Tensor]:
    rows = chunk.schedule(index, stream)
    return [torch.from_numpy(batch).to(chunk.device) for batch in rows]


def _loss_client(chunk: Chunk, index: int, net: Resident, program: LossProgram) -> Trained:
    start = chunk.start(index)
    net.load(start)
    inputs = chunk.tasks[index].inputs
    weights = list(net.trainable.values())
    velocity = [torch.zeros_like(w) for w in weights] if program.rule.momentum else None
    anchor = [w.detach().clone() for w in weights] if program.rule.proximal else None
    x, y = chunk.data(index, program.stream.part, net)
    schedule = _schedule(chunk, index, program.stream)
    key = torch.tensor(chunk.noise_key(index), device=chunk.device)
    total, rows = torch.zeros((), device=chunk.device), 0
    for number, batch in enumerate(schedule):
        loss, _ = program.loss(
            net, net.params, Batch(x[batch], y[batch], None), Noise(key + number), inputs
        )
        grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        with torch.no_grad():
            rule.step(program.rule, weights, list(grads), velocity, anchor)
            total.add_(loss.detach(), alpha=len(batch))
        rows += len(batch)
    with torch.no_grad():
        trained = {name: value.detach() for name, value in net.params.items()}
        if program.finish is None:
            result = ClientResult(trained)
        else:
            result = program.finish(start, trained, chunk.kept(index), inputs)
        loss = float(total) / rows if rows else float("nan")
        healthy = (rows == 0 or np.isfinite(loss)) and finite(weights)
    return Trained(result, loss, len(schedule), rows, healthy, net.params)


def _own_copy(params: Params) -> Params:
    """A client's start that it may write to: BatchNorm updates its statistics in place."""
    return {name: value.clone() for name, value in params.items()}


def _step_client(chunk: Chunk, index: int, net: Resident, program: StepProgram) -> Trained:
    inputs = chunk.tasks[index].inputs
    local = program.init(net, _own_copy(chunk.start(index)), chunk.kept(index), inputs)
    feeds = {
        name: (chunk.data(index, stream.part, net), _schedule(chunk, index, stream))
        for name, stream in program.streams.items()
    }
    first = next(iter(feeds))
    key = torch.tensor(chunk.noise_key(index), device=chunk.device)
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
        local, metrics = program.step(net, local, given, Noise(key + number), inputs, **extra)
        size = len(given[first].y)
        if "loss" in metrics:
            total = total + metrics["loss"].detach() * size
        rows += size
    result = program.final(net, local, inputs)
    healthy = bool(torch.isfinite(total)) and finite(list(result.update.values()))
    loss = float(total) / rows if rows else float("nan")
    return Trained(result, loss, len(feeds[first][1]), rows, healthy, None)


def _run_client(chunk: Chunk, index: int, net: Resident, program: RunProgram) -> Trained:
    task = chunk.tasks[index]

    def generator(purpose: str) -> np.random.Generator:
        return seeds.generator(chunk.seed, purpose, round=chunk.round, client=task.client)

    context = RunContext(
        supernet=chunk.net,
        params=_own_copy(chunk.start(index)),
        kept=chunk.kept(index),
        inputs=task.inputs,
        task=task,
        data=lambda part: chunk.data(index, part, net),
        generator=generator,
    )
    result = program.run(context)
    loss = result.metrics.get("loss", float("nan"))
    healthy = not result.update or finite(list(result.update.values()))
    return Trained(result, loss, 0, task.num_samples, healthy, None)
