"""The import arrows: core <- models, datasets, algorithms <- platform <- cluster, dashboards."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "subfleet"

# What the modules of each part may import of the package; files beside the parts may all.
MAY_IMPORT = {
    "core": {"core"},
    "models": {"core", "models"},
    "datasets": {"core", "datasets"},
    "algorithms": {"core", "algorithms"},
    "platform": {"core", "models", "datasets", "algorithms", "platform"},
    "cluster": {"core", "models", "datasets", "algorithms", "platform", "cluster", "dashboards"},
    "dashboards": {"core", "models", "datasets", "algorithms", "platform", "dashboards"},
}
# torchvision's mender is part of no layer: it imports nothing of ours.
FOR_EVERYONE = {"_torchvision", "__version__"}
RAY_IS_USED_IN = {
    *("datasets/parallel.py", "datasets/stream.py"),
    *("platform/ray_executor.py", "platform/coordinator.py", "platform/host.py"),
}
# What runs on a device: it knows neither Ray nor where data come from.
ENGINE = {
    *("engine", "loop", "mapped", "evaluation", "own", "chunks", "resident", "slimmed", "feed"),
    *(
        "traces",
        "kernels",
        "rule",
        "batches",
        "bundles",
        "record",
        "steps",
        "graphs",
        "calls",
        "memory",
        "compiling",
    ),
    *("layers", "returned", "factors", "products"),
}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)


def imported(path: Path) -> Iterator[str]:
    """Dotted names of all imports of a file, wherever they stand in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; name the module in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    names = (name.split(".") for name in imported(path))
    return {name[1] for name in names if name[0] == "subfleet" and len(name) > 1}


def part_of(path: Path) -> str | None:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else None


def test_the_arrows_name_every_part() -> None:
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    part = part_of(path)
    if part is not None:
        extra = parts_imported(path) - MAY_IMPORT[part] - FOR_EVERYONE
        assert not extra, f"{part} must not import {sorted(extra)}"


@pytest.mark.parametrize("module", sorted(ENGINE))
def test_the_engine_needs_torch_numpy_and_core_only(module: str) -> None:
    for name in imported(PACKAGE / "platform" / f"{module}.py"):
        top, *rest = name.split(".")
        if top == "subfleet":
            assert rest[0] == "core" or (rest[0] == "platform" and rest[1] in ENGINE), name
        else:
            assert top in {"torch", "numpy"} | sys.stdlib_module_names, name


def test_ray_appears_in_three_places_and_cluster_only() -> None:
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in modules()
        if any(name.split(".")[0] == "ray" for name in imported(path))
    }
    assert {user for user in users if not user.startswith("cluster/")} == RAY_IS_USED_IN


def test_the_command_line_starts_without_torch_and_ray() -> None:
    code = (
        "import sys, subfleet.cli, subfleet.config; "
        "print([m for m in ('torch', 'ray', 'pandas', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_public_names_are_found_on_first_use() -> None:
    import subfleet

    assert subfleet.Experiment.__module__ == "subfleet.config"
    assert set(subfleet.__all__) <= set(dir(subfleet))
    for name in subfleet.__all__:
        assert getattr(subfleet, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Experimant'"):
        _ = subfleet.Experimant  # pyright: ignore[reportAttributeAccessIssue]
