"""Flat lists of kernels, hastened: fewer calls, the same bits, nothing shared that is given out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from subfleet.platform.calls import hasten

X = torch.arange(6.0).reshape(2, 3)


def hastened(function, *arguments):
    """The function traced, as it is and hastened, with what the hastened one calls."""
    plain, fast = (make_fx(function)(*arguments) for _ in range(2))
    hasten(fast)
    calls = [node for node in fast.graph.nodes if node.op in ("call_function", "call_method")]
    return plain, fast, calls


def test_what_never_changes_is_found_once():
    def scaled(x):
        return [x * (-(torch.ones_like(x) / 4)).t().contiguous().t()]

    _, fast, calls = hastened(scaled, X)
    assert len(calls) == 1  # the product alone
    for x in (X, X + 1):
        assert torch.equal(fast(x)[0], x * -0.25)


def test_the_step_of_a_cross_entropy_keeps_its_bits():
    torch.manual_seed(1)
    labels, weight = torch.tensor([2, 0]), torch.randn(3, 3)

    def gradient(weight, x, labels):
        return list(torch.func.grad_and_value(loss)(weight, x, labels))

    def loss(weight, x, labels):
        scores = F.log_softmax(x @ weight.t(), dim=1)
        return -scores.gather(1, labels[:, None]).squeeze(1).mean()

    plain, fast, calls = hastened(gradient, weight, X, labels)
    before = [node for node in plain.graph.nodes if node.op == "call_function"]
    assert len(calls) <= len(before) - 6
    overloads = [str(call.target) for call in calls if "aten." in str(call.target)]
    assert overloads == []  # torch offers all of these as plain functions
    for scale in (1.0, 3.0):
        found, wanted = (run(weight * scale, X, labels) for run in (fast, plain))
        assert all(map(torch.equal, found, wanted))


def filled(x):
    return [torch.zeros_like(x)]


def filled_and_turned(x):
    return [torch.zeros_like(x).t()]


def written(x):
    made = torch.zeros_like(x)
    made.add_(x)
    return [made + 0]


def written_through_a_view(x):
    made = torch.zeros_like(x)
    made.view(-1).add_(1.0)
    return [made * x]


@pytest.mark.parametrize("function", [filled, filled_and_turned, written, written_through_a_view])
def test_what_somebody_writes_to_is_made_anew(function):
    _, fast, _ = hastened(function, X)
    for _ in range(3):
        (found,) = fast(X)
        assert torch.equal(found, function(X)[0])
        found.add_(7.0)  # whoever gets a gradient may use it up


def test_draws_are_not_held():
    torch.manual_seed(1)

    def drawn(x):
        return [x + torch.bernoulli(torch.full_like(x, 0.5)), x + torch.rand(2, 3)]

    _, fast, _ = hastened(drawn, X)
    first, second = zip(*(fast(X) for _ in range(8)), strict=True)
    assert len({tuple(one.flatten().tolist()) for one in first}) > 1
    assert len({tuple(one.flatten().tolist()) for one in second}) == 8


def test_what_is_large_is_not_held():
    wide = torch.zeros(300, 300)
    _, fast, calls = hastened(lambda x: [x + torch.ones_like(x)], wide)
    assert len(calls) == 2
    assert torch.equal(fast(wide)[0], torch.ones(300, 300))


def test_turning_twice_is_left_out():
    _, fast, calls = hastened(lambda x: [x.t().t() * 2], X)
    assert len(calls) == 1
    assert torch.equal(fast(X)[0], X * 2)
