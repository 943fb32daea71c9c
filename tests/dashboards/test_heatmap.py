import io

import numpy as np
from PIL import Image

from subfleet.dashboards.heatmap import WIDTH, heat_map


def drawn(rows):
    png = heat_map(rows, title="a title", first="first", last="last")
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def row(picture, number):
    """The colours of one row from its left to its right end, [WIDTH, 3]."""
    return picture[8 + 20 + number * 16 + 7, -8 - WIDTH : -8]


def test_higher_is_darker_and_nothing_is_grey():
    picture = drawn({"a": np.array([0.0, 0.25, 0.5, 1.0]), "long name": np.array([np.nan, 1.0])})
    light = row(picture, 0).sum(axis=1)
    steps = light[:: WIDTH // 4]
    assert (np.diff(steps) < -60).all()
    assert (light.reshape(4, -1) == steps[:, None]).all()  # each value has a quarter
    colours = row(picture, 1)
    assert len(set(colours[0])) == 3 and colours[0].tolist() == colours[WIDTH // 2 - 1].tolist()
    assert colours[-1].tolist() == row(picture, 0)[-1].tolist()


def test_more_values_than_pixels_are_means():
    assert drawn({"a": np.tile([0.0, 1.0], WIDTH)}).shape == drawn({"a": np.zeros(3)}).shape
    fine = row(drawn({"a": np.tile([0.0, 1.0], WIDTH)}), 0)
    assert (fine == row(drawn({"a": np.full(3, 0.5)}), 0)).all()


def test_names_are_written_beside_the_rows():
    named, unnamed = drawn({"conv1": np.zeros(2)}), drawn({"": np.zeros(2)})
    assert named.shape[1] > unnamed.shape[1] + 20
    beside = named[8 + 20 : 8 + 20 + 14, : -8 - WIDTH]
    assert (beside.sum(axis=2) < 300).any()  # ink
