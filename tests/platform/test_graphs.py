"""Rewrites of traced gradients: the same numbers by fewer passes over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx

from subfleet.platform.graphs import tidy


def tidied(function, *arguments):
    """The function traced, as it is and tidied."""
    plain, tidy_one = (make_fx(function)(*arguments) for _ in range(2))
    tidy(tidy_one)
    return plain, tidy_one


def called(module, name):
    return [node for node in module.graph.nodes if name in str(node.target)]


def test_a_relu_moves_behind_the_pool_with_its_gradient():
    def gradient(x):
        return [torch.func.grad(lambda x: F.max_pool2d(F.relu(x * 1.5), 2).square().sum())(x)]

    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    plain, fast = tidied(gradient, x)
    (pool,) = called(fast, "max_pool2d_with_indices.default")
    assert "mul" in str(pool.args[0].target)
    assert torch.equal(plain(x)[0], fast(x)[0])
