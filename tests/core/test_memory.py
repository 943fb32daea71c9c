"""Peak training memory: by hand, against real runs, and monotone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import plain_modules
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from subfleet.core.budget import width_map
from subfleet.core.errors import InputError
from subfleet.core.memory import Memory, saved_bytes, training_memory
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.models import ZOO, chain, supernet

MLP = chain("mlp", nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)), (10,))


@pytest.mark.parametrize("kept", [8, 5, 1])
@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize(("optimizer", "states"), [("sgd", 0), ("momentum", 1), ("adam", 2)])
def test_an_mlp_by_hand(kept: int, batch: int, optimizer, states: int) -> None:
    params = 4 * (10 * kept + kept + kept * 3 + 3)
    found = training_memory(MLP, IndexMap.prefix({"0": kept}), batch=batch, optimizer=optimizer)
    # Saved: the inputs of both layers; the ReLU's result is the second layer's input.
    assert found == Memory(params, params, states * params, 4 * batch * (10 + kept))
    assert found.total == (2 + states) * params + 4 * batch * (10 + kept)


def test_a_normed_convolution_by_hand() -> None:
    layers = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip
    found = training_memory(chain("cnn", layers, (2, 4, 4)), IndexMap.prefix({"0": 4}), batch=5)
    trained = 9 * 2 * 4 + 2 * 4 + 16 * 3 + 3
    assert found.params == 4 * (trained + 2 * 4)  # and the running mean and variance
    assert found.gradients == 4 * trained
    image, wide, pooled = 2 * 16, 4 * 16, 4 * 4
    # The norm keeps its input and the batch's mean and inverse sd; the pool its input, which is
    # the ReLU's result, and int64 positions; the linear layer what was pooled.
    assert found.activations == 5 * (4 * (image + 2 * wide + pooled) + 8 * pooled) + 4 * 2 * 4


def test_views_and_shared_storages_count_once_and_whole() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = (x * 2).exp()  # [B, 8], saved by exp as its result
            return wide[:, :4].square().sum() + wide[:, 4:].square().sum()

    x = torch.zeros(3, 8, requires_grad=True)
    assert saved_bytes(Halves(), x) == 4 * (3 * 8 + 3 * 8)


def real(net: SuperNetwork, map: IndexMap, batch: int) -> int:
    """What a real training step on the CPU saves."""
    return saved_bytes(net.module(map).train(), net.example(batch))


@pytest.mark.parametrize("name", sorted(ZOO))
def test_the_zoo_saves_on_the_cpu_what_is_foretold(name: str) -> None:
    net = ZOO[name]()
    map = width_map(net, 0.3)
    assert training_memory(net, map, batch=3).activations == real(net, map, 3)


@pytest.mark.parametrize("name", sorted(plain_modules.EXAMPLES))
def test_traced_modules_save_on_the_cpu_what_is_foretold(name: str) -> None:
    build, example = plain_modules.EXAMPLES[name]
    net = supernet(build(), example)
    rng = np.random.default_rng(0)
    counts = {g: 1 + int(rng.integers(size)) for g, size in net.space.groups.items()}
    map = IndexMap.random(net.space, counts, rng)
    assert training_memory(net, map, batch=3).activations == real(net, map, 3)


def test_constants_are_held_but_not_trained() -> None:
    vectors = np.zeros((1000, 50), np.float32)
    net = ZOO["sent_lstm"](num_classes=2, embedding=vectors, layers=1, hidden=8, dense=8)
    found = training_memory(net, batch=2)
    assert found.params == found.gradients + vectors.nbytes
    assert found.gradients == 4 * net.stored_params(IndexMap.full())


def norm_mlp() -> SuperNetwork:
    layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return chain("norm", layers, (4,))


@settings(max_examples=25, deadline=None)
@given(
    build=st.sampled_from([norm_mlp, lambda: ZOO["small_cnn"](), lambda: ZOO["cifar_cnn"]()]),
    widths=st.tuples(*[st.floats(0.01, 1.0)] * 2),
    batches=st.tuples(*[st.integers(2, 40)] * 2),
)
def test_more_width_and_more_samples_never_take_less(
    build: Callable[[], SuperNetwork], widths: tuple[float, float], batches: tuple[int, int]
) -> None:
    net = build()
    less = training_memory(net, width_map(net, min(widths)), batch=min(batches))
    more = training_memory(net, width_map(net, max(widths)), batch=max(batches))
    assert all(a <= b for a, b in zip(less, more, strict=True))


def test_torchs_random_state_is_left_alone() -> None:
    dropping = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2))
    nets = [ZOO["char_lstm"](hidden=4), supernet(dropping, torch.zeros(1, 3))]
    before = torch.random.get_rng_state()
    for net in nets:
        training_memory(net, batch=2)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch": 0}, "a batch of 0 samples cannot be trained on; give 1 or more"),
        ({"batch": 1}, "model 'norm' cannot be trained on a batch of 1: Expected more than 1"),
        ({"optimizer": "adamw"}, "unknown optimizer 'adamw'; did you mean 'adam'"),
        ({"map": IndexMap.prefix({"h": 1})}, "unknown unit group 'h'"),
        ({"map": IndexMap.of({"0": [8]})}, "group '0' has units 0 to 7, the map keeps unit 8"),
    ],
)
def test_what_cannot_be_is_refused(options, says: str) -> None:
    with pytest.raises(InputError, match=says):
        training_memory(norm_mlp(), **options)
