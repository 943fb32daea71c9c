"""Every network of the zoo: cuts, masks, the order of units, costs, over random maps."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import slices
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subfleet.core.supernet import SuperNetwork
from subfleet.models import ZOO

WORDS = 9
TEXT: dict[str, Any] = {"input_shape": (4,), "num_classes": 3, "vocabulary": WORDS}
TEXT |= {"hidden": 5, "dense": 7, "embedding_size": 4}
VECTORS = np.random.default_rng(3).standard_normal((WORDS, 6)).astype(np.float32)
IMAGE: dict[str, Any] = {"input_shape": (3, 16, 16), "num_classes": 3}
GROUP = {"norm": "group", "standardise": True}

# Narrow networks on small images; those of the table's second half are deep as well.
CASES: dict[str, dict[str, Any]] = {
    "small_cnn": IMAGE,
    "leaf_cnn": IMAGE | {"width": 0.1},
    "cifar_cnn": IMAGE | {"width": 0.2},
    "logreg": IMAGE,
    "vgg": IMAGE | {"width": 0.05},
    "adds_mobilenet": IMAGE | {"width": 0.05},
    "metagater_a": IMAGE | {"width": 0.2},
    "metagater_b": IMAGE | {"width": 0.1},
    "char_lstm": TEXT,
    "sent_lstm": TEXT,
    "sent_lstm vectors": TEXT | {"embedding": VECTORS, "bidirectional": False, "pool": "last"},
    "vgg group": IMAGE | {"width": 0.05, "norm": "group"},
    "mobilenet_v2": IMAGE | {"width": 0.25, "divisor": 2},
    "mobilenet_v2 group": IMAGE | {"width": 0.25, "divisor": 2, "norm": "group"},
    "mobilenet_v2 dwnp": IMAGE | {"width": 0.25, "divisor": 2, "variant": "dwnp"},
    "mobilenet_v2 elastic": IMAGE
    | {"width": 0.25, "divisor": 2, "depth": True, "kernels": (3, 5, 7)},
    "resnet18": IMAGE | {"width": 0.1},
    "resnet18 depth": IMAGE | {"width": 0.1, "depth": True},
    "resnet18 group": IMAGE | {"width": 0.1} | GROUP,
    "resnet34": IMAGE | {"width": 0.1},
    "resnet56": IMAGE | {"width": 0.25},
    "resnet56 group": IMAGE | {"width": 0.25} | GROUP,
}
DEEP = ("mobilenet_v2", "resnet18", "resnet34", "resnet56")


@cache
def net_of(case: str) -> SuperNetwork:
    return ZOO[case.split()[0]](**CASES[case])


@cache
def tensors_of(case: str) -> dict[str, Tensor]:
    return slices.tensors_of(net_of(case))


def batch_of(case: str, size: int = 2) -> Tensor:
    return slices.batch_of(net_of(case), size, vocabulary=CASES[case].get("vocabulary", 0))


def test_no_network_of_the_zoo_is_left_out() -> None:
    assert {case.split()[0] for case in CASES} == set(ZOO)


@pytest.mark.parametrize("case", CASES)
def test_slices_of_random_maps(case: str) -> None:
    net, tensors, x = net_of(case), tensors_of(case), batch_of(case)

    @settings(max_examples=3 if case.split()[0] in DEEP else 10)
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        slices.check_slice(net, tensors, x, slices.drawn(net, seed))

    check()


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_units_does_not_matter(case: str) -> None:
    net, tensors, x = net_of(case), tensors_of(case), batch_of(case)

    @settings(max_examples=2 if case.split()[0] in DEEP else 5)
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        slices.check_order(net, tensors, x, seed)

    check()


@pytest.mark.parametrize("case", CASES)
def test_costs_are_those_that_torch_counts(case: str) -> None:
    net, x = net_of(case), batch_of(case, 1)
    deep = case.split()[0] in DEEP
    for seed in range((10 if deep else 50) if case in ZOO else 2):
        slices.check_costs(net, x, slices.drawn(net, seed))


@pytest.mark.parametrize("case", CASES)
def test_training_a_slice_moves_it_alone(case: str) -> None:
    """A step of the small module, put back, leaves every other entry as it was."""
    net, tensors, kept = net_of(case), tensors_of(case), slices.drawn(net_of(case), 1)
    module = net.module(kept).double()
    module.load_state_dict(net.space.extract(tensors, kept))
    torch.nn.functional.cross_entropy(
        module(batch_of(case, 4)), torch.tensor([0, 1, 2, 0])
    ).backward()
    with torch.no_grad():
        for leaf, parameter in module.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), leaf
            parameter -= parameter.grad
    after = {name: tensor.clone() for name, tensor in tensors.items()}
    net.space.scatter({n: t.detach() for n, t in module.state_dict().items()}, kept, after)
    coverage = net.space.coverage(kept)
    for name, tensor in tensors.items():
        assert torch.equal(after[name][coverage[name] == 0], tensor[coverage[name] == 0])
    assert any(not torch.equal(after[name], tensor) for name, tensor in tensors.items())
