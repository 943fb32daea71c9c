"""The plain loop: a module, an SGD optimiser and a sum. No framework at all."""

from __future__ import annotations

import torch
from sides.pool import Prepare, Train
from sides.workloads import WORKLOADS, train


def start(name: str, device: str) -> Prepare:
    """One process of the loop; the rows of a round lie on the device before it begins."""
    workload = WORKLOADS[name]
    model = workload.plain_module().to(device)
    first = {key: value.clone() for key, value in model.state_dict().items()}

    def prepare(clients: list[int]) -> Train:
        drawn = [workload.rows(client) for client in clients]
        data = [(x.to(device), y.to(device)) for x, y in drawn]

        def run() -> None:
            total = {key: torch.zeros_like(value) for key, value in first.items()}
            for x, y in data:
                model.load_state_dict(first)
                train(model, x, y, workload.batch)
                for key, value in model.state_dict().items():
                    total[key] += value
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return prepare
