"""What is delivered: the wheel, the pins and the make targets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import subfleet


@pytest.fixture(scope="module")
def project(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]


def pins(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text().splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {_plain(name): version for name, version in rows}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned(root: Path, project: dict) -> None:
    wanted = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = {_plain(re.split(r"[\[<>=~! ]", line)[0]) for line in wanted}
    assert names <= set(pins(root))


def test_torch_and_torchvision_are_the_pair_that_belongs_together(root: Path) -> None:
    pinned = pins(root)
    assert (pinned["torch"], pinned["torchvision"]) == ("2.13.0", "0.28.0")


def test_the_version_is_said_once_more_and_agrees(project: dict) -> None:
    assert project["version"] == subfleet.__version__


def test_the_wheel_holds_every_module_and_template(root: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(root / "subfleet", source / "subfleet", ignore=_leftovers)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (root / name).exists():
            shutil.copy(root / name, source)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    inside = {name for name in names if name.endswith(".py")}
    modules = (root / "subfleet").rglob("*.py")
    assert inside == {m.relative_to(root).as_posix() for m in modules}
    assert any(name.startswith("subfleet/platform/") for name in inside)
    templates = (root / "subfleet" / "cluster" / "templates").iterdir()
    assert {t.relative_to(root).as_posix() for t in templates} <= set(names)


def _leftovers(folder: str, names: list[str]) -> set[str]:
    del folder
    return {name for name in names if name == "__pycache__"}


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["install", "demo", "test", "check", "bench", "clean"])
def test_make_knows_its_targets(root: Path, target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_can_be_run(root: Path) -> None:
    script = root / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_a_folder_of_the_packages_name_is_no_riddle(tmp_path: Path) -> None:
    (tmp_path / "subfleet").mkdir()
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "subfleet", "--version"],
        cwd=tmp_path,
        env=outside,
        capture_output=True,
        text=True,
    )
    # Whether the folder comes before the package depends on how it was installed.
    assert done.stdout.startswith("subfleet 0.") or "hides the package" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("said", "found"), [(None, "1"), ("0", "0")])
def test_large_tensors_get_large_pages_unless_the_user_says_no(said, found) -> None:
    name = "THP_MEM_ALLOC_ENABLE"
    environment = {key: value for key, value in os.environ.items() if key != name}
    if said is not None:
        environment[name] = said
    code = f"import sys, subfleet, os; print('torch' in sys.modules, os.environ['{name}'])"
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert told.stdout.split() == ["False", found]  # before torch, which then allocates
