"""MobileNets: the papers' sizes and counts, units, and the same networks in plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from subfleet.core.budget import uniform_map
from subfleet.core.cost import Cost, cost, cost_table
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap, Unit
from subfleet.models import ZOO
from subfleet.models.mobilenet import make_divisible

Params = dict[str, Tensor]


def of_kind(net: SuperNetwork, *kinds: str, convention="macs") -> Cost:
    """The cost of the layers of some kinds."""
    return cost([row for row in net.layers if row.kind in kinds], net.space, None, convention)


def batch_norm(w: Params, name: str, x: Tensor) -> Tensor:
    leaves = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(w[f"{name}.{leaf}"] for leaf in leaves))


def loaded(net: SuperNetwork, seed: int = 0) -> tuple[torch.nn.Module, Params]:
    """The network in evaluation, and its tensors, none of them as a fresh norm has it."""
    generator = torch.Generator().manual_seed(seed)
    w = {
        name: tensor.double() + 0.2 * torch.rand(tensor.shape, generator=generator).double()
        for name, tensor in net.init(seed).items()
    }
    module = net.module().double().eval()
    module.load_state_dict(w)
    return module, w


# --- ADDS -----------------------------------------------------------------------------------------


def test_adds_table_2() -> None:
    net = ZOO["adds_mobilenet"](num_classes=62)  # the table counts 62 classes, the task has 2
    assert of_kind(net, "linear").params == 9_500_672
    convs = of_kind(net, "conv", "depthwise")
    assert convs == (444_544, 114_978_304)
    assert convs.params == pytest.approx(444.63e3, rel=5e-4)
    assert convs.macs == pytest.approx(114.96e6, rel=5e-4)
    assert net.cost() == (9_945_216, 124_478_976)
    assert net.cost().params == pytest.approx(9.95e6, rel=5e-4)
    assert net.cost().macs == pytest.approx(124.46e6, rel=5e-4)
    # The table's figure is below that of the multiply-accumulates alone: unlike for the VGG
    # network it cannot hold an operation for each ReLU too, which would be 0.7 % more.
    relus = 3 * 112**2 + 2 * (64 * 56**2 + 128 * 28**2 + 256 * 14**2 + 512 * 7**2)
    assert of_kind(net, "conv", "depthwise", convention="adds").macs == convs.macs + relus


def test_adds_task_has_two_classes_and_seven_groups() -> None:
    net = ZOO["adds_mobilenet"]()
    assert of_kind(net, "linear").params == 9_439_232
    assert list(net.space.groups) == ["conv1", "pw2", "pw3", "pw4", "pw5", "fc1", "fc2"]
    assert net.space.num_units == 3_520
    assert IndexMap.of({"conv1": [1]}).wire_bytes(net.space) == 440
    assert net.space.axes["dw3.weight"][0] == Unit("pw2"), "a filter belongs to its input"


def test_adds_network_in_plain_torch() -> None:
    net = ZOO["adds_mobilenet"](input_shape=(3, 30, 30), num_classes=4, width=0.05)
    module, w = loaded(net)
    x = images = torch.randn(2, 3, 30, 30, generator=torch.Generator().manual_seed(1)).double()
    for i in range(1, 6):
        steps = ["conv1"] if i == 1 else [f"dw{i}", f"pw{i}"]
        for step in steps:
            weight = w[f"{step}.weight"]
            groups = len(weight) if step.startswith("dw") else 1
            x = F.conv2d(F.relu(x), weight, padding=weight.shape[2] // 2, groups=groups)
            x = batch_norm(w, f"norm_{step}", x)
        x = F.max_pool2d(x, 2, ceil_mode=True)
    x = x.flatten(1)
    for i in (1, 2, 3):
        x = F.linear(F.relu(x), w[f"fc{i}.weight"], w[f"fc{i}.bias"])
    torch.testing.assert_close(module(images), x)


# --- MobileNetV2 ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "classes", "params", "macs"),
    [
        (1.0, 10, 2_236_682, 87_976_448),
        (0.75, 10, 1_368_234, 59_310_080),
        (0.5, 10, 700_490, 27_969_024),
        (1.0, 100, 2_351_972, 88_091_648),
        (0.75, 100, 1_483_524, 59_425_280),
        (0.5, 100, 815_780, 28_084_224),
    ],
)
def test_reference_costs(width: float, classes: int, params: int, macs: int) -> None:
    norm = "batch" if classes == 10 else "group"  # count alike
    net = ZOO["mobilenet_v2"](width=width, num_classes=classes, norm=norm)
    assert net.cost(count_bias=True, count_norm=True) == (params, macs)
    held = sum(p.numel() for p in net.module(device="meta").parameters())
    assert held == params


def test_uniform_sub_networks_cost_what_the_narrower_models_do() -> None:
    net = ZOO["mobilenet_v2"]()
    for width, costs in ((0.75, (1_368_234, 59_310_080)), (0.5, (700_490, 27_969_024))):
        map = uniform_map(net, width)
        assert map.is_prefix
        assert net.cost(map, count_bias=True, count_norm=True) == costs
    assert uniform_map(net, 1.0) == IndexMap.full()


def test_uniform_sub_networks_whose_stages_become_equally_wide() -> None:
    """At x 0.25 the first two stages have 8 channels each, where the whole has 16 and 24.

    A model of that width would add the one to the other; here they stay two groups.
    """
    net = ZOO["mobilenet_v2"](variant="dwnp")
    kept = uniform_map(net, 0.25).kept
    assert set(kept) == set(net.elastic)
    stages = [len(kept[f"blocks.{i}.project.conv"]) for i in (0, 1, 3, 6, 10, 13, 16)]
    assert stages == [make_divisible(c * 0.25) for c in (16, 24, 32, 64, 96, 160, 320)]
    assert stages[:2] == [8, 8] and len(kept["blocks.3.expand.conv"]) == 6 * 8


def test_all_conventions_by_hand() -> None:
    net = ZOO["mobilenet_v2"]()
    macs = net.cost().macs
    # An element of each ReLU6 that stands directly before a convolution: the depthwise and
    # projecting ones of the 17 blocks; none before an expansion, nor before the head.
    relus = 32 * 32**2 + 32 * 32**2  # the first block: stem -> depthwise -> projection
    hidden = [  # hidden width, side before the depthwise convolution, side after
        *((6 * 16, 32, 32), (6 * 24, 32, 32), (6 * 24, 32, 16)),
        *[(6 * 32, 16, 16)] * 2,
        *((6 * 32, 16, 8), *[(6 * 64, 8, 8)] * 4, *[(6 * 96, 8, 8)] * 2),
        *((6 * 96, 8, 4), *[(6 * 160, 4, 4)] * 3),
    ]
    assert len(hidden) == 16
    relus += sum(c * (before**2 + after**2) for c, before, after in hidden)
    assert net.cost(convention="adds").macs == macs + relus
    outputs = [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3 + [320]
    gates = 3 * sum(
        c * before**2 + c * after**2 + o * after**2
        for (c, before, after), o in zip(hidden, outputs, strict=True)
    )
    assert net.cost(convention="dwnp").macs == macs + gates
    norms = [row for row in net.layers if row.kind == "norm"]
    assert len(norms) == 1 + 2 + 3 * 16 + 1
    table = cost_table(net.layers, net.space, None, "profiler")
    spent = sum(c.macs for row, c in table if row.kind == "norm")
    assert net.cost(convention="profiler").macs == macs + spent > macs


def test_variant_of_dwnp() -> None:
    net = ZOO["mobilenet_v2"](variant="dwnp")
    assert net.cost(count_bias=True, count_norm=True) == (2_297_754, 304_075_264)
    gated = [row for row in net.layers if row.gated]
    assert len(gated) == 3 * 17, "expansion, depthwise and projection of every block"
    # C_in c HW + 3cHW + 9cH'W' + 3cH'W' + c C_out H'W' + 3 C_out H'W' of each block.
    total, before, side = 0, 32, 32
    for t, after, depth, stride in [
        *((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 1), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ]:
        for step in [stride] + [1] * (depth - 1):
            c, area, small = t * before, side**2, (side // step) ** 2
            total += before * c * area + 3 * c * area + 9 * c * small + 3 * c * small
            total += c * after * small + 3 * after * small
            before, side = after, side // step
    assert cost(gated, net.space, None, "dwnp").macs == total


def test_units() -> None:
    net = ZOO["mobilenet_v2"]()
    groups = dict(net.space.groups)
    stages = {f"blocks.{i}.project.conv" for i in (0, 1, 3, 6, 10, 13, 16)}
    hidden = {f"blocks.{i}.expand.conv" for i in range(1, 17)}
    assert set(groups) == {"stem.conv"} | stages | hidden and len(groups) == 24
    assert net.space.axes["blocks.0.depthwise.conv.weight"][0] == Unit("stem.conv")
    for i in (7, 8, 9):  # the skips of a stage
        assert net.space.axes[f"blocks.{i}.project.norm.bias"] == (Unit("blocks.6.project.conv"),)
    assert net.space.axes["blocks.4.depthwise.norm.weight"] == (Unit("blocks.4.expand.conv"),)


def test_widths_are_multiples_of_the_divisor() -> None:
    assert [make_divisible(c * 0.75) for c in (16, 24, 32, 64, 96, 160, 320)] == [
        *(16, 24, 24, 48, 72, 120, 240)
    ]
    assert [make_divisible(c * 0.25, 2) for c in (16, 24, 32, 64, 96, 160, 320)] == [
        *(4, 6, 8, 16, 24, 40, 80)
    ]
    assert make_divisible(11.9, 8) == 16, "8 would be below 0.9 of it"
    net = ZOO["mobilenet_v2"](width=0.25, divisor=2, stem_stride=2)
    assert net.space.shapes["blocks.16.project.conv.weight"][:2] == (80, 6 * 40)
    assert net.space.shapes["head.conv.weight"][:2] == (1280, 80)
    stem, first = net.layers[0], net.layers[2]
    assert stem.positions == 16**2 == first.positions
    wide = ZOO["mobilenet_v2"](width=1.4)
    assert wide.space.shapes["head.conv.weight"][:2] == (1792, 448)


@pytest.mark.parametrize("variant", ["plain", "dwnp"])
def test_mobilenet_v2_in_plain_torch(variant: str) -> None:
    net = ZOO["mobilenet_v2"](num_classes=5, width=0.25, divisor=2, variant=variant)
    module, w = loaded(net)
    act = F.relu if variant == "dwnp" else F.relu6

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = w[f"{name}.conv.weight"]
        groups = len(weight) if "depthwise" in name else 1
        x = F.conv2d(x, weight, None, stride, weight.shape[2] // 2, groups=groups)
        return batch_norm(w, f"{name}.norm", x)

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    x = act(conv("stem", images))
    halving = {6, 13} if variant == "dwnp" else {3, 6, 13}
    for i in range(17):
        stride, block = 2 if i in halving else 1, f"blocks.{i}"
        hidden = act(conv(f"{block}.expand", x)) if f"{block}.expand.conv.weight" in w else x
        hidden = act(conv(f"{block}.depthwise", hidden, stride))
        out = conv(f"{block}.project", hidden)
        if f"{block}.shortcut.conv.weight" in w:
            out = out + conv(f"{block}.shortcut", x)
        elif stride == 1 and i not in (0, 1, 10, 16):
            out = out + x
        x = out
    x = act(conv("head", x)).mean((2, 3))
    x = F.linear(x, w["scores.fc.weight"], w["scores.fc.bias"])
    torch.testing.assert_close(module(images), x)


def test_the_network_of_a_width_is_the_model_of_that_width() -> None:
    """Also where two stages round to the same width, and the model has a skip between them."""
    net = ZOO["mobilenet_v2"](width=0.1, divisor=2)
    for width in (0.75, 0.5, 0.35):
        thin = ZOO["mobilenet_v2"](width=0.1 * width, divisor=2)
        assert net.space.slice_shapes(uniform_map(net, width)) == dict(thin.space.shapes)
    assert len(ZOO["mobilenet_v2"](width=0.05, divisor=2).elastic) < len(net.elastic)
