"""What tracing keeps whole, and says so; what it refuses; what annotations change."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable

import plain_modules
import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from subfleet.core.bindings import Block, Concat, Free, Gates, Unit
from subfleet.core.budget import width_map
from subfleet.core.cost import CONVENTIONS
from subfleet.core.errors import InputError
from subfleet.core.supernet import has_dropout
from subfleet.core.units import IndexMap
from subfleet.models import ZOO, explain, supernet
from subfleet.platform.record import possible

IMAGE = torch.zeros(1, 2, 6, 6)
AT = r"at test_tracing_limits\.py:\d+"
LINE = rf"the code writes this width out {AT}: "


class Net(nn.Module):
    """Two convolutions with a function of the test's between them, and a head."""

    def __init__(self, between: Callable[[Tensor], Tensor], channels: int = 4, **parts: nn.Module):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 1), nn.Conv2d(channels, 6, 1)
        self.head = nn.Linear(6, 3)
        self.between = between
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.between(self.one(x))).amax((2, 3)))


def groups(module: nn.Module, example: Tensor = IMAGE, **options) -> dict[str, int]:
    return dict(supernet(module, example, **options).space.groups)


def test_bindings_of_layers_of_every_kind() -> None:
    axes = supernet(plain_modules.Concats(), IMAGE).space.axes
    both = Concat((Unit("stem"), Unit("a"), Unit("b")))
    assert axes["bn.running_var"] == (both,) and axes["mix.weight"][:2] == (Unit("mix"), both)
    assert axes["fc.weight"] == (
        Free(3),
        Concat((Block("stem", 9), Block("a", 9), Block("b", 9), Block("mix", 9))),
    )
    axes = supernet(plain_modules.BiLSTM(), torch.zeros(1, 4, dtype=torch.int64)).space.axes
    assert axes["embedding.weight"] == (Free(11), Unit("embedding"))
    assert axes["lstm.weight_ih_l0"] == (Gates("lstm"), Unit("embedding"))
    assert axes["lstm.weight_ih_l1_reverse"] == (
        Gates("lstm"),
        Concat((Unit("lstm"), Unit("lstm"))),
    )
    assert axes["fc1.weight"] == (Unit("fc1"), Concat((Unit("lstm"), Unit("lstm"))))
    axes = supernet(plain_modules.Separable(), torch.zeros(1, 1, 9, 9)).space.axes
    assert axes["depthwise.weight"] == (Unit("stem"), Free(1), Free(3), Free(3))
    assert axes["twice.weight"][0] == axes["excite.bias"][0] == Block("point", 2)
    axes = supernet(plain_modules.Padded(), torch.zeros(1, 1, 6, 6)).space.axes
    assert axes["conv2.bias"] == (Concat((Free(2), Unit("stem"), Free(2))),)


def test_groups_of_torchvisions_networks() -> None:
    net = supernet(plain_modules.resnet18(), torch.zeros(1, 3, 32, 32))
    assert len(net.elastic) == 12 and net.space.axes["layer1.1.conv2.weight"][0] == Unit("conv1")
    assert net.space.axes["layer2.0.downsample.0.weight"][:2] == (
        Unit("layer2.0.conv2"),
        Unit("conv1"),
    )
    net = supernet(plain_modules.mobilenet_v2(), torch.zeros(1, 3, 32, 32))
    assert len(net.elastic) == 25
    hidden = Unit("features.2.conv.0.0")
    assert net.space.axes["features.2.conv.1.0.weight"][0] == hidden
    assert net.space.axes["features.2.conv.2.weight"][:2] == (Unit("features.2.conv.2"), hidden)


# --- kept whole -----------------------------------------------------------------------------------


class Hard(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv2d(2, 4, 1), nn.Linear(144, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.conv(x).view(-1, 4 * 36)).relu())


@pytest.mark.parametrize(
    ("module", "left", "layer", "says"),
    [
        (Net(lambda x: x.flip(1)), {"two"}, "one", "flip is not known to keep units apart"),
        (Net(lambda x: x[:, :2], 2), {"two"}, "one", "an index takes it apart"),
        (Net(lambda x: x.view(-1, 2, 2, 6, 6).flatten(1, 2)), {"two"}, "one", "view splits it"),
        (Net(lambda x: x + torch.ones(4, 1, 1, device=x.device)), {"two"}, "one", "add joins"),
        (Net(lambda x: F.group_norm(x, 2)), {"two"}, "one", "a group norm of 2 groups"),
        (Net(lambda x: F.pixel_shuffle(x, 2), 1), {"two"}, "one", "pixel_shuffle is not known"),
        (Hard(), {"fc"}, "conv", LINE + r"shape .* is invalid .*; write x\.flatten\(1\) instead"),
        (
            Net(lambda x: x if x.shape[1] == 4 else x.relu()),
            {"two"},
            "one",
            "at another width the code calls other",
        ),
    ],
)
def test_units_that_cannot_be_cut_stay_whole(module, left, layer, says) -> None:
    net = supernet(module, IMAGE)
    assert set(net.space.groups) == left
    found = {finding.layer: finding for finding in explain(module, IMAGE)}
    assert found[layer].groups == ()
    assert re.search(says, found[layer].reason), found[layer].reason
    small = net.module(width_map(net, 0.5)).eval()
    assert small(IMAGE).shape == (1, 3)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 8, 3, groups=2)
        self.c, self.fc = nn.Conv2d(8, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(self.b(self.a(x)).relu()).mean((2, 3)))


def test_grouped_convolutions_keep_both_sides_and_cost_what_they_cost() -> None:
    net = supernet(Grouped(), IMAGE)
    assert dict(net.space.groups) == {"c": 5}
    kept = IndexMap.prefix({"c": 2})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.module(kept).eval()(IMAGE)
    assert net.cost(kept).macs * 2 == counter.get_total_flops()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.head = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.up(x).relu().mean(1))


def test_layers_that_are_not_understood_are_reported() -> None:
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    net = supernet(Attention(), tokens)
    assert dict(net.space.groups) == {"up": 6}
    reasons = {f.layer: f.reason for f in explain(Attention(), tokens)}
    assert "multi_head_attention_forward is not known" in reasons["embedding"]
    assert "nor its cost counted" in reasons["attention"]
    assert net.module(width_map(net, 0.5)).eval()(tokens).shape == (1, 3)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised over all that one output reads."""

    def forward(self, input: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        spread = self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        return self._conv_forward(input, (self.weight - mean) / spread, self.bias)


def test_standardised_weights_are_cut_as_weights() -> None:
    net = supernet(nn.Sequential(Standardised(2, 4, 3), Standardised(4, 6, 3), nn.Flatten(),
                                 nn.Linear(24, 3)), IMAGE)  # fmt: skip
    assert dict(net.space.groups) == {"0": 4, "1": 6}
    small = net.module(IndexMap.of({"0": [1, 3], "1": [0, 2]}))
    assert small[1].in_channels == 2 and small(IMAGE).shape == (1, 3)


class Stateful(nn.Module):
    """An LSTM whose first state the module's own code makes, of a size it knows or asks for."""

    def __init__(self, known: bool) -> None:
        super().__init__()
        self.lstm, self.fc, self.known = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2), known

    def forward(self, x: Tensor) -> Tensor:
        start = torch.zeros(1, x.size(0), 5 if self.known else self.lstm.hidden_size)
        return self.fc(self.lstm(x, (start, start))[0][:, -1])


def test_sizes_written_out_in_code_keep_a_width() -> None:
    x = torch.zeros(1, 4, 3)
    assert groups(Stateful(known=False), x) == {"lstm": 5}
    assert groups(Stateful(known=True), x) == {}
    reason = explain(Stateful(known=True), x)[0].reason
    assert re.match(LINE, reason) and reason.endswith("own size, instead (at 'lstm')")


# --- constants ------------------------------------------------------------------------------------


class Constants(nn.Module):
    """A frozen embedding, a table in the state dictionary, and a norm that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.embedding.weight.requires_grad_(False)
        self.register_buffer("table", torch.arange(4.0))
        self.fc1, self.norm, self.fc2 = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x).mean(1) + self.table
        return self.fc2(F.relu(self.norm(self.fc1(x))))


def test_frozen_tensors_and_buffers_are_constants() -> None:
    module, tokens = Constants(), torch.tensor([[1, 2]])
    net = pickle.loads(pickle.dumps(supernet(module, tokens)))
    assert set(net.space.shapes) == {
        *("fc1.weight", "fc1.bias", "norm.weight", "norm.bias", "fc2.weight", "fc2.bias")
    }
    start = net.init(0)
    assert not start["norm.weight"].any()  # as in the user's module, though a norm resets to 1
    start["norm.weight"].fill_(0.5)
    small = net.module()
    small.load_state_dict(start)
    module.load_state_dict(start, strict=False)
    assert torch.equal(small(tokens), module(tokens))
    bare = net.module(device="meta")
    assert bare.table.is_meta and bare.embedding.weight.is_meta
    assert module.embedding.weight.requires_grad is False and "table" in module.state_dict()


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.weight).relu())


def ones(module: nn.Module) -> None:
    nn.init.ones_(module.weight)


def test_values_that_no_seed_could_draw_again_are_refused() -> None:
    example = torch.zeros(1, 2)
    with pytest.raises(
        InputError, match=r"'Drawn', the module itself: 'weight' has drawn values, and"
    ):
        supernet(Drawn(), example)
    net = supernet(Drawn(), example, init=ones)
    assert bool((net.init(3)["weight"] == 1).all())
    assert dict(net.space.groups) == {"weight": 4} and net.cost().macs == 8 + 12


def test_functions_that_draw_are_seen() -> None:
    quiet = supernet(Net(lambda x: F.dropout(x, 0.5, training=False)), IMAGE)
    loud = supernet(Net(lambda x: F.dropout(x, 0.5)), IMAGE)
    noisy = supernet(Net(lambda x: x + torch.randn_like(x)), IMAGE)
    assert [has_dropout(net.module()) for net in (quiet, loud, noisy)] == [False, True, True]
    assert ["vmap" in possible(net, toys.loss_program()) for net in (quiet, loud)] == [True, False]


def test_instance_norm_is_cut_by_channel() -> None:
    net = supernet(Net(nn.InstanceNorm2d(4, affine=True)), IMAGE)
    assert net.space.axes["between.weight"] == (Unit("one"),)
    assert net.module(IndexMap.of({"one": [0, 3]})).between.num_features == 2


# --- refused --------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


SAME = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("module", "example", "says"),
    [
        (Net(lambda x: x if x.sum() > 0 else -x), IMAGE, rf"of a tensor \(__bool__\) {AT}, so"),
        (Net(lambda x: x * x.max().item()), IMAGE, r"reads values of a tensor \(item\)"),
        (Net(lambda x: x[:, :, :9, 0]), IMAGE, rf"layer 'two': .* cannot be followed {AT} \("),
        (Tied(), torch.zeros(1, 4), "layer 'b': 'b.weight' and 'a.weight' are one tied tensor"),
        (nn.Sequential(SAME, nn.ReLU(), SAME), torch.zeros(1, 4), "layer '[02]': .*"),
        (nn.Conv2d(2, 4, 3), IMAGE, r"makes \(3, 4, 4, 4\) of a batch of 3; return class scores"),
        (nn.Linear(4, 4), torch.zeros(4), "give a batch, a tensor"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)), torch.zeros(1, 4),
         "momentum None"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)),
         torch.zeros(1, 4), "layer '1': a BatchNorm without running statistics"),
    ],
)  # fmt: skip
def test_what_is_refused(module: nn.Module, example: Tensor, says: str) -> None:
    with pytest.raises(InputError, match=says):
        supernet(module, example)


# --- annotated ------------------------------------------------------------------------------------


def three() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1), nn.ReLU(),
        nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(216, 3),
    )  # fmt: skip


def test_annotations_name_join_and_keep_groups() -> None:
    assert groups(three(), IMAGE) == {"2": 6, "4": 6}
    assert groups(three(), IMAGE, annotate={"2": "wide", "4": "wide"}) == {"wide": 6}
    assert groups(three(), IMAGE, annotate={"2": None, "4": "late"}) == {"late": 6}
    assert groups(three(), IMAGE, fixed=["4"]) == {"2": 6}
    assert groups(three(), IMAGE, fixed=["late"], annotate={"4": "late"}) == {"2": 6}
    found = {finding.layer: finding for finding in explain(three(), IMAGE, fixed=["4"])}
    assert found["2"] == ("2", ("2",), "") and found["4"].reason == "kept by annotation"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"annotate": {"0": "early"}}, "layer '0': annotated as group 'early'.*norm of 2 groups"),
        ({"annotate": {"6": "classes"}}, "layer '6': annotated.*the class scores"),
        ({"annotate": {"0": "a", "2": "a"}}, "layer '0': annotated as group 'a'"),
        ({"annotate": {"2": "4"}}, "two groups are called '4'"),
        ({"fixed": ["7"]}, "no layer '7' with weights"),
    ],
)
def test_annotations_that_cannot_hold_are_refused(options, says: str) -> None:
    with pytest.raises(InputError, match=says):
        supernet(three(), IMAGE, **options)


def test_maps_that_do_not_fit_are_refused() -> None:
    net = supernet(three(), IMAGE)
    with pytest.raises(InputError, match="group '2' has units 0 to 5, the map keeps unit 6"):
        net.module(IndexMap.of({"2": [0, 6]}))
    with pytest.raises(InputError, match="unknown unit group 'conv1'"):
        net.module(IndexMap.of({"conv1": [0]}))


# --- beside the chain -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_cnn", "cifar_cnn", "logreg", "vgg"])
def test_tracing_a_chains_module_finds_what_the_chain_knows(name: str) -> None:
    known = ZOO[name](norm="batch", width=0.3) if name != "logreg" else ZOO[name]()
    traced = supernet(known.module(), torch.zeros(1, *known.input_shape), name=name)
    assert dict(traced.space.groups) == dict(known.space.groups)
    assert traced.statistics == known.statistics
    kept = width_map(known, 0.4)
    for leaf, shape in known.space.shapes.items():
        pairs = zip(known.space.axes[leaf], traced.space.axes[leaf], shape, strict=True)
        for a, b, size in pairs:
            one, other = known.space.indices(a, kept, size), traced.space.indices(b, kept, size)
            assert one.tolist() == other.tolist()
    for convention in CONVENTIONS:
        count = {"convention": convention, "count_bias": True, "count_norm": True}
        assert known.cost(kept, **count) == traced.cost(kept, **count)
    a, b = known.init(1), traced.init(1)
    assert all(torch.equal(tensor, b[leaf]) for leaf, tensor in a.items())
