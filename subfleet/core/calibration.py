"""BatchNorm's statistics of a sub-network, which are not those of the network it was cut from.

"Universally Slimmable Networks" (Yu and Huang 2019) calls them post-statistics.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_BatchNorm = nn.modules.batchnorm._BatchNorm


def go_by_the_batch(module: nn.Module, *, tracked: bool = False) -> list[_BatchNorm]:
    """From now on BatchNorm goes by the batch's own statistics, while dropout rests.

    Running statistics stay as they are unless `tracked`. Returns the BatchNorm layers. A
    batch of one value a channel has no statistics; torch refuses it.
    """
    module.eval()
    norms = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    for norm in norms:
        norm.train()
        norm.track_running_stats = tracked
    return norms


@torch.no_grad()
def calibrate(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Sets running statistics to the plain means over batches of means and unbiased variances.

    `batches` as the module takes them; those of one row are skipped. Where none is left the
    statistics stay as they were. Leaves the module evaluating.
    """
    norms = go_by_the_batch(module, tracked=True)
    usual = [norm.momentum for norm in norms]
    for seen, x in enumerate(batch for batch in batches if len(batch) > 1):
        for norm in norms:
            norm.momentum = 1.0 / (seen + 1)  # running <- running + (batch - running) / n
        module(x)
    for norm, momentum in zip(norms, usual, strict=True):
        norm.momentum = momentum
    module.eval()
