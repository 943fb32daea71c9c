import pytest
import torch

from subfleet.core.program import LocalRule
from subfleet.platform import rule as rules

RULES = [
    LocalRule(lr=0.3),
    LocalRule(lr=0.3, momentum=0.9),
    LocalRule(lr=0.3, weight_decay=0.1),
    LocalRule(lr=0.3, momentum=0.5, weight_decay=0.1, clip_norm=0.7),
    LocalRule(lr=0.3, clip_norm=1e9),
]
SHAPES = [(3, 2), (3,), (2, 2, 1, 1)]


def draw(seed, lead=()):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*lead, *shape, generator=generator) for shape in SHAPES]


def stepped(rule, params, grads_by_step, *, clients=False):
    params = [p.clone() for p in params]
    velocity = [torch.zeros_like(p) for p in params] if rule.momentum else None
    start = [p.clone() for p in params] if rule.proximal else None
    for grads in grads_by_step:
        rules.step(rule, params, [g.clone() for g in grads], velocity, start, clients=clients)
    return params


@pytest.mark.parametrize("rule", RULES)
def test_equals_torch_sgd(rule):
    params, grads = draw(0), [draw(i) for i in (1, 2, 3)]
    ours = stepped(rule, params, grads)
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    sgd = torch.optim.SGD(theirs, rule.lr, momentum=rule.momentum, weight_decay=rule.weight_decay)
    for step in grads:
        for p, g in zip(theirs, step, strict=True):
            p.grad = g.clone()
        if rule.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, rule.clip_norm)
        sgd.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-7)


def test_proximal_term_by_hand():
    # w0 = 2, g = 1, lr = 0.1, mu = 0.5
    # step 1: w = 2 - 0.1 * (1 + 0.5 * 0) = 1.9;  step 2: w = 1.9 - 0.1 * (1 - 0.5 * 0.1) = 1.805
    rule = LocalRule(lr=0.1, proximal=0.5)
    (w,) = stepped(rule, [torch.tensor([2.0])], [[torch.tensor([1.0])]] * 2)
    assert w.item() == pytest.approx(1.805, abs=1e-6)


def test_the_proximal_term_is_not_clipped():
    # |g| = 10 is clipped to 1; the pull towards the start is whole: 1 - 0.1 * (1 + 2 * (1 - 0))
    rule = LocalRule(lr=0.1, proximal=2.0, clip_norm=1.0)
    w = [torch.tensor([1.0])]
    rules.step(rule, w, [torch.tensor([10.0])], None, [torch.tensor([0.0])])
    assert w[0].item() == pytest.approx(1 - 0.1 * 3, abs=1e-5)


@pytest.mark.parametrize(
    "rule", [*RULES, LocalRule(lr=0.1, momentum=0.9, proximal=0.3, clip_norm=0.5)]
)
def test_clients_side_by_side_step_as_each_alone(rule):
    clients = 4
    params, grads = draw(0, (clients,)), [draw(i, (clients,)) for i in (1, 2, 3)]
    # Norms far apart, so that clipping by a joint norm would show.
    grads = [
        [g * (10.0 ** torch.arange(clients)).view(-1, *[1] * (g.dim() - 1)) for g in step]
        for step in grads
    ]
    together = stepped(rule, params, grads, clients=True)
    for k in range(clients):
        alone = stepped(rule, [p[k] for p in params], [[g[k] for g in step] for step in grads])
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a[k], b, rtol=1e-5, atol=1e-6)


def test_zero_gradients_are_not_divided_by_zero():
    (clipped,) = rules.clipped([torch.zeros(3)], 1.0)
    assert clipped.tolist() == [0, 0, 0]
    (clipped,) = rules.clipped([torch.zeros(2, 3)], 1.0, clients=True)
    assert clipped.tolist() == [[0, 0, 0]] * 2
