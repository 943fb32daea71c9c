"""The repository's shape: links at the top, and no package that shadows Python's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LINKS = ("platform", "algorithms", "datasets", "cluster", "dashboards")


@pytest.mark.parametrize("name", LINKS)
def test_a_part_is_linked_at_the_top_by_a_relative_link(root: Path, name: str) -> None:
    link = root / name
    assert link.is_symlink()
    assert os.readlink(link) == f"subfleet/{name}"
    assert link.is_dir()


@pytest.mark.parametrize("flags", [[], ["-P"]])
def test_pythons_platform_is_not_shadowed_at_the_root(root: Path, flags: list[str]) -> None:
    code = "import platform, torch; print(platform.python_version())"
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ".".join(map(str, sys.version_info[:3]))


def test_platform_is_no_regular_package(root: Path) -> None:
    assert not (root / "subfleet" / "platform" / "__init__.py").exists()


def test_the_tests_are_no_packages(root: Path) -> None:
    assert list((root / "tests").rglob("__init__.py")) == []


def test_no_module_is_named_after_one_of_pythons_own(root: Path) -> None:
    allowed = {root / "subfleet" / "platform"}
    modules = [p for p in (root / "subfleet").rglob("*") if p.suffix == ".py" or p.is_dir()]
    clashes = [p for p in modules if p.stem in sys.stdlib_module_names - {"__init__", "__main__"}]
    assert set(clashes) <= allowed
