"""The z+ rule, by hand and by its conservation."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from subfleet.core.relevance import backwards
from subfleet.core.watching import watched


def flow(module, x, relevance):
    """The layers reached with the relevance of their inputs, in the order of the walk."""
    module.eval()
    scores, passed = watched(module, lambda: module(x))
    start = scores if relevance is None else relevance
    params = dict(module.named_parameters())
    return [(one.name, found.detach()) for one, found in backwards(passed, params, start)]


def test_three_inputs_and_two_outputs_by_hand():
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.5, -1.0], [-1.0, 2.0, 1.0]])
    x = torch.tensor([[1.0, 2.0, 0.5]])
    ((_, found),) = flow(nn.Sequential(layer), x, torch.tensor([[3.0, 1.0]]))
    # Output 0 has 1 + 1 from inputs 0 and 1, output 1 has 4 + 0.5 from 1 and 2.
    assert found[0].tolist() == pytest.approx([1.5, 1.5 + 8 / 9, 1 / 9], abs=1e-6)


def test_negative_inputs_and_weights_make_positive_shares():
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[-1.0, 1.0]])
    ((_, found),) = flow(nn.Sequential(layer), torch.tensor([[-3.0, 1.0]]), torch.tensor([[8.0]]))
    assert found[0].tolist() == pytest.approx([6.0, 2.0], abs=1e-6)


def network():
    torch.manual_seed(0)
    layers = OrderedDict(
        relu0=nn.ReLU(),
        conv1=nn.Conv2d(2, 4, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(4),
        pool=nn.MaxPool2d(2, ceil_mode=True),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(4, 6, 3, stride=2, padding=1),
        relu2=nn.ReLU6(),
        depthwise=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        relu3=nn.ReLU(),
        mean=nn.AvgPool2d(2),
        flatten=nn.Flatten(),
        drop=nn.Dropout(0.2),
        fc=nn.Linear(6, 3),
    )
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # so that every unit is owed something
            layer.weight.data = layer.weight.abs() + 0.1 * ("conv" in name)
    return nn.Sequential(layers)


def test_what_is_owed_stays_what_it_was():
    x = torch.rand(5, 2, 7, 7)
    relevance = torch.rand(5, 3) + 0.5
    for name, found in flow(network(), x, relevance):
        assert torch.allclose(found.flatten(1).sum(1), relevance.sum(1), rtol=1e-4), name


def test_a_max_pool_gives_the_winner_everything():
    x = torch.tensor([[[[1.0, 4.0], [2.0, 3.0]]]])
    ((_, found),) = flow(nn.Sequential(nn.MaxPool2d(2)), x, torch.tensor([[[[7.0]]]]))
    assert found.flatten().tolist() == [0, 7, 0, 0]


def test_the_walk_ends_where_code_stands_between_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.two(self.one(x).relu())

    assert [name for name, _ in flow(Net(), torch.rand(1, 3), None)] == ["two"]
    strange = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2))
    assert [name for name, _ in flow(strange, torch.rand(1, 3), None)] == ["2"]
