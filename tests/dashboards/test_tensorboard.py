import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray

from subfleet.dashboards.tensorboard import PICTURES, TensorBoardWriter
from subfleet.platform.columns import METRICS_COLUMNS
from subfleet.platform.files import json_bytes

CONFIG = {"train": {"lr": 0.15, "optimizer": "sgd"}, "run": {"seed": 3, "resume": True}}
COVERAGE = {"conv1": np.array([3, 2, 0, 1])}
COLUMNS = {
    "acc_local": np.array([0.0, 0.5, np.nan, 1.0], np.float32),
    "tier": np.array(["low", "low", "high", "high"]),
}


def record(number):
    values = {column.name: number + i / 4 for i, column in enumerate(METRICS_COLUMNS)}
    return values | {
        "round": number,
        "clients": 4,
        "acc_tier": {"low": 0.25 * number, "high": 0.5},
        "acc_local_tier": {"low": 0.5},
        "acc_local_sd_tier": {"low": 0.5},
        "acc_local_worst10_tier": {"low": 0.5},
        "acc_own_tier": {"low": 0.75},
        "seconds": {"train": 1.0, "merge": 0.5},
        "coverage": {"conv1": 0},
        "keep": {"conv1": 0.375},
        "sparsity": {"mean": 0.1},
        "loss_global": float("nan"),
    }


def write(folder, first, last, start=0, rounds=None):
    writer = TensorBoardWriter(folder)
    writer.on_start({"rounds": rounds or last, "start": start, "config": CONFIG})
    for number in range(first, last + 1):
        writer.on_clients(number, COLUMNS)
        writer.on_round(record(number), COVERAGE)
    return writer


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    return events


def bars(events, tag):
    """(step, [left, right, height] of each bar) of every histogram of a tag."""
    return [(event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag)]


def test_every_number_is_a_scalar(tmp_path):
    write(tmp_path, 1, 3).on_end({"rounds": 3, "acc_global": 0.75, "finished": True})
    events = read(tmp_path)
    tags = set(events.Tags()["scalars"])
    want = {c.tag for c in METRICS_COLUMNS if c.tag and not c.type.startswith("dict")}
    want -= {"loss/global"}  # not a number in these records
    want |= {"accuracy/tier/low", "accuracy/tier/high", "algorithm/sparsity/mean"}
    want |= {"accuracy/own_tier/low", "accuracy/local_tier/low", "accuracy/local_sd_tier/low"}
    want |= {"accuracy/local_worst10_tier/low"}
    want |= {"platform/seconds/train", "platform/seconds/merge"}
    assert {tag for tag in tags if not tag.startswith("final/")} == want
    got = [(e.step, e.value) for e in events.Scalars("accuracy/tier/low")]
    assert got == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert "experiment/text_summary" in events.Tags()["tensors"]
    text = events.Tensors("experiment/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "[train]" in text and "lr = 0.15" in text


def test_coverage_shows_the_clients_of_each_unit(tmp_path):
    write(tmp_path, 1, 2).on_end({"rounds": 2})
    (one, first), (two, _) = bars(read(tmp_path), "coverage/conv1")
    assert (one, two) == (1, 2)
    assert first.tolist() == [[0, 1, 3], [1, 2, 2], [2, 3, 0], [3, 4, 1]]


def test_bars_of_a_wide_group_are_means_of_neighbours(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.on_start({"rounds": 1})
    writer.on_round({"round": 1, "clients": 3}, {"wide": np.repeat([3, 1], 192)})
    ((_, found),) = bars(read(tmp_path), "coverage/wide")
    assert found[:, 0].tolist() == list(range(0, 384, 3)) and found[-1, 1] == 384
    assert found[:, 2].tolist() == [3] * 64 + [1] * 64


def test_how_the_accuracy_of_clients_is_spread(tmp_path):
    write(tmp_path, 1, 1).on_end({"rounds": 1})
    events = read(tmp_path)
    heights = {}
    for tag in ("clients/acc_local", "clients/acc_local/low", "clients/acc_local/high"):
        ((_, found),) = bars(events, tag)
        assert found[:, 0] == pytest.approx(np.arange(20) / 20)
        heights[tag] = {int(i): found[i, 2] for i in np.flatnonzero(found[:, 2])}
    assert heights == {
        "clients/acc_local": {0: 1, 10: 1, 19: 1},  # who was not tested does not count
        "clients/acc_local/low": {0: 1, 10: 1},
        "clients/acc_local/high": {19: 1},
    }


def test_where_no_client_was_tested_there_is_no_histogram(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.on_start({"rounds": 1})
    writer.on_clients(1, COLUMNS | {"acc_local": np.full(4, np.nan)})
    writer.on_round({"round": 1, "clients": 4}, {})
    writer.on_end({"rounds": 1})
    assert [t for t in read(tmp_path).Tags()["tensors"] if t.startswith("clients")] == []


@pytest.mark.parametrize("rounds", [1, 20, 50, 399])
def test_pictures_are_few_however_many_rounds(rounds, tmp_path):
    write(tmp_path, 1, rounds).on_end({"rounds": rounds})
    for tag in ("heatmap/coverage", "heatmap/keep_ratio"):
        pictures = read(tmp_path).Images(tag)
        assert min(rounds, PICTURES // 2) <= len(pictures) <= PICTURES + 1
        assert pictures[-1].step == rounds
        assert all(picture.width < 350 and picture.height < 80 for picture in pictures)


def test_a_run_that_ends_early_has_pictures_of_its_last_round(tmp_path):
    write(tmp_path, 1, 5, rounds=399).on_end({"rounds": 5, "finished": True})
    events = read(tmp_path)
    assert [step for step, _ in bars(events, "coverage/conv1")] == [4, 5]
    assert {tag: [step for step, _ in found] for tag, found in drawn(tmp_path).items()} == {
        "heatmap/coverage": [5],
        "heatmap/keep_ratio": [5],
    }
    # They are those that a run of five rounds has.
    write(tmp_path / "whole", 1, 5).on_end({"rounds": 5})
    whole = drawn(tmp_path / "whole")
    assert drawn(tmp_path) == {tag: found[-1:] for tag, found in whole.items()}


def test_where_nobody_arrives_last_the_shares_are_of_who_arrived_before(tmp_path):
    writer = write(tmp_path, 1, 21, rounds=22)
    writer.on_round({"round": 22, "clients": 0}, {"conv1": np.zeros(4, int)})
    writer.on_end({"rounds": 22})
    steps = {tag: [step for step, _ in found] for tag, found in drawn(tmp_path).items()}
    due = list(range(3, 22, 3))
    assert steps == {"heatmap/coverage": [*due, 22], "heatmap/keep_ratio": due}
    assert [step for step, _ in bars(read(tmp_path), "coverage/conv1")] == list(range(1, 23))
    # One that was drawn is not drawn again; one that was not comes at the end.
    writer = write(tmp_path / "b", 1, 20, rounds=22)
    writer.on_round({"round": 21, "clients": 0}, {"conv1": np.zeros(4, int)})
    writer.on_round({"round": 22, "clients": 0}, {"conv1": np.zeros(4, int)})
    writer.on_end({"rounds": 22})
    assert [step for step, _ in drawn(tmp_path / "b")["heatmap/keep_ratio"]] == [*due[:-1], 20]


def drawn(folder):
    events = read(folder)
    tags = ("heatmap/coverage", "heatmap/keep_ratio")
    return {tag: [(p.step, p.encoded_image_string) for p in events.Images(tag)] for tag in tags}


def test_pictures_after_a_resume_show_the_rounds_before_it(tmp_path):
    records = [record(number) | {"keep": {"conv1": number / 8}} for number in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(json_bytes, records)))
    for name, parts in (("whole", [(0, 6)]), ("resumed", [(0, 5), (3, 6)])):
        for start, last in parts:
            writer = TensorBoardWriter(tmp_path / name)
            writer.on_start({"rounds": 6, "start": start, "run_folder": tmp_path})
            for told in records[start:last]:
                writer.on_round(told, COVERAGE)
    assert drawn(tmp_path / "resumed") == drawn(tmp_path / "whole")


@pytest.mark.parametrize(
    "fleet", [{"device": {"failure_rate": 0.1}}, {"tiers": [{"name": "a", "device": {}}]}]
)
def test_charts_of_simulated_time_are_for_fleets_of_devices(fleet, tmp_path):
    for name, config in (("with", {"fleet": fleet}), ("without", {"fleet": {"tiers": [{}]}})):
        TensorBoardWriter(tmp_path / name).on_start({"config": config})
    (found,) = read(tmp_path / "with").Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(found.tensor_proto.string_val[0])
    categories = {category.title: category.chart for category in layout.category}
    assert list(categories) == ["accuracy", "cost", "simulated", "platform", "fairness"]
    assert "cost/sim_" in categories["simulated"][0].multiline.tag
    (found,) = read(tmp_path / "without").Tensors("custom_scalars__config__")
    assert b"simulated" not in found.tensor_proto.string_val[0]


def test_hyper_parameters_are_those_of_the_experiment(tmp_path):
    write(tmp_path, 1, 1).on_end({"rounds": 1, "best_acc_global": 0.75, "finished": True})
    events = read(tmp_path)
    assert events.Scalars("final/best_acc_global")[0].value == 0.75
    start = about(events, "_hparams_/session_start_info").session_start_info
    assert start.hparams["train.lr"].number_value == 0.15
    assert start.hparams["train.optimizer"].string_value == "sgd"
    assert start.hparams["run.resume"].bool_value is True
    end = about(events, "_hparams_/session_end_info").session_end_info
    assert end.status == 1 and end.end_time_secs >= start.start_time_secs > 0


def test_a_run_that_may_go_on_has_no_end(tmp_path):
    write(tmp_path, 1, 1).on_end({"rounds": 1, "finished": False})
    assert "_hparams_/session_end_info" not in read(tmp_path).PluginTagToContent("hparams")


def about(events, tag):
    content = events.SummaryMetadata(tag).plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_a_resume_purges_what_lies_beyond_the_checkpoint(tmp_path):
    write(tmp_path, 1, 6)  # killed: never closed
    write(tmp_path, 5, 8, start=4).on_end({"rounds": 8})
    steps = [event.step for event in read(tmp_path).Scalars("accuracy/global")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_full_disk_is_one_clear_failure_and_no_half_event(tmp_path):
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
from subfleet.core.errors import RunFailed
from subfleet.dashboards.tensorboard import TensorBoardWriter
writer = TensorBoardWriter(sys.argv[1])
writer.on_start({"config": {"a": 1}})
try:
    for number in range(1, 1000):
        writer.on_round({"round": number, "acc_global": 0.5}, {})
except RunFailed as error:
    print(number, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and "disk full while writing" in done.stdout
    steps = [event.step for event in read(tmp_path).Scalars("accuracy/global")]
    assert steps == list(range(1, int(done.stdout.split()[0])))


def test_importing_it_is_cheap():
    code = (
        "import sys, subfleet.dashboards.tensorboard, subfleet.dashboards.plots; "
        "print([m for m in ('tensorboard', 'matplotlib', 'tensorflow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
