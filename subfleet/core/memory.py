"""What training a sub-network takes of a device's memory, at its peak.

Exact but for the scratch space of single kernels and the loss: the tensors that the
forward pass saves for the backward pass are those of the small module itself, which is
run on the meta device, where tensors have shapes and no storage (LSTMs run on the CPU).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap

Optimizer = Literal["sgd", "momentum", "adam"]
_STATES: dict[Optimizer, int] = {"sgd": 0, "momentum": 1, "adam": 2}  # tensors for each parameter


class Memory(NamedTuple):
    """Bytes at the end of a forward pass in training, when all of these exist side by side.

    `params`: every tensor of the network, running statistics and constants included.
    `gradients` and `optimiser`: of what is trained. `activations`: the input batch and
    what the forward pass saves for the backward pass, each storage once.
    """

    params: int
    gradients: int
    optimiser: int
    activations: int

    @property
    def total(self) -> int:
        """All bytes together."""
        return sum(self)


def training_memory(
    net: SuperNetwork,
    map: IndexMap | None = None,
    *,
    batch: int = 20,
    optimizer: Optimizer = "sgd",
) -> Memory:
    """The peak memory of training the sub-network of a map; no map means the whole network.

    `optimizer` keeps beside each parameter: "sgd" nothing, "momentum" one number, "adam"
    two. Raises `InputError` where the network cannot be trained on a batch of that size,
    as BatchNorm cannot on one sample of one position.

    >>> from subfleet.models import chain
    >>> net = chain("mlp", nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), (4,))
    >>> training_memory(net, batch=5)  # saved: 5 x 4 inputs and 5 x 8 hidden units
    Memory(params=268, gradients=268, optimiser=0, activations=240)
    """
    if optimizer not in _STATES:
        hint = did_you_mean(optimizer, get_args(Optimizer))
        raise InputError(f"unknown optimizer {optimizer!r}; {hint}")
    if batch < 1:
        raise InputError(f"a batch of {batch} samples cannot be trained on; give 1 or more")
    device, module = "meta", net.module(map, device="meta")
    if any(isinstance(part, nn.LSTM) for part in module.modules()):
        # Its kernel on CPUs saves a workspace of its own making.
        device, module = "cpu", net.module(map)
    trained = sum(p.nbytes for p in module.parameters())
    constants = sum(b.nbytes for b in module.buffers())
    saved = _forward_bytes(net, module.train(), batch, device)
    return Memory(trained + constants, trained, _STATES[optimizer] * trained, saved)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the batch `x` and of what a forward pass with it saves for the backward pass.

    Storages are counted once, and whole where a view is saved; the module's parameters
    and buffers are left out. Works on any device, "meta" included.
    """
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    saved = {x.untyped_storage()._cdata: x}  # tensors, so that no storage's address is reused

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        module(x)
    return sum(t.untyped_storage().nbytes() for storage, t in saved.items() if storage not in own)


def _forward_bytes(net: SuperNetwork, module: nn.Module, batch: int, device: str) -> int:
    try:
        with torch.random.fork_rng(devices=[]):  # dropout may draw
            return saved_bytes(module, net.example(batch, device=device))
    except (RuntimeError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise InputError(
            f"model {net.name!r} cannot be trained on a batch of {batch}: {cause}; "
            "give a batch that its training can take"
        ) from error
