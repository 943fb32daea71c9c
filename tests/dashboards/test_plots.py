import pytest
from matplotlib.image import imread

from subfleet.core.errors import InputError
from subfleet.dashboards.plots import accuracy_plot


def run(slope):
    return [{"round": t, "acc_global": min(1, slope * t) if t % 2 else None} for t in range(1, 30)]


def test_a_picture_of_several_runs(tmp_path):
    path = accuracy_plot({"FedPA": run(0.03), "FedAvg": run(0.02)}, tmp_path / "a" / "acc.png")
    picture = imread(path)
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # both curves are there
        near = abs(picture[..., :3] * 255 - colour).sum(axis=-1) < 3
        assert near.sum() > 100


def test_a_key_that_no_run_has_is_named(tmp_path):
    with pytest.raises(InputError, match="plot of acc_local: none of 1 runs has it"):
        accuracy_plot({"FedPA": run(0.03)}, tmp_path / "acc.png", key="acc_local")
    assert not (tmp_path / "acc.png").exists()
