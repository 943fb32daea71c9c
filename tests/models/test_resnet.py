"""ResNets: reference counts, units, shortcuts, and the same networks in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subfleet.core.cost import cost
from subfleet.core.units import IndexMap, Unit
from subfleet.models import ZOO
from subfleet.models.blocks import StandardisedConv2d

TINY: dict[str, Any] = {"input_shape": (3, 64, 64), "num_classes": 200}
DWNP: dict[str, Any] = {"norm": "group", "standardise": True}
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet56": (9, 9, 9)}


@pytest.mark.parametrize(
    ("name", "options", "params", "macs"),
    [
        ("resnet56", {}, 853_018, 125_485_696),
        ("resnet56", DWNP, 853_018, 125_485_696),  # norms of either kind count alike
        ("resnet18", DWNP, 11_173_962, 555_422_720),
        ("resnet18", {}, 11_173_962, 555_422_720),
        ("resnet18", {"num_classes": 100}, 11_220_132, 555_468_800),
        ("resnet34", {}, 21_282_122, 1_159_402_496),
        ("resnet34", {"num_classes": 100}, 21_328_292, 1_159_448_576),
        ("resnet18", TINY, 11_271_432, 2_221_772_800),
        ("resnet34", TINY, 21_379_592, 4_637_691_904),
    ],
)
def test_reference_costs(name: str, options: dict[str, Any], params: int, macs: int) -> None:
    net = ZOO[name](**options)
    assert net.cost(count_bias=True, count_norm=True) == (params, macs)
    assert sum(p.numel() for p in net.module(device="meta").parameters()) == params


@pytest.mark.parametrize(
    ("name", "groups", "units"),
    [("resnet56", 27, 1_008), ("resnet18", 8, 1_920), ("resnet34", 16, 3_776)],
)
def test_gated_blocks_of_dwnp(name: str, groups: int, units: int) -> None:
    net = ZOO[name]()
    inner = {g: n for g, n in net.space.groups.items() if g.endswith(".first.conv")}
    assert len(inner) == groups and sum(inner.values()) == units
    gated = [row for row in net.layers if row.gated]
    assert len(gated) == 2 * groups, "both convolutions of each block, and no shortcut"
    total = cost(gated, net.space, None, "dwnp").macs
    # k^2 C_in c HW + 3cHW + k^2 c C_out HW + 3 C_out HW: linear in every c.
    for group in list(inner)[::5]:
        one, two = (
            cost(gated, net.space, IndexMap.prefix({group: n}), "dwnp").macs for n in (1, 2)
        )
        assert total == one + (inner[group] - 1) * (two - one)


def test_operations_of_dwnp_in_resnet56() -> None:
    net = ZOO["resnet56"]()
    assert all(group.endswith(".first.conv") for group in net.space.groups), "stages are fixed"
    gated = [row for row in net.layers if row.gated]
    total = cost(gated, net.space, None, "dwnp").macs
    assert total == 126_590_976
    half = IndexMap.prefix({group: n // 2 for group, n in net.space.groups.items()})
    assert cost(gated, net.space, half, "dwnp").macs / total == pytest.approx(0.503, abs=5e-4)


def test_all_conventions_by_hand() -> None:
    net = ZOO["resnet56"]()
    macs = net.cost().macs
    # Before each convolution of a block stands a ReLU; the image has none.
    inputs = [(16, 32)] * 19 + [(32, 16)] * 18 + [(64, 8)] * 17
    assert net.cost(convention="adds").macs == macs + sum(c * side**2 for c, side in inputs)
    outputs = [(16, 32)] * 18 + [(32, 16)] * 18 + [(64, 8)] * 18
    elements = sum(c * side**2 for c, side in outputs)
    assert net.cost(convention="dwnp").macs == macs + 3 * elements
    assert net.cost(convention="profiler").macs == macs + 2 * (elements + 16 * 32**2)


def test_units_of_stages_and_blocks() -> None:
    net = ZOO["resnet18"]()
    stages = {"stem.conv", *(f"layer{i}.0.second.conv" for i in (2, 3, 4))}
    assert {g for g in net.space.groups if not g.endswith(".first.conv")} == stages
    assert net.space.axes["layer1.1.second.conv.weight"][0] == Unit("stem.conv")
    assert net.space.axes["layer2.0.shortcut.conv.weight"][:2] == (
        Unit("layer2.0.second.conv"),
        Unit("stem.conv"),
    )


# --- what they compute ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("group", [False, True])
def test_resnets_in_plain_torch(name: str, group: bool) -> None:
    net = ZOO[name](num_classes=5, width=0.1, **(DWNP if group else {}))
    generator = torch.Generator().manual_seed(0)
    w = {
        leaf: tensor.double() + 0.2 * torch.rand(tensor.shape, generator=generator).double()
        for leaf, tensor in net.init(0).items()
    }
    module = net.module().double().eval()
    module.load_state_dict(w)

    def conv(path: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = w[f"{path}.conv.weight"]
        if group and weight.shape[2] == 3:  # mean 0 and deviation 1 for each output
            rows = weight.flatten(1)
            rows = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
            weight = rows.view_as(weight)
        x = F.conv2d(x, weight, None, stride, weight.shape[2] // 2)
        own = [w[f"{path}.norm.{leaf}"] for leaf in ("weight", "bias")]
        if group:
            return F.layer_norm(x, x.shape[1:]) * own[0][:, None, None] + own[1][:, None, None]
        statistics = [w[f"{path}.norm.{leaf}"] for leaf in ("running_mean", "running_var")]
        return F.batch_norm(x, *statistics, *own)

    images = torch.randn(2, 3, 28, 28, generator=generator).double()
    x = F.relu(conv("stem", images))
    for stage, depth in enumerate(BLOCKS[name], start=1):
        for i in range(depth):
            block, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            out = conv(f"{block}.second", F.relu(conv(f"{block}.first", x, stride)))
            if stride == 2 and name == "resnet56":
                small = F.avg_pool2d(x, 2, ceil_mode=True)
                x = torch.zeros_like(out)
                x[:, : small.shape[1]] = small
            elif f"{block}.shortcut.conv.weight" in w:
                x = conv(f"{block}.shortcut", x, stride)
            x = F.relu(out + x)
    scores = F.linear(x.mean((2, 3)), w["head.fc.weight"], w["head.fc.bias"])
    torch.testing.assert_close(module(images), scores)


def test_standardised_weights_are_those_of_the_kept_inputs() -> None:
    conv = StandardisedConv2d(6, 4, 3, bias=False).double()
    torch.nn.init.normal_(conv.weight, mean=3.0, std=2.0)
    weight = conv.standardised(conv.weight)
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(4).double())
    torch.testing.assert_close(weight.std((1, 2, 3)), torch.ones(4).double(), rtol=1e-4, atol=0)
    small = conv.standardised(conv.weight[:, :3])
    assert (small - weight[:, :3]).abs().max() > 0.01, "a slice is standardised anew"
    # The scale of the weights does not matter, as in a layer with a norm behind it.
    torch.testing.assert_close(conv.standardised(7 * conv.weight + 1), weight, rtol=1e-4, atol=1e-4)
