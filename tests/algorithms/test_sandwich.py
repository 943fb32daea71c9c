"""The sandwich rule: its widths, its gradient, and a step against plain PyTorch on built slices."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
import torch.nn.functional as F
import toys
from torch.func import functional_call

from subfleet.algorithms.sandwich import Sandwich, distilled
from subfleet.core.program import Batch, LocalRule, Stream
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.platform import slimmed
from subfleet.platform.record import Choice, possible
from subfleet.platform.resident import Resident

CHOICE = Choice("any", "cpu", "loop", 1)


def sandwich(net: SuperNetwork, rule: LocalRule | None = None, **options) -> Sandwich:
    return Sandwich(net=net, rule=rule or LocalRule(lr=0.1), **{"seed": 3, "round": 2} | options)


# --- the loss --------------------------------------------------------------------------------


def batch(rows: int, weight=None) -> Batch:
    return Batch(torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64), weight)


def test_the_gradient_of_a_distilled_row_is_what_it_says_minus_what_it_is_taught():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    taught = torch.randn(5, 4, generator=generator, dtype=torch.float64).softmax(1)
    (grad,) = torch.autograd.grad(distilled(scores, taught, batch(5)), scores)
    torch.testing.assert_close(5 * grad, scores.detach().softmax(1) - taught)
    # Rows that pad a batch teach nothing, and are not counted.
    weight = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    (grad,) = torch.autograd.grad(distilled(scores, taught, batch(5, weight)), scores)
    torch.testing.assert_close(
        3 * grad, (scores.detach().softmax(1) - taught) * weight.unsqueeze(1)
    )


def test_who_agrees_learns_nothing():
    scores = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    taught = scores.detach().softmax(1)
    (grad,) = torch.autograd.grad(distilled(scores, taught, batch(5)), scores)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-15, rtol=0)


# --- the widths ------------------------------------------------------------------------------


def test_a_step_trains_the_narrowest_and_as_many_drawn_widths_as_asked():
    net = toys.mlp(hidden=(80, 40))
    for count in (2, 4, 6):
        for step in range(20):
            widths = sandwich(net, count=count, narrowest=0.3).widths(step)
            assert len(widths) == count - 1  # and the whole
            assert widths[0] == {"fc0": 24, "fc1": 12}
            for units in widths:
                assert 24 <= units["fc0"] <= 80 and 12 <= units["fc1"] <= 40


def test_half_of_the_drawn_widths_differ_from_group_to_group():
    net = toys.mlp(hidden=(1000, 1000))
    drawn = [sandwich(net).widths(step)[1:] for step in range(200)]
    apart = [units["fc0"] != units["fc1"] for units in chain.from_iterable(drawn)]
    assert 0.4 < sum(apart) / len(apart) < 0.6
    assert {len({*map(bool, pair)}) for pair in zip(apart[::2], apart[1::2], strict=True)} == {1, 2}
    alike = [sandwich(net, mixed=False).widths(step)[1:] for step in range(50)]
    assert all(units["fc0"] == units["fc1"] for units in chain.from_iterable(alike))
    spread = [units["fc0"] for units in chain.from_iterable(drawn)]
    assert min(spread) < 400 and max(spread) > 950


def test_widths_follow_from_seed_round_and_step():
    net = toys.mlp(hidden=(1000, 1000))
    wanted = sandwich(net).widths(7)
    assert sandwich(net).widths(7) == wanted
    for other in (sandwich(net).widths(8), sandwich(net, round=3).widths(7)):
        assert other[0] == wanted[0] and other[1:] != wanted[1:]
    assert sandwich(net, seed=4).widths(7)[1:] != wanted[1:]


def test_a_client_is_charged_for_every_width():
    """A linear layer of 100 units: a width costs its share; 1 + 0.2 + 2 * 0.6."""
    net = toys.mlp(dim=6, hidden=(100,), classes=3)
    assert sandwich(net, narrowest=0.2).program(Stream()).passes == pytest.approx(2.4)
    assert sandwich(net, narrowest=0.2, count=2).passes == pytest.approx(1.2)


# --- a step ----------------------------------------------------------------------------------


def trained(program, net, sizes=(9,), way="loop", data=None, **options):
    """What each client uploads, its loss and its steps."""
    shape = net.input_shape
    data = data or toys.all_train(list(sizes), shape, net.num_classes)
    tasks = [toys.task(net, i, samples=n) for i, n in enumerate(sizes)]
    return toys.each(net, program, tasks, data, net.init(5), way, round=2, seed=3, **options)


def by_hand(made: Sandwich, x, y, steps: int) -> dict[str, torch.Tensor]:
    """Slices built as small as they are, losses added up, torch's own SGD on the whole."""
    net, rule = made.net, made.rule
    params = {n: v for n, v in net.init(5).items() if n not in net.statistics}
    weights = {n: torch.nn.Parameter(v.clone()) for n, v in params.items()}
    optimizer = torch.optim.SGD(
        weights.values(), rule.lr, rule.momentum, weight_decay=rule.weight_decay
    )
    for step in range(steps):
        taught = None
        grads = {n: torch.zeros_like(w) for n, w in weights.items()}
        for units in [{}, *made.widths(step)]:
            map = IndexMap.prefix(units)
            module = net.module(map).train()
            own = net.space.extract({n: w.detach() for n, w in weights.items()}, map)
            module.load_state_dict(own | net.fresh_statistics(map))
            logs = module(x).log_softmax(1)
            if taught is None:
                taught = logs.detach().exp()
                F.nll_loss(logs, y).backward()
            else:
                (-(taught * logs).sum(1).mean()).backward()
            small = {n: p.grad for n, p in module.named_parameters()}
            net.space.scatter_add_(grads, small, map)
        for name, weight in weights.items():
            weight.grad = grads[name]
        optimizer.step()
    return {n: w.detach() for n, w in weights.items()}


NETS = {
    "norm": lambda: toys.mlp(norm=True),
    "plain": lambda: toys.mlp(),
    "images": lambda: toys.cnn("batch"),
    "group norm": lambda: toys.cnn("group"),
}


@pytest.mark.parametrize("small", [slimmed.SMALL_MACS, 0], ids=["masked", "built"])
@pytest.mark.parametrize(
    ("name", "way"),
    [*((name, "loop") for name in NETS), ("plain", "vmap"), ("group norm", "vmap")],
)
def test_steps_equal_plain_torch_on_built_slices(name, way, small, monkeypatch):
    monkeypatch.setattr(slimmed, "SMALL_MACS", small)
    net = NETS[name]()
    made = sandwich(net, LocalRule(lr=0.1, momentum=0.9, weight_decay=0.01), narrowest=0.4)
    assert way in possible(net, made.program(Stream()))
    data = toys.all_train([9], net.input_shape, net.num_classes)
    stream = Stream(batch=None, steps=3)
    ((update, _, steps),) = trained(made.program(stream), net, way=way, data=data)
    x, y, _ = data.block([0], "train")
    expected = by_hand(made, torch.from_numpy(x), torch.from_numpy(y), 3)
    assert steps == 3 and toys.distance(update, expected) < 1e-5


def test_when_every_width_is_the_whole_network_it_is_plain_training():
    """Two widths, both whole: the second agrees with the first and adds nothing."""
    net, rule = toys.mlp(norm=True), LocalRule(lr=0.3, momentum=0.5)
    made = sandwich(net, rule, narrowest=0.99, count=2)
    assert made.widths(0) == [{"fc0": 8, "fc1": 4}]
    stream = Stream(batch=4, epochs=2)
    ours = trained(made.program(stream), net, (9, 6))
    plain = trained(toys.loss_program(rule, stream), net, (9, 6))
    for (update, loss, steps), (wanted, loss_wanted, steps_wanted) in zip(ours, plain, strict=True):
        weights = {n: v for n, v in wanted.items() if n not in net.statistics}
        assert toys.distance(update, weights) < 1e-6
        assert loss == pytest.approx(loss_wanted, rel=1e-5) and steps == steps_wanted


def test_clients_of_uneven_steps_side_by_side_equal_one_by_one():
    net = toys.mlp()
    program = sandwich(net, LocalRule(lr=0.05, momentum=0.5)).program(Stream(batch=4, epochs=2))
    sizes = (13, 2, 20, 8)
    loop, mapped = (trained(program, net, sizes, way) for way in ("loop", "vmap"))
    assert [steps for _, _, steps in loop] == [8, 2, 10, 4]
    for (a, loss, steps), (b, loss_b, steps_b) in zip(loop, mapped, strict=True):
        assert toys.distance(a, b) < 1e-5
        assert loss == pytest.approx(loss_b, rel=1e-4) and steps == steps_b


def test_statistics_are_neither_written_nor_sent():
    net, data = toys.mlp(norm=True), toys.all_train([9, 6], (6,), 3)
    algorithm = toys.OneProgram(
        toys.setting(net),
        sandwich(net).program(Stream(batch=4)),
        "collect",
        own=net.fresh_statistics(toys.FULL),
    )
    tasks = [toys.task(net, i, samples=n) for i, n in enumerate((9, 6))]
    result = toys.run_bundle(algorithm, tasks, data, net.init(0))
    for item in result.collected or ():
        assert set(item.result.update) == net.parameters
        assert item.result.kept is None and item.result.local is None


# --- sub-networks of a resident --------------------------------------------------------------


def test_a_part_of_a_narrower_network_leaves_the_rest_alone():
    """Units beyond the part have no gradient; the resident's own statistics stay as they are."""
    net = toys.mlp(hidden=(8, 4), norm=True)
    map = IndexMap.prefix({"fc0": 6})
    resident = Resident(net, map, CHOICE)
    small = net.space.extract(net.init(4), map)
    weights = {n: v for n, v in small.items() if n not in net.statistics}
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    before = {n: v.clone() for n, v in resident.statistics.items()}

    def total(params):
        scores = resident.at({"fc0": 3, "fc1": 2})(params, x)
        return scores.square().sum(), scores

    grads, _, scores = resident.gradient(total, weights)
    part = IndexMap.prefix({"fc0": 3, "fc1": 2})
    module = net.module(part).train()
    module.load_state_dict(net.space.extract(net.init(4), part))
    torch.testing.assert_close(scores, module(x))
    assert grads.keys() == weights.keys()
    beyond = {
        "fc0.weight": grads["fc0.weight"][3:],
        "fc1.weight": grads["fc1.weight"][:, 3:],
        "fc1.bias": grads["fc1.bias"][2:],
        "norm0.weight": grads["norm0.weight"][3:],
        "head.weight": grads["head.weight"][:, 2:],
    }
    assert all(value.numel() and not value.any() for value in beyond.values())
    assert grads["fc0.weight"][:3].any() and grads["head.weight"][:, :2].any()
    assert toys.same_bits(dict(resident.statistics), before)


def test_the_whole_of_a_resident_is_what_it_makes_of_a_batch_in_training():
    net = toys.cnn("batch")
    resident = Resident(net, toys.FULL, CHOICE)
    params = net.init(2)
    x = torch.randn(5, 1, 8, 8)
    weights = {n: v for n, v in params.items() if n not in net.statistics}
    expected = functional_call(net.module().train(), params, (x,))
    torch.testing.assert_close(resident.at({})(weights, x), expected)


def test_modules_are_built_where_a_draw_is_forbidden():
    """Their parameters have no storage, and so initialisations have nothing to fill."""
    for net in (toys.mlp(norm=True), toys.cnn("batch")):
        built = []

        def step(x, net=net, built=built):
            built.append(net.module(IndexMap.prefix({net.elastic[0]: 2}), device="meta"))
            return x

        torch.func.vmap(step, randomness="error")(torch.zeros(3))
        (module,) = built
        shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
        wanted = net.space.slice_shapes(IndexMap.prefix({net.elastic[0]: 2}))
        assert shapes == {n: s for n, s in wanted.items() if n not in net.statistics}
        assert all(p.device.type == "meta" for p in module.parameters())
