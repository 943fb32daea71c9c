"""BatchNorm's statistics of a sub-network, against means that are written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from subfleet.core.calibration import calibrate, go_by_the_batch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, 5),
        nn.BatchNorm1d(5),
    ).double()


def batches(*sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 2, 4, 4, generator=generator, dtype=torch.float64) + n for n in sizes]


def by_hand(module: nn.Sequential, given: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Plain means over batches of the means and unbiased variances before each BatchNorm."""
    conv, first, _, _, _, fc, _ = module
    found: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        for x in given:
            h = conv(x)
            rows = h.transpose(0, 1).flatten(1)  # [channels, B * H * W]
            mean, var = rows.mean(1), rows.var(1)
            found.setdefault("1.running_mean", []).append(mean)
            found.setdefault("1.running_var", []).append(var)
            biased = rows.var(1, correction=0)
            normed = (h - mean[:, None, None]) / (biased[:, None, None] + first.eps).sqrt()
            normed = normed * first.weight[:, None, None] + first.bias[:, None, None]
            z = fc(normed.relu().flatten(1))  # dropout rests
            found.setdefault("6.running_mean", []).append(z.mean(0))
            found.setdefault("6.running_var", []).append(z.var(0))
    return {name: torch.stack(each).mean(0) for name, each in found.items()}


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in module.named_buffers() if "running" in n}


def test_means_over_batches_of_means_and_unbiased_variances():
    module, given = network(), batches(5, 2, 7)
    calibrate(module, given)
    expected, found = by_hand(module, given), statistics(module)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


def test_the_order_of_batches_and_what_was_there_do_not_matter():
    module, given = network(), batches(5, 2, 7)
    calibrate(module, given)
    once = statistics(module)
    calibrate(module, reversed(given))
    for name, value in statistics(module).items():
        torch.testing.assert_close(value, once[name], rtol=1e-12, atol=1e-12)


def test_batches_of_one_row_are_skipped():
    module, given = network(), batches(1, 5, 1, 7)
    calibrate(module, given)
    found = statistics(module)
    calibrate(module, [given[1], given[3]])
    assert all(torch.equal(found[n], v) for n, v in statistics(module).items())


@pytest.mark.parametrize("given", [[], batches(1, 1)], ids=["none", "single rows"])
def test_without_batches_the_statistics_stay(given):
    module = network()
    before = statistics(module)
    calibrate(module.train(), given)
    assert all(torch.equal(before[n], v) for n, v in statistics(module).items())
    assert not any(part.training for part in module.modules())


def test_the_module_is_left_evaluating_with_its_own_momentum():
    module, given = network().train(), batches(4, 4)
    weights = {n: p.clone() for n, p in module.named_parameters()}
    calibrate(module, given)
    assert not any(part.training for part in module.modules())
    assert (module[1].momentum, module[6].momentum) == (0.3, 0.1)
    assert module[1].track_running_stats and module[6].track_running_stats
    assert all(torch.equal(weights[n], p) for n, p in module.named_parameters())
    assert all(p.grad is None for p in module.parameters())
    # Its own statistics are what it then goes by.
    x = given[0]
    normed = module[1](module[0](x))
    torch.testing.assert_close(
        normed,
        nn.functional.batch_norm(
            module[0](x), *list(module[1].buffers())[:2], module[1].weight, module[1].bias
        ),
    )


def test_going_by_the_batch_keeps_no_statistics():
    module, (x,) = network(), batches(6)
    before = statistics(module)
    norms = go_by_the_batch(module)
    assert norms == [module[1], module[6]]
    with torch.no_grad():
        out, again = module(x), module(x)
    assert torch.equal(out, again)  # dropout rests
    torch.testing.assert_close(out.mean(0), torch.zeros(5).double(), atol=1e-12, rtol=0)
    before_last = nn.Sequential(*list(module)[:-1])(x).var(0, correction=0)
    expected = before_last / (before_last + module[6].eps)
    torch.testing.assert_close(out.var(0, correction=0), expected)
    assert all(torch.equal(before[n], v) for n, v in statistics(module).items())
