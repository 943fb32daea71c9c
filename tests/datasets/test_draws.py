"""Hashes of counters: alone or together, the same numbers."""

import numpy as np

from subfleet.datasets.draws import hashes, nearly_normal, row_keys, stream_key, uniforms

KEY = stream_key(0, "test")


def test_a_draw_does_not_depend_on_its_neighbours():
    ids = np.array([5, 0, 999_999, 17])
    together = hashes(KEY, ids, 3)
    for i, client in enumerate(ids):
        assert np.array_equal(hashes(KEY, np.array([client]), 3)[0], together[i])


def test_streams_differ_by_seed_and_purpose():
    ids = np.arange(4)
    seen = [hashes(stream_key(s, p), ids, 1) for s in (0, 1) for p in ("a", "b")]
    assert len(np.unique(np.concatenate(seen))) == 16


def test_uniforms_are_even_and_uncorrelated_between_lanes():
    u = uniforms(KEY, np.arange(50_000), 2)
    assert u.min() > 0 and u.max() < 1
    counts = np.histogram(u, 20, (0, 1))[0] / 5000
    assert np.abs(counts - 1).max() < 0.06
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.02
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.02


def test_nearly_normal_has_mean_0_and_variance_1():
    z = nearly_normal(uniforms(KEY, np.arange(50_000), 4))
    assert abs(z.mean()) < 0.02 and abs(z.var() - 1) < 0.03


def test_rows_are_numbered_within_their_client():
    keys = row_keys(np.array([3, 1]), np.array([0, 2, 3]), np.array([0, 10]))
    assert keys.tolist() == [3 << 24, (3 << 24) + 1, (1 << 24) + 10]
