from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toys
from torch.func import functional_call

from subfleet.algorithms.local import cross_entropy
from subfleet.core.algorithm import Evaluation
from subfleet.core.program import LocalRule, LossProgram, Stream
from subfleet.core.scaling import Scaling
from subfleet.core.units import IndexMap
from subfleet.platform import evaluation
from subfleet.platform.bundles import EvalBundle
from subfleet.platform.engine import Work
from subfleet.platform.record import Choice
from subfleet.platform.resident import Resident
from subfleet.platform.worker import Worker

SIZES = [10, 300, 1, 7]  # more than one batch of 256 rows, and a client with nothing to test on

PLAIN = Scaling()


def evaluate(net, data, params, how=None, *, views=None, part="test", ids=None):
    algorithm = toys.OneProgram(toys.setting(net), None, evaluates=how or Evaluation())
    worker = Worker(Work(net, algorithm, Scaling(), 0), data, "cpu")
    ids = np.arange(data.num_clients) if ids is None else np.array(ids)
    bundle = EvalBundle(0, 1, ids, views or {"global": toys.FULL}, part, 1.0)
    return worker.run(bundle, {0: params}).table


def rows(data, client, part):
    x, y, _ = data.block(np.array([client]), part)
    return torch.from_numpy(x), torch.from_numpy(y)


def scored(module, params, x, y):
    """(correct, summed loss) of a plain forward pass in evaluation mode."""
    with torch.no_grad():
        logits = functional_call(module.eval(), params, (x,))
    return int((logits.argmax(1) == y).sum()), float(F.cross_entropy(logits, y, reduction="sum"))


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_scores_equal_a_direct_forward_pass_of_each_view(norm):
    net, data = toys.cnn(norm), toys.federation(SIZES, (1, 8, 8), 4)
    params = net.init(3)
    half = IndexMap.of({"conv1": [1, 3], "conv2": [0, 2, 5], "fc1": [0, 1, 2, 8, 9]})
    views = {"global": toys.FULL, "half": half, "again": half}
    table = evaluate(net, data, params, views=views)
    for name, map in views.items():
        small = net.space.extract(params, map)
        for client in range(4):
            x, y = rows(data, client, "test")
            right, loss = scored(net.module(map), small, x, y)
            assert table[f"{name}/correct"][client] == right
            assert table[f"{name}/loss"][client] == pytest.approx(loss, rel=1e-5, abs=1e-6)
            assert table[f"{name}/count"][client] == len(y)
    assert table["global/count"].tolist() == [2, 60, 0, 2]


def test_the_part_all_counts_every_row():
    net, data = toys.mlp(), toys.federation(SIZES, (6,), 3)
    assert evaluate(net, data, net.init(0), part="all")["global/count"].tolist() == SIZES


def without_statistics(net, seed=3):
    return {n: v for n, v in net.init(seed).items() if n not in net.statistics}


def test_calibration_is_the_mean_of_batch_means_and_unbiased_variances():
    """Source: slimmable networks' post-statistics; the last batch counts like the others."""
    net, data = toys.mlp(hidden=(5,), norm=True), toys.all_train([10], (6,), 3)
    params = without_statistics(net)
    resident = Resident(net, toys.FULL, Choice("a", "cpu", "loop"))
    x, _ = rows(data, 0, "train")
    hidden = x @ params["fc0.weight"].T + params["fc0.bias"]
    for order in (torch.arange(10), torch.arange(10).flip(0)):  # batches 4, 4, 2 and reversed
        resident.load(params | resident.fresh)
        evaluation.calibrate(
            resident, x[order].numpy(), Evaluation(calibrate=20, batch=4), Scaling()
        )
        cut = hidden[order].split(4)
        mean = torch.stack([b.mean(0) for b in cut]).mean(0)
        var = torch.stack([b.var(0, unbiased=True) for b in cut]).mean(0)
        torch.testing.assert_close(resident.statistics["norm0.running_mean"], mean)
        torch.testing.assert_close(resident.statistics["norm0.running_var"], var)


def test_calibration_stops_after_its_batches_and_skips_single_rows():
    net, data = toys.mlp(hidden=(5,), norm=True), toys.all_train([9], (6,), 3)
    params = without_statistics(net)
    resident = Resident(net, toys.FULL, Choice("a", "cpu", "loop"))
    x, _ = rows(data, 0, "train")
    hidden = x @ params["fc0.weight"].T + params["fc0.bias"]
    for calibrate, batches in ((1, [hidden[:4]]), (20, [hidden[:4], hidden[4:8]])):
        resident.load(params | resident.fresh)
        evaluation.calibrate(
            resident, x.numpy(), Evaluation(calibrate=calibrate, batch=4), Scaling()
        )
        mean = torch.stack([b.mean(0) for b in batches]).mean(0)
        torch.testing.assert_close(resident.statistics["norm0.running_mean"], mean)


def test_calibration_leaves_the_networks_own_momentum():
    """The same module trains other clients afterwards."""
    net = toys.mlp(hidden=(5,), norm=True)
    resident = Resident(net, toys.FULL, Choice("a", "cpu", "loop"))
    resident.module.get_submodule("norm0").momentum = 0.37  # type: ignore
    evaluation.calibrate(resident, np.ones((4, 6), np.float32), Evaluation(calibrate=1), PLAIN)
    assert resident.module.get_submodule("norm0").momentum == 0.37


def test_each_client_calibrates_on_its_own_training_part():
    net, data = toys.mlp(hidden=(5,), norm=True), toys.federation([20, 1, 30], (6,), 3)
    params = without_statistics(net)
    table = evaluate(net, data, params, Evaluation(calibrate=3, batch=8))
    for client in (0, 2):
        x, _ = rows(data, client, "train")
        hidden = (x @ params["fc0.weight"].T + params["fc0.bias"])[:24].split(8)
        hidden = [b for b in hidden if len(b) > 1]
        statistics = {
            "norm0.running_mean": torch.stack([b.mean(0) for b in hidden]).mean(0),
            "norm0.running_var": torch.stack([b.var(0) for b in hidden]).mean(0),
        }
        right, loss = scored(net.module(), params | statistics, *rows(data, client, "test"))
        assert table["global/correct"][client] == right
        assert table["global/loss"][client] == pytest.approx(loss, rel=1e-5)
    assert table["global/count"][1] == 0


def test_a_client_that_cannot_calibrate_does_not_borrow_anothers_statistics():
    net, data = toys.mlp(hidden=(5,), norm=True), toys.federation([20, 1], (6,), 3)
    params = without_statistics(net)
    table = evaluate(net, data, params, Evaluation(calibrate=3, batch=8), part="all")
    fresh = {"norm0.running_mean": torch.zeros(5), "norm0.running_var": torch.ones(5)}
    _, loss = scored(net.module(), params | fresh, *rows(data, 1, "all"))
    assert table["global/loss"][1] == pytest.approx(loss, rel=1e-5)


def one_step(lr=0.5, batch=None):
    return LossProgram(cross_entropy, LocalRule(lr=lr), Stream("train", batch=batch))


def test_prepare_is_one_gradient_step_on_the_clients_own_training_part():
    net, data = toys.linear(4, 3), toys.federation([12, 5, 1, 20], (4,), 3)
    params = net.init(0)
    table = evaluate(net, data, params, Evaluation(prepare=one_step()))
    for client in (0, 1, 3):
        x, y = rows(data, client, "train")
        w, b = params["fc.weight"], params["fc.bias"]
        error = torch.softmax(x @ w.T + b, 1) - F.one_hot(y, 3)  # d mean CE / d logits, times n
        adapted = {
            "fc.weight": w - 0.5 * error.T @ x / len(y),
            "fc.bias": b - 0.5 * error.mean(0),
        }
        right, loss = scored(net.module(), adapted, *rows(data, client, "test"))
        assert table["global/correct"][client] == right
        assert table["global/loss"][client] == pytest.approx(loss, rel=1e-5)
    plain = evaluate(net, data, params)
    assert table["global/loss"][3] != plain["global/loss"][3]


def test_prepared_clients_do_not_see_each_other_and_the_server_keeps_its_tree():
    net, data = toys.cnn(), toys.federation([12, 9, 20], (1, 8, 8), 4)
    params = net.init(0)
    before = {n: v.clone() for n, v in params.items()}
    how = Evaluation(prepare=one_step(batch=4))
    views = {"global": toys.FULL, "half": IndexMap.prefix({"conv1": 2, "conv2": 3})}
    together = evaluate(net, data, params, how, views=views)
    for client in range(3):
        alone = evaluate(net, data, params, how, views=views, ids=[client])
        for name in views:
            assert alone[f"{name}/loss"][0] == together[f"{name}/loss"][client]
    assert toys.same_bits(params, before)


def test_prepare_then_calibrate_without_statistics_on_the_server():
    net, data = toys.mlp(hidden=(5,), norm=True), toys.federation([21], (6,), 3)
    params = without_statistics(net)
    how = Evaluation(prepare=one_step(lr=0.3), calibrate=1, batch=64)
    table = evaluate(net, data, params, how)
    x, y = rows(data, 0, "train")
    module = net.module()
    fresh = {"norm0.running_mean": torch.zeros(5), "norm0.running_var": torch.ones(5)}
    module.load_state_dict(params | fresh)
    F.cross_entropy(module(x), y).backward()
    adapted = {n: w.detach() - 0.3 * w.grad for n, w in module.named_parameters()}
    hidden = x @ adapted["fc0.weight"].T + adapted["fc0.bias"]
    adapted |= {"norm0.running_mean": hidden.mean(0), "norm0.running_var": hidden.var(0)}
    right, loss = scored(net.module(), adapted, *rows(data, 0, "test"))
    assert table["global/correct"][0] == right
    assert table["global/loss"][0] == pytest.approx(loss, rel=1e-4)
    # Without calibration the step's own running statistics are used.
    only = evaluate(net, data, params, Evaluation(prepare=one_step(lr=0.3)))
    assert only["global/loss"][0] != table["global/loss"][0]
