"""Watching a module at work: what each of its layers took in and gave out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

Result = TypeVar("Result")


class Passed(NamedTuple):
    """One run of one layer; `name` is the layer's, its tensors are ``f"{name}.weight"``, ..."""

    name: str
    layer: nn.Module
    input: Tensor
    output: Tensor


def watched(module: nn.Module, call: Callable[[], Result]) -> tuple[Result, list[Passed]]:
    """What `call` returns, and what went through the layers of `module` meanwhile, in order.

    A layer is a module without modules of its own that takes one tensor and gives one. What
    a module's own code does between its layers is not seen.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> _, passed = watched(net, lambda: net(torch.zeros(1, 2)))
    >>> [(p.name, tuple(p.output.shape)) for p in passed], passed[1].input is passed[0].output
    ([('0', (1, 3)), ('1', (1, 3))], True)
    """
    passed: list[Passed] = []
    with _hooks(module, passed):
        result = call()
    return result, passed


@contextmanager
def _hooks(module: nn.Module, passed: list[Passed]) -> Iterator[None]:
    def noting(name: str) -> Callable[..., None]:
        def note(layer: nn.Module, taken: tuple[object, ...], given: object) -> None:
            if len(taken) == 1 and isinstance(taken[0], Tensor) and isinstance(given, Tensor):
                passed.append(Passed(name, layer, taken[0], given))

        return note

    leaves = [(name, part) for name, part in module.named_modules() if not list(part.children())]
    handles = [part.register_forward_hook(noting(name)) for name, part in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
