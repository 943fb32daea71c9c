import subprocess
import sys

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from subfleet.dashboards.tensorboard import TensorBoardWriter
from subfleet.platform.columns import METRICS_COLUMNS

CONFIG = {"train": {"lr": 0.15, "optimizer": "sgd"}, "run": {"seed": 3}, "tiers": [{"name": "low"}]}
COVERAGE = {"conv1": np.array([3, 2, 0, 1])}


def record(number):
    values = {column.name: number + i / 4 for i, column in enumerate(METRICS_COLUMNS)}
    return values | {
        "round": number,
        "acc_tier": {"low": 0.25 * number, "high": 0.5},
        "acc_own_tier": {"low": 0.75},
        "seconds": {"train": 1.0, "merge": 0.5},
        "sparsity": {"mean": 0.1},
        "loss_global": float("nan"),
    }


def write(folder, first, last, start=0):
    writer = TensorBoardWriter(folder)
    writer.on_start({"rounds": last, "start": start, "config": CONFIG})
    for number in range(first, last + 1):
        writer.on_round(record(number), COVERAGE)
    return writer


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    return events


def test_every_number_is_a_scalar(tmp_path):
    write(tmp_path, 1, 3).on_end({"rounds": 3, "acc_global": 0.75, "finished": True})
    events = read(tmp_path)
    tags = set(events.Tags()["scalars"])
    want = {c.tag for c in METRICS_COLUMNS if c.tag and not c.type.startswith("dict")}
    want -= {"loss/global"}  # not a number in these records
    want |= {"accuracy/tier/low", "accuracy/tier/high", "algorithm/sparsity/mean"}
    want |= {"accuracy/own_tier/low"}
    want |= {"platform/seconds/train", "platform/seconds/merge"}
    assert {tag for tag in tags if not tag.startswith("final/")} == want
    got = [(e.step, e.value) for e in events.Scalars("accuracy/tier/low")]
    assert got == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert "experiment/text_summary" in events.Tags()["tensors"]
    text = events.Tensors("experiment/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"lr": 0.15' in text


def test_coverage_shows_the_clients_of_each_unit(tmp_path):
    write(tmp_path, 1, 2).on_end({"rounds": 2})
    first, second = read(tmp_path).Histograms("coverage/conv1")
    assert (first.step, second.step) == (1, 2)
    heights = first.histogram_value
    assert list(heights.bucket_limit) == [1, 2, 3, 4] and list(heights.bucket) == [3, 2, 0, 1]


def test_hyper_parameters_stand_beside_the_final_metrics(tmp_path):
    write(tmp_path, 1, 1).on_end({"rounds": 1, "acc_global": 0.75, "finished": True})
    events = read(tmp_path)
    assert events.Scalars("final/acc_global")[0].value == 0.75
    data = {
        tag: plugin_data_pb2.HParamsPluginData.FromString(
            events.SummaryMetadata(tag).plugin_data.content
        )
        for tag in events.PluginTagToContent("hparams")
    }
    start = data["_hparams_/session_start_info"].session_start_info.hparams
    assert start["train.lr"].number_value == 0.15
    assert start["train.optimizer"].string_value == "sgd"
    metrics = data["_hparams_/experiment"].experiment.metric_infos
    assert "final/acc_global" in [metric.name.tag for metric in metrics]


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
