"""The twin of Sentiment140 brings word vectors in the place of GloVe's."""

from __future__ import annotations

import pickle

import numpy as np

from subfleet.datasets.federation import identity
from subfleet.datasets.glove import SPECIAL
from subfleet.datasets.twin_sent140 import PADDING, UNKNOWN, VOCABULARY, SyntheticSent140
from subfleet.registry import model_facts


def test_vectors_follow_the_seed() -> None:
    data, other = SyntheticSent140(10, seed=3), SyntheticSent140(20, seed=4)
    vectors = data.embedding
    assert vectors.shape == (VOCABULARY, 50) and vectors.dtype == np.float32
    assert np.array_equal(vectors, SyntheticSent140(500, seed=3).embedding)
    assert np.array_equal(vectors, pickle.loads(pickle.dumps(data)).embedding)
    assert not np.array_equal(vectors, other.embedding)
    assert "vectors" in identity(data)["fingerprint"]
    assert model_facts(data)["embedding"] is vectors


def test_padding_and_unknown_words_are_zero_as_in_glove() -> None:
    assert {PADDING, UNKNOWN} == set(range(SPECIAL))
    vectors = SyntheticSent140().embedding
    assert not vectors[:SPECIAL].any()
    assert abs(vectors[SPECIAL:].std() / 0.4 - 1) < 0.1


def test_one_direction_tells_the_mood_of_words_but_not_of_slang() -> None:
    data = SyntheticSent140(seed=5)
    bad, good = data._lexicon.sentiment
    vectors = data.embedding
    mood = vectors[good].mean(0) - vectors[bad].mean(0)
    along = vectors @ mood / np.linalg.norm(mood)
    assert (along[good] > 0).mean() > 0.98 and (along[bad] < 0).mean() > 0.98
    slang = along[data._lexicon.slang]
    assert 0.2 < (slang > 0).mean() < 0.8


def test_frozen_vectors_tell_the_mood_of_tweets_to_a_linear_model() -> None:
    data = SyntheticSent140(600)

    def features(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        block = data.block(np.arange(first, last), "all")
        said = data.embedding[block.x].sum(axis=1)
        return np.column_stack([said, np.ones(len(said), np.float32)]), block.y

    (x, y), (fresh, truth) = features(0, 400), features(400, 600)
    weights = np.linalg.lstsq(x, 2.0 * y - 1, rcond=None)[0]
    right = ((fresh @ weights > 0) == truth).mean()
    assert right > 0.7 > 0.6 > max(truth.mean(), 1 - truth.mean())
