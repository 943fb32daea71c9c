from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from subfleet.models import chain
from subfleet.platform import products
from subfleet.platform.record import candidates

needs_onednn = pytest.mark.skipif(not products.has_onednn(), reason="this torch has no oneDNN")


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-3)


@needs_onednn
@pytest.mark.parametrize("rows", [3, 80])  # below and above what is worth oneDNN's while
@pytest.mark.parametrize("library", ["blas", "onednn"])
def test_both_libraries_multiply(library, rows):
    x, w = torch.randn(rows, 300), torch.randn(100, 300)
    wanted = x.double() @ w.double().t()
    close(products.linear(library)(x, w), wanted)
    close(products.linear(library)(x, w.t().contiguous().t()), wanted)  # stored the other way
    close(products.outer(library)(x.t().contiguous(), w.t().contiguous()), wanted)


@needs_onednn
def test_large_products_of_a_traced_graph_go_to_onednn():
    def layers(x, w, b, small):
        return torch.addmm(b, x, w.t()), x @ w.t(), (x.bfloat16() @ w.bfloat16().t()), x @ small

    tensors = torch.randn(80, 300), torch.randn(100, 300), torch.randn(100), torch.randn(300, 2)
    module = make_fx(layers)(*tensors)
    wanted = module(*tensors)
    products.by_onednn(module)
    module.recompile()
    named = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert named.count(products._onednn) == 2
    assert named.count(torch.ops.aten.mm.default) == 2, "bfloat16's, and the small one"
    for found, before in zip(module(*tensors), wanted, strict=True):
        torch.testing.assert_close(found, before, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_it_is_tried_where_a_layer_is_large_enough():
    def named(hidden: int, device: str = "cpu") -> list[str]:
        layers = OrderedDict(fc=nn.Linear(784, hidden), out=nn.Linear(hidden, 9))
        net = chain("dense", nn.Sequential(layers), (784,))
        ways = frozenset({"loop", "traced"})
        options = {"ways": ways, "round": 1}
        return [c.name for c in candidates(net, (1,), device, "auto", "float32", **options)]

    assert named(2048) == ["traced by onednn", "traced", "loop"]
    assert named(64) == ["traced", "loop"] == named(2048, "cuda")
