"""A cluster of two nodes, as processes on this machine: hosts and readers find cores on both."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from subfleet.datasets import ClientRows, write_store
from subfleet.datasets.reader import Layout

# In a process of its own: Ray remembers for good the token that it read first.
SCRIPT = """
import sys

import numpy as np
import ray
from ray.cluster_utils import Cluster

from subfleet.cluster.start import placement
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


@pytest.mark.ray
def test_rows_stream_though_no_node_has_a_whole_core_free(tmp_path: Path) -> None:
    rows = ClientRows("a", np.zeros((9, 2), np.uint8), np.arange(9) % 2, np.zeros(9, bool))
    write_store(tmp_path / "store", [rows], name="toy", layout=Layout(2, (2,)), source={})
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "store")],
        env=os.environ | token | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "blocks: 1" in done.stdout, done.stderr
