"""Users' own modules as super-networks: cuts, costs, and what keeps units from being dropped."""

from __future__ import annotations

import pickle
from functools import cache
from pathlib import Path

import plain_modules
import pytest
import slices
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import subfleet
from subfleet import registry
from subfleet._torchvision import torchvision
from subfleet.config import ModelTable
from subfleet.core.budget import width_map
from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork
from subfleet.models import explain, supernet

NAMES = list(plain_modules.EXAMPLES)
DEEP = ("resnet18", "mobilenet_v2")


@cache
def net_of(name: str) -> SuperNetwork:
    make, example = plain_modules.EXAMPLES[name]
    return supernet(make(), example, name=name)


@cache
def tensors_of(name: str) -> dict[str, Tensor]:
    return slices.tensors_of(net_of(name))


def batch_of(name: str, size: int = 2) -> Tensor:
    example = plain_modules.EXAMPLES[name][1]
    generator = torch.Generator().manual_seed(6)
    shape = (size, *example.shape[1:])
    if example.dtype == torch.int64:
        return torch.randint(0, 9, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_random_maps(name: str) -> None:
    net, tensors, x = net_of(name), tensors_of(name), batch_of(name)

    @settings(max_examples=2 if name in DEEP else 8)
    @given(seed=st.integers(0, 2**32))
    def check(seed: int) -> None:
        slices.check_slice(net, tensors, x, slices.drawn(net, seed))

    check()


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_units_does_not_matter(name: str) -> None:
    slices.check_order(net_of(name), tensors_of(name), batch_of(name), seed=3)


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_those_of_the_small_modules(name: str) -> None:
    net, x = net_of(name), batch_of(name, 1)
    for seed in range(10 if name in DEEP else 50):
        slices.check_costs(net, x, slices.drawn(net, seed))


@pytest.mark.parametrize("name", ["squeezenet1_1", "efficientnet_b0"])
def test_other_networks_of_torchvision_are_followed_whole(name: str) -> None:
    module = getattr(torchvision.models, name)(num_classes=3)
    x = torch.zeros(1, 3, 64, 64)
    assert [f.reason for f in explain(module, x) if f.reason] == ["the class scores"]
    net = supernet(module, x)
    kept = width_map(net, 0.5)
    assert net.cost(kept).macs < 0.3 * net.cost().macs
    small = net.module(kept, device="meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        small(x.to("meta"))
    assert net.cost(kept).macs * 2 == counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_networks_travel_and_start_from_the_seed_alone(name: str) -> None:
    net = net_of(name)
    data = pickle.dumps(net)
    assert len(data) < 150_000  # no weights
    there = pickle.loads(data)
    a, b = net.init(1), there.init(1)
    assert set(a) == set(net.space.shapes) and all(torch.equal(a[n], b[n]) for n in a)
    bare = net.module(slices.drawn(net, 0), device="meta")
    assert all(t.is_meta for t in bare.state_dict().values())


# --- in a run -------------------------------------------------------------------------------------

USERS_MODULE = '''
import torch
from torch import nn

from subfleet.models import explain, supernet


class Net(nn.Module):
    """Two convolutions with a skip; written without a thought of sub-networks."""

    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.inner = nn.Conv2d(4, 6, 3, padding=1)
        self.outer = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4 * 7 * 7, classes)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        x = nn.functional.max_pool2d(x, 2)
        return self.head(x.flatten(1))


def net(input_shape, num_classes):
    return supernet(Net(num_classes), torch.zeros(1, *input_shape))
'''


@pytest.mark.parametrize("engine", ["loop", "vmap"])
def test_a_users_module_trains_federated(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"users_{engine}.py").write_text(USERS_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    experiment = subfleet.Experiment(
        data={"name": "synthetic_femnist", "clients": 8, "mean_samples": 10.0},
        model={"name": f"users_{engine}:net"},
        fleet={
            "tiers": [
                {"name": "a", "share": 0.5, "width": 1.0},
                {"name": "b", "share": 0.5, "width": 0.5},
            ]
        },
        algorithm={"name": "fedpa"},
        run={"rounds": 1, "cohort": 4, "engine": engine},
    )
    done = subfleet.run(experiment, out=tmp_path / "run", local=True)
    assert done.summary["finished"]
    params = done.params()
    assert set(params) == {
        f"{n}.{p}" for n in ("stem", "inner", "outer", "head") for p in ("weight", "bias")
    }
    assert params["head.weight"].shape == (62, 196)


def test_a_plain_class_is_traced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_class.py").write_text(
        USERS_MODULE.replace("self, classes)", "self, classes=62)")
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    table = ModelTable(name="users_class:Net")
    net = registry.build_model(table, input_shape=(1, 28, 28), num_classes=62, vocabulary=0)
    assert dict(net.space.groups) == {"stem": 4, "inner": 6} and net.name == "Net"
    with pytest.raises(InputError, match=r"'users_class:Net': it makes a plain module, and"):
        registry.build_model(table)
