"""A synthetic twin of Sentiment140: tweets of users with words and moods of their own.

A tweet mixes common words, words of its user's topics, and at least one word of
sentiment that fits its label. Most words of sentiment mean the same to all;
slang means good in some circles of users and bad in others.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from subfleet.core.scaling import AS_STORED
from subfleet.core.seeds import generator
from subfleet.datasets.drawn import Drawn, Rows
from subfleet.datasets.draws import hashes, uniforms
from subfleet.datasets.federation import checked_number

LENGTH = 25
VOCABULARY = 10_000
PADDING, UNKNOWN = 0, 1
_SHORTEST = 4
_COMMON, _SLANG, _TOPICS, _OF_TOPIC, _PER_USER = 2000, 60, 64, 100, 3
_CIRCLES = 4  # a topic belongs to one, and so do its users
_TWEET_LANES = 2  # how long a tweet is, and where its sure word of sentiment stands
_SENTIMENT, _UNKNOWN_SHARE, _TOPICAL = 0.12, 0.03, 0.45
_MISLEADING = 0.15  # of the words of sentiment beside the sure one
_FAVOURITES = 24  # of each list a user's words of sentiment are this many
_VECTOR, _VECTOR_SD = 50, 0.4  # GloVe's smallest vectors, and about their numbers' deviation


class _Lexicon(NamedTuple):
    """Which tokens are what, int64."""

    common: np.ndarray  # [_COMMON], the commoner first
    sentiment: np.ndarray  # [2, words]: those of label 0 and of label 1
    slang: np.ndarray  # [_SLANG]
    topics: np.ndarray  # [_TOPICS, _OF_TOPIC]


class SyntheticSent140(Drawn):
    """`clients` users' tweets, int16 [25] tokens, labelled 1 in a good mood, 0 in a bad one.

    Tokens run from 0 to 9,999: 0 pads, 1 is an unknown word. The defaults are
    ADDS's Table 1. skew: how far users differ in their moods, 0 not at all, 1 as
    a flat Dirichlet draw. slang: the share of the words of sentiment that mean
    the opposite to other circles of users.

    >>> data = SyntheticSent140()
    >>> block = data.block(np.array([5, 8]), "train")
    >>> block.x.shape[1:], block.x.dtype == np.int16, data.vocabulary
    ((25,), True, 10000)
    """

    vocabulary = VOCABULARY
    """Tokens run from 0 to this, exclusive."""

    def __init__(
        self,
        clients: int = 1330,
        seed: int = 0,
        *,
        mean_samples: float = 43.15,
        sd_samples: float = 19.0,
        skew: float = 1.0,
        slang: float = 0.3,
    ) -> None:
        checked_number("skew", skew, 0, 4)
        checked_number("slang", slang, 0, 1)
        options = {"mean_samples": mean_samples, "sd_samples": sd_samples}
        options |= {"skew": skew, "slang": slang}
        super().__init__(
            "synthetic_sent140",
            clients,
            seed,
            options,
            num_classes=2,
            input_shape=(LENGTH,),
            scale=AS_STORED,
        )

    @functools.cached_property
    def _lexicon(self) -> _Lexicon:
        tokens = generator(self.seed, f"{self.name} lexicon").permutation(np.arange(2, VOCABULARY))
        ends = np.cumsum([_COMMON, _SLANG, _TOPICS * _OF_TOPIC])
        common, slang, topics, rest = np.split(tokens, ends)
        sentiment = rest[: len(rest) // 2 * 2].reshape(2, -1)
        return _Lexicon(common, sentiment, slang, topics.reshape(_TOPICS, _OF_TOPIC))

    @functools.cached_property
    def embedding(self) -> np.ndarray:
        """A vector for each token, float32 [10000, 50], that stands in for GloVe's.

        Noise, and for each word of sentiment half as much of one direction, to or fro by
        its mood, as vectors learnt from much text would tell. Slang has none of it, since
        it means the opposite elsewhere; padding and unknown words are 0, as in `glove`.
        """
        draw = generator(self.seed, f"{self.name} vectors")
        noise = draw.standard_normal((VOCABULARY, _VECTOR), np.float32)
        mood = 0.5 * draw.standard_normal(_VECTOR, np.float32)
        bad, good = self._lexicon.sentiment
        noise[good] += mood
        noise[bad] -= mood
        noise[[PADDING, UNKNOWN]] = 0
        return noise * np.float32(_VECTOR_SD)

    @property
    def fingerprint(self) -> str:
        """What the samples and the vectors follow from."""
        return f"{super().fingerprint}, vectors 1"

    def _labels(self, rows: Rows) -> np.ndarray:
        return self._binary_labels(rows, self._shares(rows.ids))

    def _draw(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        labels = self._labels(rows)
        draw = uniforms(self._key("tweets"), rows.counters, _TWEET_LANES + 4 * LENGTH)
        at = np.arange(LENGTH)
        length = _SHORTEST + (draw[:, :1] * (LENGTH - _SHORTEST + 1)).astype(np.int64)
        sure = at == (draw[:, 1:2] * length).astype(np.int64)
        what, which, mean, pick = np.split(draw[:, _TWEET_LANES:], 4, axis=1)
        feeling = sure | (what < _SENTIMENT)
        # The sure word fits the label; of the others a few mislead.
        good = np.where(~sure & (mean < _MISLEADING), 1 - labels[:, None], labels[:, None])
        mood, plain = self._feelings(rows, good, which, pick), self._plain(rows, which, pick)
        x = np.where(feeling, mood, np.where(what > 1 - _UNKNOWN_SHARE, UNKNOWN, plain))
        return np.where(at < length, x, PADDING).astype(np.int16), labels

    def _topics(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each user's circle, int64 [users], and topics, int64 [users, _PER_USER]."""
        bits = hashes(self._key("topics"), ids, 1 + _PER_USER) >> np.uint64(40)
        circle = (bits[:, 0] % np.uint64(_CIRCLES)).astype(np.int64)
        topic = (bits[:, 1:] % np.uint64(_TOPICS // _CIRCLES)).astype(np.int64)
        return circle, topic * _CIRCLES + circle[:, None]

    def _feelings(
        self, rows: Rows, good: np.ndarray, which: np.ndarray, pick: np.ndarray
    ) -> np.ndarray:
        """Words of sentiment that the user means as `good` says, int64 [rows, LENGTH]."""
        lexicon = self._lexicon
        words = lexicon.sentiment.shape[1]
        first = (uniforms(self._key("favourites"), rows.ids, 1) * words).astype(np.int64)
        favourite = (first[rows.owner] + (pick * pick * _FAVOURITES).astype(np.int64)) % words
        # The halves of the slang trade places from circle to circle.
        circle = self._topics(rows.ids)[0][rows.owner][:, None]
        half, quarter = _SLANG // 2, _SLANG // _CIRCLES
        said = (pick * half).astype(np.int64) + good * half + circle * quarter
        slang = lexicon.slang[said % _SLANG]
        return np.where(which < self._options["slang"], slang, lexicon.sentiment[good, favourite])

    def _plain(self, rows: Rows, which: np.ndarray, pick: np.ndarray) -> np.ndarray:
        """Words without sentiment: of the user's topics, or common ones, int64 [rows, LENGTH]."""
        topics = self._topics(rows.ids)[1][rows.owner]
        chosen = np.take_along_axis(
            topics, (which / _TOPICAL * _PER_USER).astype(np.int64) % _PER_USER, axis=1
        )
        topical = self._lexicon.topics[chosen, (pick * pick * _OF_TOPIC).astype(np.int64)]
        # A cube of an even draw: the commonest of 2,000 words is one in thirteen.
        common = self._lexicon.common[(pick * pick * pick * _COMMON).astype(np.int64)]
        return np.where(which < _TOPICAL, topical, common)
