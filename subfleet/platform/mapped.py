"""Clients of one variant side by side under `torch.func.vmap`.

Legend: K clients, S steps, B rows a batch. Uneven steps are masked, part
batches weighted by 0 and 1 (`Batch.weight`), so the numbers are those of the loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils import _pytree as pytree

from subfleet.core.program import Batch, ClientResult, LossProgram, Noise, Params, StepProgram
from subfleet.platform import returned
from subfleet.platform.chunks import Chunk, Trained
from subfleet.platform.feed import Feed
from subfleet.platform.resident import Resident, finite
from subfleet.platform.steps import Stepper, chosen


def run(chunk: Chunk, resident: Resident) -> Iterator[Trained]:
    """Runs the chunk's clients at most `side_by_side` at a time, yielding them in task order."""
    resident.module.train()
    for group in groups(len(chunk.tasks), chunk.choice.side_by_side, full=chunk.choice.compiled):
        if isinstance(chunk.program, LossProgram):
            yield from _loss_clients(chunk, group, resident, chunk.program)
        else:
            assert isinstance(chunk.program, StepProgram)
            yield from _step_clients(chunk, group, resident, chunk.program)


def groups(count: int, most: int, *, full: bool = False) -> Iterator[range]:
    """Runs of `count` clients, at most `most` long and as equal as can be: few shapes to trace.

    `full`: all of length `most` but the last, since steps are compiled for that length alone.

    >>> [len(group) for group in groups(31, 16)], [len(group) for group in groups(33, 16)]
    ([16, 15], [11, 11, 11])
    >>> [len(group) for group in groups(33, 16, full=True)]
    [16, 16, 1]
    """
    parts = -(-count // most)
    first = 0
    for part in range(parts):
        last = first + count // parts + (part < count % parts)
        if full:
            last = min(first + most, count)
        yield range(first, last)
        first = last


def _stack(trees: Sequence[Params], device: torch.device) -> Params:
    return {name: torch.stack([tree[name].to(device) for tree in trees]) for name in trees[0]}


def _batch(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Batch:
    return Batch(x, y, weight)


def _starts(chunk: Chunk, group: range) -> Params:
    return _stack([chunk.start(i) for i in group], chunk.device)


def _inputs(chunk: Chunk, group: range) -> Params:
    return _stack([chunk.inputs(i) for i in group], chunk.device)


def _keys(chunk: Chunk, group: range) -> Tensor:
    return torch.tensor([chunk.noise_key(i) for i in group], device=chunk.device)


def _loss_clients(
    chunk: Chunk, group: range, net: Resident, program: LossProgram
) -> Iterator[Trained]:
    starts = [chunk.start(i) for i in group]
    alike = {n: v for n, v in starts[0].items() if all(start[n] is v for start in starts)}
    trainable = {
        name: alike[name].expand(len(group), *alike[name].shape)
        if name in alike
        else torch.stack([start[name] for start in starts])
        for name in net.trainable
    }
    buffers = {name: torch.stack([start[name] for start in starts]) for name in net.statistics}
    feed = Feed(chunk, group, program.stream, net)
    keys, inputs = _keys(chunk, group), _inputs(chunk, group)
    stepping = net.prepared(program, chunk.round)
    stepper = Stepper(net, stepping, trainable, buffers, inputs, clients=True)
    losses: list[Tensor] = []
    with torch.no_grad():
        batch, x = feed.at(0) if feed.num_steps else (), None
        if batch and chunk.sums:
            rows, most = feed.num_steps * feed.size[1], chunk.most_steps(group) * feed.size[1]
            stepper.factor(alike, rows, most, keys, batch, feed)
            x = batch[0] if stepper.has_data else None  # any will do
        stepper.own(alike.keys() & trainable.keys())
        for step in range(feed.num_steps):
            batch = feed.at(step, x=x) if step else batch
            losses.append(stepper.step(keys + step, batch, feed.active(step)))
    mean_K, num_rows_K = feed.means(losses), feed.num_rows_K
    healthy_K = stepper.finish(len(group))
    for k, index in enumerate(group):
        mine, factors = stepper.trained(k)
        mine |= {name: value[k] for name, value in buffers.items()}
        if program.finish is None:
            result = ClientResult(mine)
        else:
            made = program.finish(chunk.start(index), mine, chunk.kept(index), chunk.inputs(index))
            result = returned.result(program.finish, made)
        healthy = num_rows_K[k] == 0 or (math.isfinite(mean_K[k]) and healthy_K[k])
        steps, rows = feed.num_steps_K[k], num_rows_K[k]
        yield Trained(result, mean_K[k], steps, rows, healthy, mine, factors)


def _step_clients(
    chunk: Chunk, group: range, net: Resident, program: StepProgram
) -> Iterator[Trained]:
    inputs, keys = _inputs(chunk, group), _keys(chunk, group)
    own = [kept for i in group if (kept := chunk.kept(i)) is not None]
    kept = _stack(own, chunk.device) if own else None
    init = vmap(
        lambda p, k, i: program.init(net, p, k, i), in_dims=(0, None if kept is None else 0, 0)
    )
    local = init(_starts(chunk, group), kept, inputs)
    first, *others = program.streams
    main = Feed(chunk, group, program.streams[first], net)
    feeds = {first: main} | {
        name: Feed(chunk, group, program.streams[name], net, cycle=main.num_steps)
        for name in others
    }
    losses: list[Tensor] = []
    for number in range(main.num_steps):
        extra = {} if program.kind is None else {"kind": program.kind(number)}

        def one(local, given, key, inputs, extra=extra):
            whole = {name: _batch(*feed) for name, feed in given.items()}
            with net.step.entered(Noise(key)):
                out = program.step(net, local, whole, Noise(key), inputs, **extra)
            return returned.stepped(program.step, out)

        given = {name: feed.at(number) for name, feed in feeds.items()}
        stepped, metrics = vmap(one)(local, given, keys + number, inputs)
        if (active := main.active(number)) is not None:
            active_K = torch.from_numpy(active).to(chunk.device)
            # Clients that are done keep what they have.
            stepped = pytree.tree_map(lambda n, o, a=active_K: chosen(a, n, o), stepped, local)
        local = stepped
        losses.append(metrics.get("loss", torch.zeros(len(group), device=chunk.device)))
    mean_K, num_rows_K = main.means(losses), main.num_rows_K
    for k, index in enumerate(group):
        mine = pytree.tree_map(lambda leaf, k=k: leaf[k], local)
        made = program.final(net, mine, chunk.inputs(index))
        result = returned.result(program.final, made)
        healthy = num_rows_K[k] == 0 or (
            math.isfinite(mean_K[k]) and finite(list(result.update.values()))
        )
        yield Trained(result, mean_K[k], main.num_steps_K[k], num_rows_K[k], healthy, None)
