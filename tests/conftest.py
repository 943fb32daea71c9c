"""What several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from browser import Chromium, chromium
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Tests are small; threads would only fight over the cores.
torch.set_num_threads(1)

# A shared machine may stall any example; what CI finds must be found again.
settings.register_profile("subfleet", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("subfleet")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real samples; the test is skipped where there is none."""
    folder = Path(os.environ.get("SUBFLEET_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real samples at {folder}; set SUBFLEET_DATA to their folder")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """Headless Chromium for a module's tests; they are skipped where there is none."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray in this process for a module's tests; `launch` finds it and leaves it running.

    Yields the folder in which it was started, the current one meanwhile.
    """
    import ray
    from ray._raylet import AuthenticationTokenLoader

    from subfleet.cluster.start import ray_session

    with pytest.MonkeyPatch.context() as patch:
        # Ray writes its token to the home folder, and remembers for good what it read there.
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.delenv("RAY_ADDRESS", raising=False)
        AuthenticationTokenLoader.instance().reset_cache()
        folder = tmp_path_factory.mktemp("current")
        patch.chdir(folder)
        with ray_session(None):
            yield folder
        assert not ray.is_initialized()
    AuthenticationTokenLoader.instance().reset_cache()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
