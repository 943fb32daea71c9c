"""The strokes and their distance fields."""

import numpy as np

from subfleet.datasets.glyphs import (
    CHARACTERS,
    FAR,
    FORMS,
    GRID,
    STROKES,
    _distances,
    distance_fields,
)


def test_every_class_of_femnist_has_a_glyph():
    assert len(CHARACTERS) == 62 and set(STROKES) == set(CHARACTERS)
    assert CHARACTERS.index("A") == 10 and CHARACTERS.index("a") == 36


def test_distances_are_those_to_the_segment():
    d = _distances(np.array([[[-0.5, 0.0], [0.5, 0.0]]]), 8)
    # Cell middles lie at -0.875, -0.625 ... ; row 3 is at y = -0.125.
    assert np.isclose(d[3, 4], 0.125) and np.isclose(d[0, 4], 0.875)
    assert np.isclose(d[3, 0], np.hypot(0.375, 0.125))


def test_glyphs_stay_inside_their_field():
    fields = distance_fields()
    assert fields.shape == (62, FORMS, GRID, GRID)
    border = np.concatenate(
        [fields[..., 0, :], fields[..., -1, :], fields[..., 0], fields[..., -1]]
    )
    assert border.min() * FAR / 255 > 0.12
    assert (fields.reshape(62 * FORMS, -1).min(1) <= 12).all()


def test_no_two_characters_have_the_same_form():
    # O and 0, l and 1, S and s and their like differ in size or shape.
    ink = (distance_fields()[:, 0] < 26).reshape(62, -1).astype(float)
    overlap = ink @ ink.T
    union = ink.sum(1)[:, None] + ink.sum(1)[None, :] - overlap
    alike = overlap / union - np.eye(62)
    assert alike.max() < 0.95
