"""Flat lists of kernels, hastened: fewer calls, the same bits, nothing shared that is given out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from subfleet.platform import calls
from subfleet.platform.calls import hasten

X = torch.arange(6.0).reshape(2, 3)


def hastened(function, *arguments):
    """The function traced, as it is and hastened, with what the hastened one calls."""
    plain, fast = (make_fx(function)(*arguments) for _ in range(2))
    hasten(fast)
    called = [node for node in fast.graph.nodes if node.op in ("call_function", "call_method")]
    return plain, fast, called


def test_what_never_changes_is_found_once():
    def scaled(x):
        return [x * (-(torch.ones_like(x) / 4)).t().contiguous().t()]

    _, fast, called = hastened(scaled, X)
    assert len(called) == 1  # the product alone
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

    plain, fast, called = hastened(gradient, weight, X, labels)
    before = [node for node in plain.graph.nodes if node.op == "call_function"]
    assert len(called) <= len(before) - 6
    overloads = [str(call.target) for call in called if "aten." in str(call.target)]
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


CUBE = torch.arange(-4.0, 4.0).reshape(2, 2, 2)
IMAGES = torch.arange(32.0).reshape(2, 1, 4, 4)
INDEX = torch.tensor([[0, 1, 1], [1, 0, 0]])


def same_as_plain(x):
    """Every operation that is called as a plain function, with the arguments that it may have."""
    turned, square = x.t(), x @ x.t()
    normed = torch.native_batch_norm(IMAGES * 1, None, None, None, None, True, 0.1, 1e-5)
    grouped = torch.native_group_norm(IMAGES * 1, None, None, 2, 1, 16, 1, 1e-5)
    scores = F.log_softmax(x, 1)
    return [
        *(
            square,
            torch.bmm(CUBE, CUBE + x[0, 0]),
            torch.conv2d(IMAGES * 1, torch.ones(1, 1, 2, 2)),
        ),
        torch.addmm(square, x, turned, beta=0.5, alpha=2),
        torch.baddbmm(CUBE, CUBE, CUBE, beta=0.5, alpha=-1.0),
        *(CUBE.relu(), (CUBE * 2).relu_(), CUBE.transpose(0, -1) + 1, CUBE.permute(2, 0, 1) + 1),
        *(x.unsqueeze(-1) * 2, IMAGES.squeeze(1) * 2, IMAGES[:1].squeeze((0, 1)) * 2, x[1] * 2),
        *(x.gather(0, INDEX % 2), x.scatter_add(0, INDEX % 2, x + 1)),
        *(-x, x.mean(), x.mean((0, 1), dtype=torch.float64), x.sum(1, keepdim=True)),
        *(x.sum(dtype=torch.float64), torch.add(x, x, alpha=3), x + 1, torch.sub(x, 2, alpha=2)),
        *(x * 2.5, x / 3, torch.div(x, 2, rounding_mode="floor"), x.sigmoid(), x.tanh()),
        *(x.exp(), (x + 1).log(), torch.where(x > 1, x, 0.0), torch.where(x > 1, x, turned.t())),
        *(torch.cat([x, x], 1), turned.clone(memory_format=torch.contiguous_format)),
        *(F.embedding(INDEX, x), scores, *normed, *grouped),
        torch._log_softmax_backward_data(x, scores, 1, torch.float32),
        *(x.view(3, 2) * 2, x[:1].expand(4, 3) * 2),
    ]


def test_plain_functions_give_the_bits_of_the_operations():
    plain, fast, _ = hastened(same_as_plain, X)
    found, wanted = fast(X + 0.5), plain(X + 0.5)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert one.equal(other)
    named = {
        str(node.target).split(".")[1] for node in plain.graph.nodes if "." in str(node.target)
    }
    assert named >= calls._FUNCTIONS | calls._METHODS


@pytest.mark.parametrize("function", [filled, filled_and_turned, written, written_through_a_view])
def test_what_somebody_writes_to_is_made_anew(function):
    _, fast, _ = hastened(function, X)
    for _ in range(3):
        (found,) = fast(X)
        assert torch.equal(found, function(X)[0])
        found.add_(7.0)  # whoever gets a gradient may use it up


def written_through_a_piece(x):
    made = torch.zeros_like(x)
    made.chunk(2, 0)[0].add_(1.0)
    return [made * x]


def written_unsaid(x):
    mean, var = x.new_zeros(3), x.new_ones(3)
    normed, *_ = torch.native_batch_norm(x, None, None, mean, var, True, 1.0, 1e-5)
    return [normed + mean.square()]


@pytest.mark.parametrize("function", [written_through_a_piece, written_unsaid])
def test_nothing_that_was_written_to_is_taken_for_constant(function):
    _, fast, _ = hastened(function, X)
    for scale in (1.0, 2.0, 2.0):
        assert torch.equal(fast(X * scale)[0], function(X * scale)[0])


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
    _, fast, called = hastened(lambda x: [x + torch.ones_like(x)], wide)
    assert len(called) == 2
    assert torch.equal(fast(wide)[0], torch.ones(300, 300))


def test_turning_twice_is_left_out():
    _, fast, called = hastened(lambda x: [x.t().t() * 2], X)
    assert len(called) == 1
    assert torch.equal(fast(X)[0], X * 2)
