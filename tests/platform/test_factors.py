"""Weights held as factors: the numbers of weights that are written out, for every local rule."""

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from subfleet.algorithms.fedavg import FedAvg
from subfleet.algorithms.local import cross_entropy
from subfleet.core.lowrank import dense
from subfleet.core.program import ClientResult, LocalRule, LossProgram, Stream
from subfleet.core.scaling import Scaling
from subfleet.core.units import IndexMap
from subfleet.models import chain, supernet
from subfleet.platform import factors, loop, mapped, products
from subfleet.platform.chunks import Chunk, Trained
from subfleet.platform.engine import SKIPPED
from subfleet.platform.factors import Factored, OfData
from subfleet.platform.record import Choice, variant_name
from subfleet.platform.resident import Resident
from subfleet.platform.steps import Stepper

FULL = IndexMap.full()
NET = toys.mlp(dim=40, hidden=(44, 34), classes=5)
WIDE = ["fc0.weight", "fc1.weight"]  # the head's five outputs are fewer than any client's rows


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "LEAST", 0)


def choice(way: str, *, factored: bool = True, **options: Any) -> Choice:
    width = {"side_by_side": 3} if way == "vmap" else {}
    name = variant_name(NET.space.counts(FULL))
    return Choice(name, "cpu", way, **width, factored=factored, **options)  # type: ignore[arg-type]


def trained(
    chosen: Choice,
    program: LossProgram,
    sizes: list[int],
    net=NET,
    *,
    sums: bool = True,
    steps: list[int] | None = None,
) -> list[Trained]:
    """Every client on its own, as a chunk gives it."""
    data = toys.all_train(sizes, net.input_shape, 5)
    tasks = [toys.task(net, client, samples=size) for client, size in enumerate(sizes)]
    if steps is not None:
        tasks = [replace(task, steps=n) for task, n in zip(tasks, steps, strict=True)]
    ids = np.arange(len(sizes))
    chunk = Chunk(
        net=net,
        program=program,
        choice=chosen,
        tasks=tasks,
        positions=range(len(tasks)),
        blocks={"train": data.block(ids, "train")},
        own=[None] * len(tasks),
        shared={0: net.init(0)},
        seed=0,
        round=1,
        scale=Scaling(),
        sums=sums,
    )
    way = mapped if chosen.way == "vmap" else loop
    out = []
    for client in way.run(chunk, Resident(net, FULL, chosen)):
        update = {name: value.clone() for name, value in client.result.update.items()}
        out.append(client._replace(result=replace(client.result, update=update)))
    return out


def held(client: Trained) -> list[str]:
    return sorted(client.factors)


def returned(client: Trained) -> dict[str, torch.Tensor]:
    return dense({**client.result.update, **client.factors})


RULES = {
    "plain": LocalRule(lr=0.2),
    "momentum": LocalRule(lr=0.1, momentum=0.9),
    "decay": LocalRule(lr=0.2, weight_decay=0.05),
    "both": LocalRule(lr=0.1, momentum=0.7, weight_decay=0.05),
    "proximal": LocalRule(lr=0.2, proximal=0.3),
    "all": LocalRule(lr=0.1, momentum=0.7, weight_decay=0.02, proximal=0.3),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_the_numbers_are_those_of_the_loop(way, rule):
    """Four clients of several steps, the last batch a part or whole, in groups of two."""
    program = toys.loss_program(rule, Stream(batch=4, epochs=2))
    sizes = [13, 8, 3, 10]
    found = trained(choice(way), program, sizes)
    wanted = trained(choice("loop"), program, sizes)
    for one, other in zip(found, wanted, strict=True):
        assert held(one) == WIDE and not held(other)
        assert toys.distance(returned(one), other.result.update) < 1e-5
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert (one.steps, one.rows, one.healthy) == (other.steps, other.rows, True)


@pytest.mark.parametrize("way", ["traced", "vmap"])
@pytest.mark.parametrize("library", ["blas", "onednn"])
def test_part_batches_are_padded_with_rows_that_count_for_nothing(way, library):
    """Rows over their own norm: padding of zeros would be no number."""

    def unit(net, params, batch, noise, inputs):
        rows = batch.x / batch.x.norm(dim=1, keepdim=True)
        return cross_entropy(net, params, batch._replace(x=rows), noise, inputs)

    if library == "onednn" and not products.has_onednn():
        pytest.skip("this torch has no oneDNN")
    program = LossProgram(unit, LocalRule(lr=0.3, momentum=0.5), Stream(batch=8))
    sizes = [15, 13, 3, 16, 17, 0, 1]
    found = trained(choice(way, products=library), program, sizes)
    wanted = trained(choice("loop"), program, sizes)
    for size, one, other in zip(sizes, found, wanted, strict=True):
        assert held(one) == (WIDE if size else []) or way == "vmap"
        assert (one.steps, one.rows, one.healthy) == (other.steps, other.rows, True)
        assert toys.distance(returned(one), other.result.update) < 1e-5


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_networks_of_nothing_but_such_layers(way, rule):
    net = toys.linear(40, 30, bias=False)
    program = toys.loss_program(rule, Stream(batch=4))
    found = trained(choice(way), program, [8, 6, 12], net)
    wanted = trained(choice("loop"), program, [8, 6, 12], net)
    for one, other in zip(found, wanted, strict=True):
        assert held(one) == ["fc.weight"] and not one.result.update
        assert toys.distance(returned(one), other.result.update) < 1e-5


@pytest.mark.skipif(not products.has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_large_layers_one_upon_the_other_by_onednn(way):
    layers = OrderedDict(fc=nn.Linear(784, 600), head=nn.Linear(600, 200))
    net = chain("deep", nn.Sequential(layers), (784,))
    program = toys.loss_program(LocalRule(lr=0.05), Stream(batch=20))
    found = trained(choice(way, products="onednn"), program, [40, 30], net)
    wanted = trained(choice("loop"), program, [40, 30], net)
    for one, other in zip(found, wanted, strict=True):
        assert held(one) == ["fc.weight", "head.weight"]
        assert toys.distance(returned(one), other.result.update) < 1e-5


def test_what_a_finished_client_makes_of_padding_counts_for_nothing():
    weight = Factored(torch.ones(2, 3), 2, 2, LocalRule(lr=1.0, momentum=0.5), "blas")
    ones = torch.ones(2, 1, 3)
    weight.add(torch.ones(2, 2, 1), ones, None)
    broken = torch.full((2, 1, 3), float("inf"))
    broken[0] = 1.0
    weight.add(torch.ones(2, 2, 1), broken, np.array([True, False]))
    assert torch.isfinite(weight.outputs(ones)).all()
    assert weight.finish().tolist() == [True, True]
    # v = 1, then 1.5: w = 1 - 1 - 1.5 of the first, and 1 - 1 of the one that was done.
    assert weight[0].dense().tolist() == [[-1.5] * 3] * 2
    assert weight[1].dense().tolist() == [[0.0] * 3] * 2


def test_a_step_of_more_rows_than_promised():
    weight = Factored(torch.zeros(2, 3), None, 1, LocalRule(lr=1.0), "blas")
    weight.add(torch.ones(2, 1), torch.ones(1, 3), None)
    weight.add(torch.ones(2, 4), torch.ones(4, 3), None)
    assert weight.finish().tolist() == [True]
    assert weight[0].dense().tolist() == [[-5.0] * 3] * 2


def test_two_steps_on_data_by_hand():
    """W [[1, 2]]; rows (1, 0) and (0, 1), then (1, 1) and (2, 0); every gradient at W x is 1."""
    data = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]]])
    weight = OfData(torch.tensor([[1.0, 2.0]]), data, 2, LocalRule(lr=0.5), "blas")
    ones = torch.ones(1, 1, 2)
    assert weight.outputs(data[:, :2]).flatten().tolist() == [1.0, 2.0]
    weight.add(ones, data[:, :2], None)  # W <- (1, 2) - 0.5 (1, 1)
    assert weight.outputs(data[:, 2:]).flatten().tolist() == [2.0, 1.0]
    weight.add(ones, data[:, 2:], None)  # W <- (0.5, 1.5) - 0.5 (3, 1)
    assert weight.finish().tolist() == [True]
    assert weight[0].dense().tolist() == [[-1.0, 1.0]]


@given(
    step=st.integers(1, 40),
    steps=st.integers(1, 6),
    rule=st.sampled_from(list(RULES.values())),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_what_is_known_before_the_first_step_changes_no_number(step, steps, rule, seed):
    """Whatever the size of a step, against the rows given step by step."""
    torch.manual_seed(seed)
    base, data = torch.randn(3, 7), torch.randn(2, step * steps, 7) / 7
    ahead = OfData(base, data, step, rule, "blas")
    plain = Factored(base, 2, step * steps, rule, "blas")
    for x in data.split(step, dim=1):
        assert torch.allclose(ahead.outputs(x), plain.outputs(x), atol=1e-5)
        left = torch.randn(2, 3, step) / step
        ahead.add(left, x, None)
        plain.add(left, x, None)
    assert ahead.finish().all() and plain.finish().all()
    for client in range(2):
        assert torch.allclose(ahead[client].dense(), plain[client].dense(), atol=1e-5)


def test_a_client_that_is_done_stays_as_it_is_on_data_too():
    base, data = torch.ones(2, 3), torch.ones(2, 2, 3)
    weight = OfData(base, data, 1, LocalRule(lr=1.0, momentum=0.5), "blas")
    weight.add(torch.ones(2, 2, 1), data[:, :1], None)
    broken = torch.ones(2, 2, 1)
    broken[1] = float("nan")
    assert weight.outputs(data[:, 1:])[:, 0, 0].tolist() == [0.0, 0.0]
    weight.add(broken, data[:, 1:], np.array([True, False]))
    assert weight.finish().tolist() == [True, True]
    assert weight[0].dense().tolist() == [[-1.5] * 3] * 2
    assert weight[1].dense().tolist() == [[0.0] * 3] * 2


def test_outputs_may_be_written_to():
    """Also those of a single client, whose rows lie as the outputs do."""
    weight = OfData(torch.ones(2, 3), torch.ones(1, 2, 3), 1, LocalRule(), "blas")
    weight.outputs(torch.ones(1, 1, 3)).zero_()
    assert weight.outputs(torch.ones(1, 1, 3)).tolist() == [[[3.0, 3.0]]]


def test_a_row_that_is_no_number_is_seen():
    data = torch.ones(3, 2, 4)
    data[1, 1, 2], data[2, 0, 0] = float("nan"), float("inf")
    weight = OfData(torch.zeros(2, 4), data, 1, LocalRule(), "blas")
    for step in range(2):
        weight.add(torch.zeros(3, 2, 1), data[:, step : step + 1], None)
    assert weight.finish().tolist() == [True, False, False]


def scores_and_size(net, params, batch, noise, inputs):
    """A loss that looks at the data itself, beside the network."""
    rows = torch.nn.functional.cross_entropy(net(params, batch.x), batch.y, reduction="none")
    return batch.mean(rows * (1.0 + batch.x.square().mean(dim=1))), {}


PROXY = torch.linspace(-1.0, 1.0, 160).view(4, 40)


def distilled(net, params, batch, noise, inputs):
    """A loss that also scores other rows, through which no gradient goes."""
    with torch.no_grad():
        told = net(params, PROXY).mean()
    rows = torch.nn.functional.cross_entropy(net(params, batch.x), batch.y, reduction="none")
    return batch.mean(rows) * (1.0 + told.detach() ** 2), {}


def twice_at_once(net, params, batch, noise, inputs):
    """A loss that also scores the same rows without a gradient."""
    told = net({name: value.detach() for name, value in params.items()}, batch.x)
    rows = torch.nn.functional.cross_entropy(net(params, batch.x), batch.y, reduction="none")
    return batch.mean(rows) * (1.0 + 0.1 * told.square().mean()), {}


def weighing_rows(net, params, batch, noise, inputs):
    """A loss that touches the data of part batches only."""
    x = batch.x if batch.weight is None else batch.x * batch.weight[:, None]
    return cross_entropy(net, params, batch._replace(x=x), noise, inputs)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("sizes", [[8, 8, 8], [8, 6, 7], [8], [8, 4, 8, 3]])
def test_layers_on_data_have_the_numbers_of_the_loop(rule, sizes):
    layers = supernet(TwoSides(), torch.zeros(2, 160))
    program = toys.loss_program(rule, Stream(batch=4))
    found = trained(choice("vmap"), program, sizes, layers)
    wanted = trained(choice("loop"), program, sizes, layers)
    for one, other in zip(found, wanted, strict=True):
        assert toys.distance(returned(one), other.result.update) < 1e-5


class TwoSides(nn.Module):
    """Two layers on the data, of which one sees four pieces of each example."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.piece = nn.Linear(160, 48), nn.Linear(40, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole(x) + self.piece(x.view(len(x), 4, 40)).sum(1)


def test_two_layers_on_data_of_which_one_sees_too_many_rows():
    net = supernet(TwoSides(), torch.zeros(2, 160))
    for sizes, names in (([8, 8], ["piece.weight", "whole.weight"]), ([16, 16], ["whole.weight"])):
        program = toys.loss_program(stream=Stream(batch=4))
        found = trained(choice("vmap"), program, sizes, net)
        wanted = trained(choice("loop"), program, sizes, net)
        for one, other in zip(found, wanted, strict=True):
            assert held(one) == names
            assert toys.distance(returned(one), other.result.update) < 1e-5


@pytest.mark.parametrize("sizes", [[8, 6, 7], [8, 8], [8]])
@pytest.mark.parametrize(
    ("loss", "known"),
    [
        (cross_entropy, ["fc0.weight"]),
        (scores_and_size, []),
        (distilled, []),
        (twice_at_once, []),
        (weighing_rows, None),
    ],
)
def test_layers_of_data_are_found(loss, known, sizes, monkeypatch):
    seen = []
    at_first = Stepper.factor

    def factor(self, *args):
        names = at_first(self, *args)
        seen.append([n for n in names if isinstance(self.weights[n], OfData)])
        return names

    monkeypatch.setattr(Stepper, "factor", factor)
    program = LossProgram(loss, LocalRule(lr=0.1), Stream(batch=4))
    found = trained(choice("vmap"), program, sizes)
    if known is None:
        known = [] if len(sizes) == 3 else ["fc0.weight"]
    assert seen == [known]
    for one, other in zip(found, trained(choice("loop"), program, sizes), strict=True):
        assert held(one) == WIDE
        assert toys.distance(returned(one), other.result.update) < 1e-5


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_starts_are_never_written_to(way):
    """Whatever an algorithm's finish does with what it is given, in groups without a step, too."""

    def finish(start, mine, kept, inputs):
        for value in mine.values():
            value.mul_(2.0)
        return ClientResult(mine)

    program = replace(toys.loss_program(), finish=finish)
    sizes = [0, 0, 0, 8, 8]  # three side by side
    found = trained(choice(way), program, sizes, sums=False)
    wanted = trained(choice("loop"), program, sizes, sums=False)
    for one, other in zip(found, wanted, strict=True):
        assert toys.distance(one.result.update, other.result.update) < 1e-5


def test_one_step_of_one_client_by_hand():
    base = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = Factored(base, None, 2, LocalRule(lr=0.5, weight_decay=0.1), "blas")
    x = torch.tensor([[1.0, 1.0]])
    assert weight.outputs(x).tolist() == [[3.0, 7.0]] and weight.inputs(x).tolist() == [[4.0, 6.0]]
    weight.add(torch.tensor([[2.0], [0.0]]), x, None)  # the gradient [[2, 2], [0, 0]]
    # w <- 0.95 w - 0.5 g = [[-0.05, 0.9], [2.85, 3.8]]
    assert weight.outputs(x).tolist() == [[pytest.approx(0.85), pytest.approx(6.65)]]
    assert weight.finish().tolist() == [True]
    wanted = torch.tensor([[-0.05, 0.9], [2.85, 3.8]])
    torch.testing.assert_close(weight[0].dense(), wanted)
    assert weight.example().shape == (2, 2)


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_more_rows_than_a_layer_is_wide_are_not_held(way):
    def names(epochs: int) -> list[str]:
        program = toys.loss_program(stream=Stream(batch=4, epochs=epochs))
        one, other = map(held, trained(choice(way), program, [8, 8]))
        assert one == other
        return one

    assert [names(4), names(5), names(6)] == [WIDE, ["fc0.weight"], []]  # 32, 40 and 48 rows


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_it_goes_by_the_steps_that_a_client_should_have(way):
    """So that a trial of a few steps computes as the run will."""
    program = toys.loss_program(stream=Stream(batch=4, epochs=8))
    short = trained(choice(way), program, [8, 8], steps=[2, 2])
    assert [held(one) for one in short] == [[], []]


@pytest.mark.parametrize(
    ("chosen", "rule", "sums"),
    [
        (choice("traced", factored=False), LocalRule(), True),
        (choice("vmap", factored=False), LocalRule(), True),
        (choice("traced"), LocalRule(clip_norm=1.0), True),
        (choice("vmap"), LocalRule(clip_norm=1.0), True),
        (choice("traced"), LocalRule(), False),
        (choice("vmap"), LocalRule(), False),
        (choice("loop"), LocalRule(), True),
    ],
)
def test_otherwise_weights_are_written_out(chosen, rule, sums):
    """Not chosen, a joint norm, or somebody who looks at a client's weights."""
    found = trained(chosen, toys.loss_program(rule), [8, 6], sums=sums)
    wanted = trained(choice("loop"), toys.loss_program(rule), [8, 6])
    for one, other in zip(found, wanted, strict=True):
        assert not held(one)
        assert toys.distance(one.result.update, other.result.update) < 1e-5


def ridge(net, params, batch, noise, inputs):
    """A loss that looks at a weight itself."""
    scores = net(params, batch.x)
    rows = torch.nn.functional.cross_entropy(scores, batch.y, reduction="none")
    return batch.mean(rows) + 0.01 * params["fc0.weight"].square().sum(), {}


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_a_weight_that_a_loss_looks_at_is_written_out(way):
    program = LossProgram(ridge, LocalRule(lr=0.1), Stream(batch=4))
    found = trained(choice(way), program, [8, 6])
    wanted = trained(choice("loop"), program, [8, 6])
    for one, other in zip(found, wanted, strict=True):
        assert held(one) == ["fc1.weight"]
        assert toys.distance(returned(one), other.result.update) < 1e-5


def test_part_batches_of_layers_that_cannot_weigh_rows_go_through_autograd():
    class Odd(nn.BatchNorm1d):  # a norm whose padding nobody here could leave out
        pass

    layers = OrderedDict(fc=nn.Linear(40, 30), norm=Odd(30), head=nn.Linear(30, 5))
    net = chain("odd", nn.Sequential(layers), (40,))
    whole, part = trained(choice("traced"), toys.loss_program(), [8, 7], net)
    wanted = trained(choice("loop"), toys.loss_program(), [8, 7], net)
    assert held(whole) == ["fc.weight"] and not held(part)
    for one, other in zip((whole, part), wanted, strict=True):
        assert toys.distance(returned(one), other.result.update) < 1e-5


class OverTime(nn.Module):
    """A dense layer on each of four pieces of an example, then one on all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.head = nn.Linear(40, 48), nn.Linear(48 * 4, 36)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pieces = x.view(len(x), 4, 40)
        return self.head(torch.relu(self.each(pieces)).flatten(1))


@pytest.mark.parametrize("way", ["traced", "vmap"])
@pytest.mark.parametrize(
    ("size", "names"), [(8, ["each.weight", "head.weight"]), (16, ["head.weight"])]
)
def test_a_layer_may_see_several_rows_of_an_example(way, size, names):
    net = supernet(OverTime(), torch.zeros(2, 160))
    program = toys.loss_program()
    found = trained(choice(way), program, [size, size - 1], net)
    wanted = trained(choice("loop"), program, [size, size - 1], net)
    for one, other in zip(found, wanted, strict=True):
        assert held(one) == names
        assert toys.distance(returned(one), other.result.update) < 1e-5


def twice(net, params, batch, noise, inputs):
    """A loss that goes through the network twice: each gradient is a sum of two products."""
    scores = net(params, batch.x) + 0.5 * net(params, 0.9 * batch.x)
    rows = torch.nn.functional.cross_entropy(scores, batch.y, reduction="none")
    return batch.mean(rows), {}


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_layers_that_a_loss_runs_twice_are_written_out(way):
    program = LossProgram(twice, LocalRule(lr=0.1), Stream(batch=4))
    found = trained(choice(way), program, [8, 6])
    wanted = trained(choice("loop"), program, [8, 6])
    for one, other in zip(found, wanted, strict=True):
        assert not held(one)
        assert toys.distance(one.result.update, other.result.update) < 1e-5


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_in_bfloat16_large_layers_are_held_too(way):
    layers = OrderedDict(fc=nn.Linear(1100, 1000), act=nn.ReLU(), head=nn.Linear(1000, 5))
    net = chain("large", nn.Sequential(layers), (1100,))
    program = toys.loss_program(LocalRule(lr=0.01), Stream(batch=4))
    half, start = {"dtype": "bfloat16"}, net.init(0)["fc.weight"]
    found = trained(choice(way, **half), program, [12, 8], net)
    written = trained(choice(way, factored=False, **half), program, [12, 8], net)
    exact = trained(choice("loop"), program, [12, 8], net)
    for one, other, true in zip(found, written, exact, strict=True):
        assert held(one) == ["fc.weight"] and not held(other)
        moved, as_written, should = (
            returned(client)["fc.weight"] - start for client in (one, other, true)
        )
        error, error_written = ((m - should).norm() for m in (moved, as_written))
        assert error < 1.2 * error_written < 0.05 * should.norm()
        assert one.loss == pytest.approx(true.loss, rel=0.01)


# -- bundles


def bundle(way: str, sizes: list[int], rule: LocalRule | None = None, *, spoilt: int | None = None):
    algorithm = toys.OneProgram(
        toys.setting(NET), toys.loss_program(rule or LocalRule(), Stream(batch=4))
    )
    data = toys.all_train(sizes, NET.input_shape, 5)
    if spoilt is not None:
        data._x[sum(sizes[:spoilt])] = float("nan")
    tasks = [toys.task(NET, k, weight=1.0 + k, samples=n) for k, n in enumerate(sizes)]
    return toys.run_bundle(algorithm, tasks, data, NET.init(0), way, factored=True)


def summed(result) -> dict[str, torch.Tensor]:
    (part,) = result.update.parts.values()
    return part.total


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_a_bundle_sums_what_its_clients_returned(way):
    sizes = [8, 6, 12, 4, 8]
    found, wanted = bundle(way, sizes), bundle("loop", sizes)
    assert toys.distance(summed(found), summed(wanted)) < 1e-6
    for column in ("client", "steps", "bytes_up", "params", "flops", "status"):
        assert found.table[column].tolist() == wanted.table[column].tolist()


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_a_client_that_is_not_finite_leaves_no_trace_in_the_sum(way):
    sizes = [8, 8, 8, 8]
    found, wanted = bundle(way, sizes, spoilt=2), bundle("loop", sizes, spoilt=2)
    assert found.table["status"].tolist().index(SKIPPED) == 2
    assert found.update.clients == 3 and found.update.weight == wanted.update.weight
    assert toys.distance(summed(found), summed(wanted)) < 1e-6


@pytest.mark.parametrize("on_data", [False, True])
def test_a_last_step_that_overflows_is_seen(on_data):
    """Its loss was finite, and no other step follows that would tell."""
    base, rule = torch.zeros(2, 2), LocalRule(lr=1.0)
    left = torch.tensor([[[1e30], [0.0]], [[1.0], [0.0]]])
    right = torch.tensor([[[1e30, 0.0]], [[1.0, 0.0]]])
    known = OfData(base, right, 1, rule, "blas")
    weight = known if on_data else Factored(base, 2, 1, rule, "blas")
    weight.add(left, right, None)
    assert weight.finish().tolist() == [False, True]


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_runs_end_alike_for_any_number_of_hosts(way, tmp_path):
    def digest(workers: int, name: str) -> str:
        data = toys.all_train([8, 6, 7, 8, 5, 8, 4, 8], NET.input_shape, 5)
        algorithm = FedAvg(toys.setting(NET, rounds=3), width=1.0)
        options = {"engine": way, "cohort": 6, "bundle_clients": 2}
        job = toys.job(algorithm, data, **options)
        return toys.run(job, tmp_path / name, workers=workers)["params_sha256"]

    assert digest(1, "one") == digest(3, "three")


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_measuring_changes_nothing_that_is_trained(way, tmp_path):
    def digest(every: int) -> str:
        data = toys.federation([20, 16, 17, 18, 15, 18, 14, 18], NET.input_shape, 5)
        algorithm = FedAvg(toys.setting(NET, rounds=4), width=1.0)
        job = toys.job(algorithm, data, engine=way, cohort=6, eval_every=every)
        return toys.run(job, tmp_path / f"every{every}")["params_sha256"]

    assert digest(1) == digest(2) == digest(3)


@pytest.mark.parametrize("way", ["traced", "vmap"])
def test_the_local_test_sees_the_whole_network(way):
    data = toys.federation([20, 16, 17], NET.input_shape, 5)
    tasks = [toys.task(NET, k, samples=10) for k in range(3)]
    algorithm = toys.OneProgram(toys.setting(NET), toys.loss_program())
    tested = [
        toys.run_bundle(
            algorithm, tasks, data, NET.init(0), one, local_test=True, factored=True
        ).table["acc_local"]
        for one in (way, "loop")
    ]
    assert tested[0].tolist() == tested[1].tolist()
