from __future__ import annotations

import math

import numpy as np
import pytest
import toys

from subfleet.core.algorithm import RoundPlan
from subfleet.core.program import ClientTask
from subfleet.platform.bundles import BundleResult
from subfleet.platform.measure import (
    Evaluated,
    bytes_down,
    client_columns,
    local_accuracy,
    round_record,
)

VIEWS = {"global": toys.FULL, "low": toys.FULL}


def scored(number, correct, loss, count, low):
    table = {
        "global/correct": np.array(correct, float),
        "global/loss": np.array(loss, float),
        "global/count": np.array(count),
        "low/correct": np.array(low, float),
        "low/loss": np.array(loss, float),
        "low/count": np.array(count),
    }
    return BundleResult(number, table, {})


def test_accuracy_is_weighted_by_samples_not_by_clients():
    results = [scored(1, [9], [2.0], [10], [3]), scored(0, [0, 1], [1.0, 1.0], [1, 1], [1, 1])]
    found = Evaluated.merged(results, VIEWS)
    assert found.accuracy == {"global": 10 / 12, "low": 5 / 12}
    assert found.loss["global"] == pytest.approx(4 / 12) and found.samples == 12


def test_arrival_leaves_no_trace():
    results = [scored(i, [1], [10.0 ** (8 - 3 * i) / 3], [3], [1]) for i in range(6)]
    assert Evaluated.merged(results, VIEWS) == Evaluated.merged(results[::-1], VIEWS)


def test_nobody_to_measure_is_not_a_number():
    found = Evaluated.merged([scored(0, [0], [0.0], [0], [0])], VIEWS)
    assert math.isnan(found.accuracy["global"]) and math.isnan(found.loss["low"])


def trained(number, clients, **columns):
    n = len(clients)
    table = {
        "client": clients,
        "tier": [0] * n,
        "num_samples": [10] * n,
        "loss": [1.0] * n,
        "steps": [2] * n,
        "seconds": [0.1] * n,
        "params": [5] * n,
        "macs": [4] * n,
        "units": ["3 4"] * n,
        "flops": [100.0] * n,
        "bytes_up": [40] * n,
        "bytes_map": [2] * n,
        "acc_local": [float("nan")] * n,
        "status": ["ok"] * n,
    } | columns
    return BundleResult(number, {name: np.array(value) for name, value in table.items()}, {})


def columns():
    results = [
        trained(0, [4, 2], loss=[1.0, 4.0], num_samples=[30, 10], tier=[1, 0]),
        trained(1, [7], loss=[float("inf")], status=["skipped"]),
        trained(2, [1], loss=[float("nan")], num_samples=[0]),  # no rows: trained nothing
    ]
    return client_columns(
        results, ["high", "low"], {4: (100, 3), 2: (200, 0), 7: (300, 5), 1: (400, 0)}
    )


def test_columns_come_in_bundle_order_with_tier_names_and_what_was_downloaded():
    found = columns()
    assert found["client"].tolist() == [4, 2, 7, 1]
    assert found["tier"].tolist() == ["low", "high", "high", "high"]
    assert found["bytes_down"].tolist() == [100, 200, 300, 400]
    assert found["bytes_map"].tolist() == [2 + 3, 2 + 0, 2 + 5, 2 + 0]  # up and down


def test_a_round_by_hand():
    found = columns()
    record = round_record(
        7,
        found,
        phase="train",
        local={"acc_local": 0.5},
        evaluated=Evaluated({"global": 0.9, "low": 0.7}, {"global": 0.3, "low": 0.8}, 12),
        coverage={"a": np.array([3, 2]), "b": np.array([3, 3, 2, 2])},
        retries=1,
        trained_s=0.5,
    )
    assert record["loss_train"] == pytest.approx((30 * 1.0 + 10 * 4.0) / 40)
    assert (record["clients"], record["samples"]) == (3, 40)  # the skipped one is not merged
    assert (record["bytes_up"], record["bytes_down"], record["bytes_map"]) == (160, 1000, 16)
    assert record["flops"] == 400 and record["clients_per_s"] == 8 and record["retries"] == 1
    assert record["acc_global"] == 0.9 and record["loss_global"] == 0.3
    assert record["acc_tier"] == {"low": 0.7} and record["acc_local"] == 0.5
    assert record["coverage_min"] == 2 and record["coverage"] == {"a": 2, "b": 2}
    assert record["keep"] == {"a": pytest.approx(2.5 / 3), "b": pytest.approx(2.5 / 3)}
    assert (record["round"], record["phase"]) == (7, "train")
    assert "bytes_map" not in found  # the parts do not hold it


def test_a_round_in_which_nobody_counts():
    found = client_columns(
        [trained(0, [1], loss=[float("nan")], status=["skipped"])], ["a"], {1: (5, 0)}
    )
    record = round_record(
        1,
        found,
        phase="train",
        local=None,
        evaluated=None,
        coverage={"conv": np.array([0, 0])},
        retries=0,
        trained_s=1.0,
    )
    assert math.isnan(record["loss_train"])
    assert record["clients"] == 0 and record["bytes_up"] == 40
    assert "acc_global" not in record
    assert record["coverage_min"] == 0 and "keep" not in record  # a share of nobody


def test_local_accuracy_by_hand():
    known = np.array([0.1, 0.9, 0.5, np.nan] + [1.0] * 17)  # 20 known: the worst two count
    tiers = np.array(["high"] * 3 + ["low"] * 18)
    found = local_accuracy({"acc_local": known, "tier": tiers})
    assert found["acc_local"] == pytest.approx(18.5 / 20)
    assert found["acc_local_sd"] == pytest.approx(np.nanstd(known, ddof=1))
    assert found["acc_local_worst10"] == pytest.approx((0.1 + 0.5) / 2)
    assert found["acc_local_tier"] == {"high": pytest.approx(0.5), "low": 1.0}
    assert found["acc_local_sd_tier"] == {"high": pytest.approx(0.4), "low": 0.0}
    assert found["acc_local_worst10_tier"] == {"high": 0.1, "low": 1.0}  # one of 3, one of 17
    one = {"acc_local": np.array([np.nan]), "tier": np.array(["high"])}
    assert local_accuracy(one) == {}
    assert local_accuracy(one | {"acc_local": np.array([0.5])})["acc_local_sd"] == 0.0


def test_an_algorithm_says_itself_what_it_sends():
    net = toys.mlp()
    sent = [
        ClientTask(client, toys.FULL, (), 1.0, 5, 0, bytes_down=given)
        for client, given in [(3, None), (4, 17)]
    ]
    down = bytes_down(net, RoundPlan(sent, {0: net.init(0)}))
    assert down == {3: (4 * net.stored_params(toys.FULL), 0), 4: (17, 0)}
