"""MetaGater's backbones: the layers of the paper's figure, sizes, the same in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from subfleet.models import ZOO

A, B = (32, 64, 128), (64, 64, 128, 128, 256, 256)


@pytest.mark.parametrize(
    ("name", "channels", "pooled", "inputs"),
    [("metagater_a", A, (1, 2), (1, 28)), ("metagater_b", B, (2, 4), (3, 32))],
)
def test_layers_and_sizes(
    name: str, channels: tuple[int, ...], pooled: tuple[int, ...], inputs: tuple[int, int]
) -> None:
    net = ZOO[name]()
    assert dict(net.space.groups) == {f"conv{i}": c for i, c in enumerate(channels, start=1)}
    assert net.input_shape == (inputs[0], inputs[1], inputs[1]) and not net.statistics
    before, side = inputs
    params = macs = 0
    for i, after in enumerate(channels, start=1):
        params += 9 * before * after
        macs += 9 * before * after * side**2
        side //= 2 if i in pooled else 1
        before = after
    assert net.cost() == (params + 10 * before, macs + 10 * before)
    biases = sum(channels) + 10
    assert net.cost(count_bias=True).params == params + 10 * before + biases


@pytest.mark.parametrize(("name", "pooled"), [("metagater_a", (1, 2)), ("metagater_b", (2, 4))])
def test_what_they_compute(name: str, pooled: tuple[int, ...]) -> None:
    net = ZOO[name](input_shape=(3, 84, 84), num_classes=5, width=0.2)  # MiniImageNet's size
    w = net.init(0)
    module = net.module().eval()
    module.load_state_dict(w)
    x = images = torch.rand(2, 3, 84, 84, generator=torch.Generator().manual_seed(0))
    for i in range(1, len(net.elastic) + 1):
        x = F.relu(F.conv2d(x, w[f"conv{i}.weight"], w[f"conv{i}.bias"], padding=1))
        x = F.max_pool2d(x, 2) if i in pooled else x
    scores = F.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])
    torch.testing.assert_close(module(images), scores, rtol=1e-5, atol=1e-6)
