"""What went through a module's layers."""

import torch
from torch import nn
from torch.func import functional_call, vmap

from subfleet.core.watching import watched


def net():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 1)))


def test_layers_come_in_order_with_their_tensors():
    module, x = net(), torch.randn(5, 2)
    scores, passed = watched(module, lambda: module(x))
    assert [p.name for p in passed] == ["0", "1", "2.0"]
    assert passed[0].input is x and passed[-1].output is scores
    assert torch.equal(passed[1].output, passed[0].output.relu())


def test_nothing_is_left_on_the_module():
    module = net()
    watched(module, lambda: module(torch.zeros(1, 2)))
    assert not any(part._forward_hooks for part in module.modules())


def test_clients_side_by_side():
    module, x = net(), torch.randn(4, 5, 2)
    params = {n: torch.randn(4, *p.shape) for n, p in module.named_parameters()}

    def hidden(params, x):
        _, passed = watched(module, lambda: functional_call(module, params, (x,)))
        return passed[2].input

    expected = (x @ params["0.weight"].mT + params["0.bias"].unsqueeze(1)).relu()
    assert torch.allclose(vmap(hidden)(params, x), expected, atol=1e-6)
