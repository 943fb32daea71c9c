"""The machine's own rate: large matrix products, as many processes as the sides have."""

from __future__ import annotations

import torch
from sides.pool import Prepare, Side, Train

SIZE = {"cpu": 2048, "cuda": 8192}
PRODUCTS = {"cpu": 3, "cuda": 20}


def start(device: str, dtype: str, size: int) -> Prepare:
    """Multiplies two square matrices of `size` rows over and over."""
    a, b = torch.randn(2, size, size, device=device).to(getattr(torch, dtype))
    out = torch.empty_like(a)
    # As the engine has it: a rate in TF32 would be another arithmetic's.
    torch.backends.cuda.matmul.allow_tf32 = False

    def prepare(clients: list[int]) -> Train:
        del clients

        def run() -> None:
            for _ in range(PRODUCTS[device]):
                torch.mm(a, b, out=out)
            if device == "cuda":
                torch.cuda.synchronize()

        return run

    return prepare


def rate(device: str, dtype: str, processes: int, repeats: int) -> float:
    """The best of some repeats after a first one, in FLOP/s of all processes together."""
    with Side(start, processes, device, dtype, SIZE[device]) as side:
        seconds = min([side.round([]) for _ in range(repeats + 1)][1:])
    return processes * PRODUCTS[device] * 2 * SIZE[device] ** 3 / seconds
