"""Clusters of several nodes, as processes on this machine: nodes that join, and nodes that go."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from subfleet.config import Experiment
from subfleet.datasets import ClientRows, write_store
from subfleet.datasets.reader import Layout
from subfleet.launch import Run, launch

# In a process of its own: Ray remembers for good the token that it read first.
SCRIPT = """
import sys

import numpy as np
import ray
from ray.cluster_utils import Cluster

from subfleet.platform.placement import placement
from subfleet.datasets import Store
from subfleet.datasets.stream import CohortStream
from subfleet.datasets.tables import Upcoming

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
try:
    cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    where = placement(ray.nodes(), 0, "cpu")
    assert (where.hosts, where.cpus) == (4, 0.75), where

    @ray.remote(num_cpus=where.cpus)
    class Host:
        def up(self):
            return True

    hosts = [Host.remote() for _ in range(where.hosts)]
    assert all(ray.get([host.up.remote() for host in hosts]))
    stream = CohortStream(Store(sys.argv[1]), patience_s=60.0)
    stream.begin(lambda round: Upcoming(np.arange(1), ("train",)), 1, 1)
    print("blocks:", len(stream.blocks(1, np.arange(1), "train")))
    stream.close()
finally:
    ray.shutdown()
    cluster.shutdown()
"""


LOSING_A_NODE = """
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray._private.state import available_resources_per_node

from subfleet.config import Experiment
from subfleet.launch import launch

experiment, out = Experiment.load(sys.argv[1]), Path(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")


def busy():  # nodes on which a host holds its share of the core
    return {node for node, free in available_resources_per_node().items() if free["CPU"] < 1}


runs = []
rounds = threading.Thread(target=lambda: runs.append(launch(experiment, out=out)))
rounds.start()
metrics = out / "metrics.jsonl"
while not metrics.exists() or metrics.read_bytes().count(b"\\n") < 2:
    time.sleep(0.01)
assert len(busy()) == 3, busy()
time.sleep(0.2)  # in mid-round
cluster.remove_node(nodes[0], allow_graceful=False)
new = cluster.add_node(num_cpus=1)
while new.node_id not in busy() and rounds.is_alive():
    time.sleep(0.05)
assert rounds.is_alive(), "no host came up on the node that joined"
rounds.join()
(run,) = runs
print("retries", sum(record["retries"] for record in run.metrics))
print("digest", run.summary["params_sha256"])
ray.shutdown()
cluster.shutdown()
"""

EXPERIMENT = """
[data]
name = "synthetic_femnist"
clients = 60
mean_samples = 60
[model]
hidden = 256  # sums of over a megabyte are merged on hosts
[fleet]
tiers = [{name = "high", share = 0.4, width = 1.0}, {name = "low", share = 0.6, width = 0.5}]
[algorithm]
name = "fedpa"
[run]
rounds = 20
cohort = 20
bundle_clients = 1
eval_every = 0
engine = "loop"
stream = true
max_seconds = 100.0
"""


def in_process(script: str, home: Path, *arguments: str) -> str:
    """What a script prints that runs in a process of its own, with a token of its own."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    outside = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=outside | token | {"HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.ray
def test_rows_stream_though_no_node_has_a_whole_core_free(tmp_path: Path) -> None:
    rows = ClientRows("a", np.zeros((9, 2), np.uint8), np.arange(9) % 2, np.zeros(9, bool))
    write_store(tmp_path / "store", [rows], name="toy", layout=Layout(2, (2,)), source={})
    assert "blocks: 1" in in_process(SCRIPT, tmp_path, str(tmp_path / "store"))


@pytest.mark.ray
def test_a_node_lost_and_one_that_joins_in_mid_round_change_nothing(tmp_path: Path) -> None:
    file = tmp_path / "experiment.toml"
    file.write_text(EXPERIMENT)
    here = launch(Experiment.load(file), out=tmp_path / "here", local=True)
    said = in_process(LOSING_A_NODE, tmp_path, str(file), str(tmp_path / "out"))
    found = dict(line.split() for line in said.splitlines()[-2:])
    assert found["digest"] == here.summary["params_sha256"]
    assert int(found["retries"]) >= 1, "the lost host had nothing at hand"
    rows = Run(tmp_path / "out", {}).clients()
    pairs = set(zip(rows["round"].to_pylist(), rows["client"].to_pylist(), strict=True))
    assert len(rows) == len(pairs) == 20 * 20
