"""Clients of one variant side by side under `torch.func.vmap`.

Legend: K clients, S steps, B rows a batch. Uneven steps are masked, part
batches weighted by 0 and 1 (`Batch.weight`), so the numbers are those of the loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils import _pytree as pytree

from subfleet.core.algorithm import Batch, ClientResult, LossProgram, Noise, Params, StepProgram
from subfleet.platform import batches, rule
from subfleet.platform.chunk import Chunk, Trained
from subfleet.platform.resident import Resident, finite


def run(chunk: Chunk, resident: Resident) -> Iterator[Trained]:
    """Runs the chunk's clients `side_by_side` at a time, yielding them in task order."""
    resident.module.train()
    width = chunk.choice.side_by_side
    for first in range(0, len(chunk.tasks), width):
        group = range(first, min(first + width, len(chunk.tasks)))
        if isinstance(chunk.program, LossProgram):
            yield from _loss_clients(chunk, group, resident, chunk.program)
        else:
            assert isinstance(chunk.program, StepProgram)
            yield from _step_clients(chunk, group, resident, chunk.program)


def _stack(trees: Sequence[Params]) -> Params:
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


class _Feed:
    """The batches of K clients of one stream, gathered step by step."""

    def __init__(self, chunk: Chunk, group: range, stream, net: Resident, *, cycle: int = 0):
        clients = [chunk.data(i, stream.part, net) for i in group]
        longest = max(1, *(len(y) for _, y in clients))  # a padded batch points at row 0
        device = chunk.device
        self.x_KN = torch.stack([_extend(x, longest) for x, _ in clients])
        self.y_KN = torch.stack([_extend(y, longest) for _, y in clients])
        schedules = [chunk.schedule(i, stream) for i in group]
        self.num_steps_K = [len(schedule) for schedule in schedules]
        if cycle:
            nothing = [np.empty(0, np.int64)]
            cycled = (schedule or nothing for schedule in schedules)
            schedules = [[s[i % len(s)] for i in range(cycle)] for s in cycled]
        rows, weights = batches.padded(schedules)
        self.rows_KSB = torch.from_numpy(rows).to(device)
        self.weight_KSB = torch.from_numpy(weights).to(device)
        self.which_K1 = torch.arange(len(group), device=device)[:, None]

    def at(self, step: int) -> Batch:
        """Batch of step `step` for all K clients; tensors have a leading client axis."""
        rows = self.rows_KSB[:, step]
        x = self.x_KN[self.which_K1, rows]
        y = self.y_KN[self.which_K1, rows]
        return Batch(x, y, self.weight_KSB[:, step])

    def rows_of(self, k: int) -> int:
        return int(self.weight_KSB[k].sum())


def _extend(x: Tensor, rows: int) -> Tensor:
    if len(x) == rows:
        return x
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def _keys(chunk: Chunk, group: range) -> Tensor:
    return torch.tensor([chunk.noise_key(i) for i in group], device=chunk.device)


def _inputs(chunk: Chunk, group: range) -> Params:
    return _stack([chunk.tasks[i].inputs for i in group])


def _loss_clients(
    chunk: Chunk, group: range, net: Resident, program: LossProgram
) -> Iterator[Trained]:
    params = _stack([_on(chunk, chunk.start(i)) for i in group])
    weights = [params[name] for name in net.trainable]
    buffers = {name: params[name] for name in net.statistics}
    velocity = [torch.zeros_like(w) for w in weights] if program.rule.momentum else None
    anchor = [w.clone() for w in weights] if program.rule.proximal else None
    feed = _Feed(chunk, group, program.stream, net)
    keys, inputs = _keys(chunk, group), _inputs(chunk, group)

    def loss(trainable, x, y, weight, key, held, inputs):
        value, metrics = program.loss(
            net, {**trainable, **held}, Batch(x, y, weight), Noise(key), inputs
        )
        return value, metrics

    gradient = vmap(grad_and_value(loss, has_aux=True))
    total_K = torch.zeros(len(group), device=chunk.device)
    for step in range(feed.rows_KSB.shape[1]):
        batch = feed.at(step)
        grads, (loss_K, _) = gradient(
            dict(zip(net.trainable, weights, strict=True)), *batch, keys + step, buffers, inputs
        )
        rows_K = batch.weight.sum(1)  # type: ignore[union-attr]
        active_K = rows_K > 0
        listed = [grads[name] for name in net.trainable]
        if not bool(active_K.all()):
            _frozen_step(program, weights, listed, velocity, anchor, active_K)
        else:
            rule.step(program.rule, weights, listed, velocity, anchor, clients=True)
        # A finished client's loss is that of padding only: where, not a product, keeps NaN out.
        total_K += torch.where(active_K, loss_K * rows_K, 0.0)
    trained = dict(zip(net.trainable, weights, strict=True)) | buffers
    for k, index in enumerate(group):
        mine = {name: value[k] for name, value in trained.items()}
        rows = feed.rows_of(k)
        if program.finish is None:
            result = ClientResult(mine)
        else:
            task = chunk.tasks[index]
            result = program.finish(chunk.start(index), mine, chunk.kept(index), task.inputs)
        mean = float(total_K[k]) / rows if rows else float("nan")
        healthy = rows == 0 or (mean == mean and finite([mine[n] for n in net.trainable]))
        yield Trained(result, mean, feed.num_steps_K[k], rows, healthy, mine)


def _on(chunk: Chunk, params: Params) -> Params:
    return {name: value.to(chunk.device) for name, value in params.items()}


def _frozen_step(program, weights, grads, velocity, anchor, active_K: Tensor) -> None:
    """A step in which finished clients keep every bit of what they have."""
    before = [w.clone() for w in weights]
    rule.step(program.rule, weights, grads, velocity, anchor, clients=True)
    for w, old in zip(weights, before, strict=True):
        w.copy_(torch.where(active_K.view(-1, *[1] * (w.dim() - 1)), w, old))


def _step_clients(
    chunk: Chunk, group: range, net: Resident, program: StepProgram
) -> Iterator[Trained]:
    starts = _stack([_on(chunk, chunk.start(i)) for i in group])
    inputs, keys = _inputs(chunk, group), _keys(chunk, group)
    own = [chunk.kept(i) for i in group]
    kept = _stack([_on(chunk, k) for k in own if k is not None]) if own[0] is not None else None
    init = vmap(
        lambda p, k, i: program.init(net, p, k, i), in_dims=(0, None if kept is None else 0, 0)
    )
    local = init(starts, kept, inputs)
    names = list(program.streams)
    main = _Feed(chunk, group, program.streams[names[0]], net)
    num_steps = main.rows_KSB.shape[1]
    feeds = {names[0]: main} | {
        n: _Feed(chunk, group, program.streams[n], net, cycle=num_steps) for n in names[1:]
    }
    total_K = torch.zeros(len(group), device=chunk.device)
    for number in range(num_steps):
        given = {name: feed.at(number) for name, feed in feeds.items()}
        extra = {} if program.kind is None else {"kind": program.kind(number)}

        def one(local, given, key, inputs, extra=extra):
            return program.step(net, local, given, Noise(key), inputs, **extra)

        stepped, metrics = vmap(one)(local, given, keys + number, inputs)
        rows_K = given[names[0]].weight.sum(1)  # type: ignore[union-attr]
        active_K = rows_K > 0
        local = _where(active_K, stepped, local)
        if "loss" in metrics:
            total_K += torch.where(active_K, metrics["loss"] * rows_K, 0.0)
    for k, index in enumerate(group):
        mine = pytree.tree_map(lambda leaf, k=k: leaf[k], local)
        result = program.final(net, mine, chunk.tasks[index].inputs)
        rows = main.rows_of(k)
        mean = float(total_K[k]) / rows if rows else float("nan")
        healthy = rows == 0 or (mean == mean and finite(list(result.update.values())))
        yield Trained(result, mean, main.num_steps_K[k], rows, healthy, None)


def _where(active_K: Tensor, new: Params, old: Params) -> Params:
    """`new` for clients that still have steps, `old` for those that are done."""

    def pick(n: Tensor, o: Tensor) -> Tensor:
        return torch.where(active_K.view(-1, *[1] * (n.dim() - 1)), n, o)

    return pytree.tree_map(pick, new, old)
