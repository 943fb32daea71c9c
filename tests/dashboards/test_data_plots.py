"""The picture of a partition is drawn from counts, and into a PNG file or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from subfleet.core.errors import InputError
from subfleet.dashboards.data_plots import partition_plot
from subfleet.datasets.memory import InMemory
from subfleet.datasets.partitioned import Partitioned
from subfleet.datasets.synthetic import SyntheticFemnist
from subfleet.datasets.twin_images import SyntheticImages


def test_a_picture_of_a_partition(tmp_path: Path) -> None:
    pool = SyntheticImages.like("cifar10", train=500, test=0)
    data = Partitioned(pool, kind="pathological", clients=20, classes_per_client=2)
    path = partition_plot(data, tmp_path / "deep" / "a.png")
    assert path == tmp_path / "deep" / "a.png"
    picture = imread(path)
    assert picture.shape[0] > 300 and picture.shape[1] > 900
    # The histogram's bars are there, and so are both ends of the heat map's colours.
    for colour in ((0x00, 0x72, 0xB2), (0x00, 0x22, 0x4E), (0xFE, 0xE8, 0x38)):
        near = abs(picture[..., :3] * 255 - colour).sum(axis=-1) < 12
        assert near.sum() > 100, colour


@pytest.mark.parametrize("clients", [1, 7, 1000])
def test_any_number_of_clients_is_shown(tmp_path: Path, clients: int) -> None:
    path = partition_plot(SyntheticFemnist(40), tmp_path / "a.png", clients=clients)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_one_client_of_one_row_is_enough(tmp_path: Path) -> None:
    data = InMemory(np.zeros((1, 2), np.float32), np.array([0]), np.array([0, 1]))
    assert partition_plot(data, tmp_path / "a.png").exists()


def test_clients_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--clients 0 is too few; draw at least 1"):
        partition_plot(SyntheticFemnist(4), tmp_path / "a.png", clients=0)
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/a.png", "cannot be written .*; give another file"),
        ("folder.png", "cannot be written .*; give another file"),
        ("a", "'.*/a' does not end in .png; give e.g. -o partition.png"),
        ("a.svg", "does not end in .png"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        partition_plot(SyntheticFemnist(4), tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
