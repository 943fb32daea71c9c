"""Templates of clusters: valid by the schemas of those who read them, and of one version."""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start
from typer.main import get_command

import subfleet
from subfleet.cli import app

TEMPLATES = Path(subfleet.__file__).parent / "cluster" / "templates"
RAYJOB_SCHEMA = json.loads((Path(__file__).parent / "rayjob_schema.json").read_text())
FREE = ("rayStartParams", "requests", "limits")  # whose keys are no fields


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((TEMPLATES / "ray-cluster.yaml").read_text())


@pytest.fixture
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((TEMPLATES / "rayjob.yaml").read_text())


@pytest.fixture(scope="module")
def pins(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def fits(document: dict[str, Any]) -> bool:
    """Whether a RayJob has no field that KubeRay does not know, and no value of another type."""
    return jsonschema.Draft202012Validator(RAYJOB_SCHEMA).is_valid(document)


# --- ray up --------------------------------------------------------------------------------------


def test_ray_takes_the_cluster_and_keeps_all_its_workers(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(cluster)
    validate_config(prepared)
    (nodes,) = prepared["available_node_types"].values()
    assert nodes["min_workers"] == nodes["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_ray_takes_the_cluster_on_a_cloud(cluster: dict[str, Any]) -> None:
    lines = (TEMPLATES / "ray-cluster.yaml").read_text().splitlines()
    cloud = yaml.safe_load("\n".join(line[3:] for line in lines if line.startswith("#: ")))
    assert {"provider", "auth"} <= cloud.keys()
    prepared = prepare_config(cluster | cloud)
    validate_config(prepared)
    worker = prepared["available_node_types"]["worker"]
    assert worker["min_workers"] == worker["max_workers"] == prepared["max_workers"]


@pytest.mark.parametrize("table", [None, "auth"])
def test_a_misspelt_key_of_the_cluster_is_refused(
    table: str | None, cluster: dict[str, Any]
) -> None:
    keys = cluster if table is None else cluster[table]
    for key in [key for key in keys if key != "provider"]:
        wrong = copy.deepcopy(cluster)
        held = wrong if table is None else wrong[table]
        held[f"{key}x"] = held.pop(key)
        with pytest.raises(jsonschema.ValidationError, match=f"{key}x"):
            validate_config(prepare_config(wrong))


def started(cluster: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """What `ray start` understands on the head and on workers, and the whole command."""
    for kind in ("head", "worker"):
        (line,) = [c for c in cluster[f"{kind}_start_ray_commands"] if "ray start" in c]
        given = shlex.split(line.partition("ray start ")[2])
        yield ray_start.make_context("start", given).params, line


def test_nodes_start_with_the_token_on_known_ports_and_the_dashboard_on_loopback(
    cluster: dict[str, Any],
) -> None:
    (head, _), (worker, _) = started(cluster)
    exported = "export PATH=$HOME/subfleet/env/bin:$PATH RAY_AUTH_MODE=token "
    assert all(exported in line for _, line in started(cluster))
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert head["head"] and head["dashboard_host"] == "127.0.0.1"
    assert worker["address"].endswith(f":{head['port']}")
    ports = [name for name, value in worker.items() if name.endswith("_port") and value]
    assert {"node_manager_port", "object_manager_port", "max_worker_port"} <= set(ports)
    assert [head[name] for name in ports] == [worker[name] for name in ports]


# --- KubeRay -------------------------------------------------------------------------------------


def test_the_rayjob_fits_kuberays_schema(rayjob: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(RAYJOB_SCHEMA)
    found = jsonschema.Draft202012Validator(RAYJOB_SCHEMA).iter_errors(rayjob)
    assert [error.message for error in found] == []


def mappings(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a document whose keys are fields."""
    if isinstance(node, dict):
        yield node
    values = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in values:
        if isinstance(value, dict | list) and key not in FREE:
            yield from mappings(value)


def test_a_misspelt_field_of_the_rayjob_is_refused(rayjob: dict[str, Any]) -> None:
    document = json.loads(json.dumps(rayjob))  # what YAML's anchors share is no longer shared
    seen = 0
    for fields in mappings(document):
        for key in list(fields):
            value = fields.pop(key)
            fields[f"{key}x"] = value
            assert not fits(document), f"{key}x"
            del fields[f"{key}x"]
            fields[key] = value
            seen += 1
    assert fits(document) and seen > 60


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "backoffLimit"], "3"),
        (["spec", "submissionMode"], "Sidecar"),
        (["spec", "rayClusterSpec", "authOptions", "mode"], "tokens"),
        (["spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["metadata", "name"], "Subfleet_run"),
    ],
)
def test_a_wrong_value_of_the_rayjob_is_refused(
    path: list[str], value: Any, rayjob: dict[str, Any]
) -> None:
    fields = rayjob
    for key in path[:-1]:
        fields = fields[key]
    fields[path[-1]] = value
    assert not fits(rayjob)


def pods(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods' specs, the head's first."""
    spec = rayjob["spec"]["rayClusterSpec"]
    return [g["template"]["spec"] for g in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_what_kuberay_checks_beyond_its_schema(rayjob: dict[str, Any]) -> None:
    spec = rayjob["spec"]
    assert spec["submissionMode"] == "SidecarMode"
    assert not {"submitterConfig", "submitterPodTemplate", "clusterSelector"} & spec.keys()
    assert pods(rayjob)[0]["restartPolicy"] == "Never"
    assert spec["shutdownAfterJobFinishes"], "else a TTL is refused"


def test_the_job_runs_our_command_on_what_every_pod_mounts(rayjob: dict[str, Any]) -> None:
    words = shlex.split(rayjob["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "subfleet", "run"]
    run: Any = get_command(app)
    given = run.commands["run"].make_context("run", words[4:]).params
    assert given["address"] == "auto"
    assert given["restarts"] > 0
    for pod in pods(rayjob):
        (container,) = pod["containers"]
        mounts = {Path(mount["mountPath"]): mount["name"] for mount in container["volumeMounts"]}
        sources = {volume["name"]: volume.keys() - {"name"} for volume in pod["volumes"]}
        variables = {variable["name"]: Path(variable["value"]) for variable in container["env"]}
        for path in (given["out"], variables["SUBFLEET_CACHE"]):
            (mount,) = set(path.parents) & mounts.keys()
            assert sources[mounts[mount]] == {"persistentVolumeClaim"}
        assert sources[mounts[given["experiment"].parent]] == {"configMap"}


# --- versions ------------------------------------------------------------------------------------


def test_the_versions_are_those_that_were_tested_together(
    root: Path, rayjob: dict[str, Any], cluster: dict[str, Any], pins: dict[str, str]
) -> None:
    dockerfile = (TEMPLATES / "Dockerfile").read_text()
    python = re.findall(r"requires-python = \">=([\d.]+)\"", (root / "pyproject.toml").read_text())
    (base,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py(\d)(\d+)-", dockerfile, re.MULTILINE)
    assert base == (pins["ray"], *python[0].split("."))
    assert rayjob["spec"]["rayClusterSpec"]["rayVersion"] == pins["ray"]
    (image,) = {container["image"] for pod in pods(rayjob) for container in pod["containers"]}
    assert image in dockerfile and image.endswith(f":{subfleet.__version__}")
    assert any(f"python{python[0]} -m venv" in line for line in cluster["setup_commands"])


def test_what_the_image_copies_is_there(root: Path) -> None:
    dockerfile = (TEMPLATES / "Dockerfile").read_text()
    copied = re.findall(r"^COPY --chown=ray (.+) \S+$", dockerfile, re.MULTILINE)
    names = [name for names in copied for name in names.split()]
    assert "constraints.txt" in names
    assert all((root / name).exists() for name in names)
