"""Maps and modules that cannot be: each error names the group or the layer, and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import plain_modules
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subfleet.core.budget import Budget, Tier, largest_width
from subfleet.core.errors import InputError
from subfleet.core.memory import training_memory
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.describe import describe
from subfleet.models import ZOO, chain, explain, supernet

IMAGE = torch.zeros(1, 2, 6, 6)


@cache
def network(kind: str) -> SuperNetwork:
    if kind == "traced":
        return supernet(plain_modules.GroupNormed(), torch.zeros(1, 2, 5, 5), name=kind)
    return ZOO["small_cnn"](norm="batch") if kind == "chained" else ZOO["resnet18"](width=0.1)


# --- maps -----------------------------------------------------------------------------------------

USES: dict[str, Callable[[SuperNetwork, IndexMap], object]] = {
    "module": lambda net, map: net.module(map, device="meta"),
    "cost": lambda net, map: net.cost(map),
    "memory": training_memory,
    "describe": describe,
    "extract": lambda net, map: net.space.extract(net.module(device="meta").state_dict(), map),
    "scatter": lambda net, map: net.space.scatter(net.module(device="meta").state_dict(), map),
    "coverage": lambda net, map: net.space.coverage(map),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", ["traced", "chained", "zoo"])
def test_maps_of_no_sub_network_are_refused_wherever_they_are_used(kind: str, use: str) -> None:
    net = network(kind)
    group, size = next(iter(net.space.groups.items()))
    beyond = rf"group '{group}' has units 0 to {size - 1}, the map keeps unit {size}; keep units b"
    for kept, says in (
        ({group: [0, size]}, beyond),
        ({group: []}, rf"group '{group}' keeps no unit; keep at least 1, or leave the group out"),
        ({f"{group}s": [0]}, rf"unknown unit group '{group}s'; did you mean '{group}'"),
    ):
        with pytest.raises(InputError, match=says):
            USES[use](net, IndexMap.of(kept))


@pytest.mark.parametrize("units", [[3, 1], [2, 2], [-1, 0]])
def test_unsorted_units_are_refused_before_there_is_a_map(units: list[int]) -> None:
    with pytest.raises(InputError, match=r"group 'stem': kept units .* sort them and drop dupl"):
        IndexMap.of({"stem": units})


def test_a_map_of_another_model_is_refused() -> None:
    net, other = network("chained"), ZOO["vgg"](width=0.1)
    with pytest.raises(InputError, match="unknown unit group 'conv3'; did you mean 'conv2'"):
        net.module(IndexMap.prefix(other.space.groups))
    narrow = ZOO["small_cnn"](width=0.5)
    with pytest.raises(InputError, match="group 'conv1' has units 0 to 3, the map keeps unit 5"):
        narrow.cost(IndexMap.of({"conv1": [0, 5]}))


def test_tensors_cut_by_another_map_are_refused() -> None:
    net = network("chained")
    small = net.space.extract(net.init(0), IndexMap.prefix({"conv1": 3}))
    with pytest.raises(InputError, match=r"tensor 'conv1.weight' has shape \(3, 1, 3, 3\), the ma"):
        net.space.scatter(small, IndexMap.prefix({"conv1": 4}))


@pytest.mark.parametrize("kind", ["traced", "zoo"])
def test_a_budget_below_the_smallest_says_what_that_takes(kind: str) -> None:
    net = network(kind)
    least = net.cost(IndexMap.prefix(dict.fromkeys(net.elastic, 1)))
    says = rf"'{net.name}', which takes flops={least.flops:,} and params={least.params:,}; raise"
    for budget in (Budget(flops=least.flops - 1), Budget(params=least.params - 1)):
        with pytest.raises(InputError, match=says):
            largest_width(net, budget)
    with pytest.raises(InputError, match=rf"tier 'watch': .*{says}"):
        Tier(name="watch", share=1, flops=least.flops - 1).largest_map(net)
    assert largest_width(net, Budget(flops=least.flops, params=least.params)) < 1


# --- modules --------------------------------------------------------------------------------------


class Inner(nn.Module):
    """A block that goes one way or the other by its values."""

    def __init__(self, decide: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.conv, self.decide = nn.Conv2d(2, 4, 1), decide

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.relu() if self.decide(x) else x


@pytest.mark.parametrize(
    ("decide", "reads"),
    [
        (lambda x: bool(x.mean() > 0), "__bool__"),
        (lambda x: x.sum().item() > 0, "item"),
        (lambda x: x[0, 0, 0].tolist()[0] > 0, "tolist"),
        (lambda x: int(x.argmax()) == 3, "__int__"),
        (lambda x: float(x.max()) > 1, "__float__"),
    ],
)
def test_ways_that_depend_on_values_are_refused_by_layer(decide, reads: str) -> None:
    module = nn.Sequential(nn.Identity(), Inner(decide), nn.Flatten(), nn.Linear(144, 3))
    says = rf"layer '1': the forward pass reads values of a tensor \({reads}\).* torch\.where"
    with pytest.raises(InputError, match=says):
        supernet(module, IMAGE)


class TiedText(nn.Module):
    """The embedding's weights are the classifier's, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embedding(x).mean(1))


def test_tied_parameters_are_refused_by_both_names() -> None:
    says = r"layer 'out': 'out.weight' and 'embedding.weight' are one tied tensor; give each layer"
    with pytest.raises(InputError, match=says):
        supernet(TiedText(), torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(InputError, match=says):
        explain(TiedText(), torch.zeros(1, 3, dtype=torch.int64))


def test_a_layer_used_twice_is_refused() -> None:
    again = nn.Linear(4, 4)
    with pytest.raises(InputError, match="layer '2': it shares its weights with another layer"):
        chain("twice", [again, nn.ReLU(), again, nn.Linear(4, 2)], (4,))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.hidden(F.relu(self.hidden(x))))

    with pytest.raises(InputError, match="layer 'hidden': it is used twice, so that two places"):
        supernet(Twice(), torch.zeros(1, 4))


def normed(norm: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 1), norm, nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(216, 3)
    )


def test_a_group_norm_that_a_slice_would_cut_is_named() -> None:
    module = normed(nn.GroupNorm(2, 4))
    with pytest.raises(InputError, match="layer '1': GroupNorm with 2 groups cannot be cut by ch"):
        chain("normed", module, (2, 6, 6))
    net = supernet(module, IMAGE)  # keeps the norm's channels whole, and says so
    assert list(net.space.groups) == ["2"]
    reason = {finding.layer: finding.reason for finding in explain(module, IMAGE)}["0"]
    assert reason == "a group norm of 2 groups of channels; use GroupNorm(1, channels) (at '1')"
    with pytest.raises(InputError, match=r"unknown unit group '0'; .*"):
        net.module(IndexMap.of({"0": [0, 2]}))
    with pytest.raises(InputError, match=r"layer '0': annotated as group 'c', .*norm of 2 groups"):
        supernet(module, IMAGE, annotate={"0": "c"})
    assert list(supernet(normed(nn.GroupNorm(1, 4)), IMAGE).space.groups) == ["0", "2"]
