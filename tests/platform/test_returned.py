"""What an author's functions hand back wrongly is said by the name of the function."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import toys

from subfleet.algorithms.local import cross_entropy
from subfleet.core.errors import InputError
from subfleet.core.program import (
    ClientResult,
    LocalRule,
    LossProgram,
    RunProgram,
    StepProgram,
    Stream,
)


@dataclass
class Sam:
    """An author's functions; `how` says which of them is wrong, and how."""

    how: str = ""

    def begin(self, net, params, kept, inputs):
        return dict(params)

    def step(self, rate, net, local, batch, noise, inputs):
        gradient, loss, _ = net.gradient(
            lambda w: cross_entropy(net, w, batch["train"], noise, inputs), local
        )
        match self.how:
            case "the gradient alone":
                return gradient
            case "the state alone":
                return {name: w - rate * gradient[name] for name, w in local.items()}
            case "nothing":
                return None
            case "three things":
                return local, {}, loss
            case "a number":
                return local, {"loss": 1.0}
        return {name: w - rate * gradient[name] for name, w in local.items()}, {"loss": loss}

    def end(self, net, local, inputs):
        return local if self.how == "no result" else ClientResult(local)


def trained(program, way="loop"):
    net, data = toys.linear(6, 3), toys.all_train([8, 8], (6,), 3)
    tasks = [toys.task(net, client) for client in range(2)]
    return toys.each(net, program, tasks, data, net.init(0), way)


def steps(how):
    sam = Sam(how)
    return StepProgram(sam.begin, partial(sam.step, 0.1), sam.end, {"train": Stream(batch=4)})


@pytest.mark.parametrize("way", ["loop", "vmap"])
@pytest.mark.parametrize(
    ("how", "got"),
    [
        ("the gradient alone", "a dict of 'fc.weight', 'fc.bias'"),
        ("the state alone", "a dict of 'fc.weight', 'fc.bias'"),
        ("nothing", "None"),
        ("three things", "a tuple of 3"),
        ("a number", "the metric 'loss' as a float"),
    ],
)
def test_a_step_that_returns_something_else_is_named(how, got, way):
    with pytest.raises(InputError) as caught:
        trained(steps(how), way)
    words = str(caught.value)
    assert words.startswith(f"Sam.step returned {got}; ")
    assert "(local, metrics)" in words and '{"loss": loss}' in words


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_final_that_returns_no_result_is_named(way):
    with pytest.raises(InputError, match=r"Sam\.end returned a dict of .*return a ClientResult"):
        trained(steps("no result"), way)


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_finish_and_a_run_that_return_no_result_are_named(way):
    def finish(start, trained, kept, inputs):
        return trained

    with pytest.raises(InputError, match=r"finish returned a dict of .*return a ClientResult"):
        trained(LossProgram(cross_entropy, LocalRule(), Stream(batch=4), finish), way)
    with pytest.raises(InputError, match=r"test_.*lambda.* returned None"):
        trained(RunProgram(lambda context: None))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["loop", "vmap"])
def test_a_right_program_runs(way):
    assert all(torch.isfinite(torch.tensor(loss)) for _, loss, _ in trained(steps(""), way))
