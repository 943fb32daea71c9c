"""A run whose rounds need more than the object store holds: it spills to disk and goes on."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from subfleet.config import Experiment
from subfleet.launch import launch

STORE_BYTES = 80_000_000  # Ray accepts hardly less

# A round trains 12 clients, one a bundle: a tree of 8 MB, 12 sums of 16 MB that come back, and
# 19 MB of streamed rows beside those of the next rounds. Logistic regression keeps it short.
TABLES = {
    "data": {
        "name": "synthetic_vectors",
        "clients": 24,
        "samples": 20,
        "dim": 20_000,
        "num_classes": 100,
    },
    "model": {"name": "logreg"},
    "fleet": {"tiers": [{"name": "all", "share": 1.0, "width": 1.0}]},
    "algorithm": {"name": "fedavg"},
    "train": {"lr": 0.05, "batch_size": 20, "epochs": 1},
    "run": {"seed": 3, "rounds": 3, "cohort": 12, "eval_every": 0, "engine": "loop"}
    | {"bundle_clients": 1, "hosts": 2, "stream": True},
}

# In a process of its own: the test's may have used Ray with another token before.
SCRIPT = """
import json
import sys

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from subfleet.config import Experiment
from subfleet.launch import launch

ray.init(
    address="local",
    num_cpus=2,
    object_store_memory=int(sys.argv[1]),
    include_dashboard=False,
    log_to_driver=False,
    logging_level="ERROR",
)
run = launch(Experiment(**json.loads(sys.argv[2])), out=sys.argv[3])
state = get_state_from_address(ray.get_runtime_context().gcs_address)
store = get_memory_info_reply(state).store_stats
found = {
    "created": store.cumulative_created_bytes,
    "spilled": store.spilled_bytes_total,
    "params": run.summary["params_sha256"],
    "retries": sum(record["retries"] for record in run.metrics),
}
ray.shutdown()
print(json.dumps(found))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_store_too_small_for_a_round_spills_and_the_result_is_the_same(tmp_path: Path) -> None:
    settings = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(STORE_BYTES), json.dumps(TABLES), str(tmp_path / "ray")],
        env=outside | settings | {"HOME": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["created"] > 5 * STORE_BYTES
    assert found["spilled"] > STORE_BYTES / 4
    inline = launch(
        Experiment(**TABLES).with_overrides(["run.stream=false"]),
        out=tmp_path / "inline",
        local=True,
    )
    assert found["params"] == inline.summary["params_sha256"]
    assert found["retries"] == 0, "spilling is no loss"
