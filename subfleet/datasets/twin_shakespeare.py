"""A synthetic twin of Shakespeare: roles who speak in their own way, letter by letter.

All roles share words and sentences; each prefers some of the words, and has
phrases that it says again and again. A word often follows from the one before it.
A row is a window of 80 letters and its label the letter after it, stride 1.
"""

from __future__ import annotations

import numpy as np

from subfleet.core.scaling import AS_STORED
from subfleet.datasets.drawn import Drawn, Rows
from subfleet.datasets.draws import row_keys, stream_key, uniforms
from subfleet.datasets.federation import checked_number, offsets_of, train_sizes
from subfleet.datasets.shakespeare import ALPHABET
from subfleet.datasets.twin_words import spell, words

WINDOW = 80
_HEAD_LANES = 3  # which sentence, and whether it is one of the role's phrases
_PHRASES = 3
_PHRASE_NUMBER = 1 << 22  # phrases are numbered above all sentences


class SyntheticShakespeare(Drawn):
    """`clients` roles, int8 [80] letters of LEAF's alphabet, labelled with the next letter.

    The defaults are ADDS's Table 1: sizes with a heavy tail, from 2 rows up. A
    role's first 80 % of windows train; 79 windows lie between the last of them
    and the first that tests, as in LEAF, and belong to no part. individuality:
    how far roles differ in the words they prefer, 0 not at all, 1 as far as can be.
    phrases: the share of sentences that are one of the role's own phrases.

    >>> data = SyntheticShakespeare()
    >>> block = data.block(np.array([5, 8]), "train")
    >>> block.x.shape[1:], block.x.dtype == np.int8, data.vocabulary, data.num_classes
    ((80,), True, 81, 80)
    """

    vocabulary = len(ALPHABET) + 1
    """Tokens run from 0 to this, exclusive; the last stands for letters beyond the alphabet."""

    def __init__(
        self,
        clients: int = 528,
        seed: int = 0,
        *,
        mean_samples: float = 1183.0,
        sd_samples: float = 1218.0,
        individuality: float = 0.7,
        phrases: float = 0.15,
    ) -> None:
        checked_number("individuality", individuality, 0, 1)
        checked_number("phrases", phrases, 0, 1)
        options = {"mean_samples": mean_samples, "sd_samples": sd_samples}
        options |= {"individuality": individuality, "phrases": phrases}
        super().__init__(
            "synthetic_shakespeare",
            clients,
            seed,
            options,
            num_classes=len(ALPHABET),
            input_shape=(WINDOW,),
            scale=AS_STORED,
        )

    def _labels(self, rows: Rows) -> np.ndarray:
        letters, at = self._places(rows)
        return letters[at + WINDOW].astype(np.int64)

    def _draw(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        letters, at = self._places(rows)
        windows = np.lib.stride_tricks.sliding_window_view(letters, WINDOW)
        return windows[at], letters[at + WINDOW].astype(np.int64)

    def _places(self, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """The roles' texts, int8, and where in them each row's window starts, int64 [rows]."""
        totals = self.totals(rows.ids)
        # The last window starts at total - 1 + 79, and its label is 80 letters on.
        letters, starts = self._texts(rows.ids, totals + 2 * WINDOW)
        tests = rows.number >= train_sizes(totals)[rows.owner]
        return letters, starts[rows.owner] + rows.number + (WINDOW - 1) * tests

    def _texts(self, ids: np.ndarray, least: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each role says, of `least` letters or more, int8, and where each starts."""
        table = words()
        said = least // table.shortest + 1
        speaker = np.repeat(np.arange(len(ids)), said)
        entries = self._sentences(ids, speaker, row_keys(ids, offsets_of(said), 0 * said))
        shown = entries >= 0
        flat = entries[shown]
        per_sentence = np.where(shown, table.length[entries], 0).sum(axis=1)
        per_role = np.bincount(speaker, per_sentence, minlength=len(ids)).astype(np.int64)
        return spell(flat), offsets_of(per_role)[:-1]

    def _sentences(self, ids: np.ndarray, speaker: np.ndarray, counters: np.ndarray) -> np.ndarray:
        """Entries of the sentences, int64 [sentences, slots], -1 for none."""
        table = words()
        head = uniforms(self._key("speech"), counters, _HEAD_LANES)
        # A phrase is a sentence of a fixed number, said whenever this one comes up.
        phrase = np.floor(head[:, 1] * _PHRASES).astype(np.uint64) + np.uint64(_PHRASE_NUMBER)
        fixed = (counters & ~np.uint64(0xFFFFFF)) | phrase
        counters = np.where(head[:, 0] < self._options["phrases"], fixed, counters)
        slots = table.sentences.shape[1]
        draw = uniforms(self._key("sentences"), counters, 1 + 2 * slots)
        kinds = table.sentences[(draw[:, 0] * len(table.sentences)).astype(np.int64)]
        ranking = self._preferences(ids)
        entries = np.full(kinds.shape, -1)
        follows = uniforms(
            stream_key(self.seed, "words that follow"), np.arange(len(table.kind)), 1
        )
        before = np.zeros(len(kinds), dtype=np.int64)
        for slot in range(slots):
            kind = kinds[:, slot]
            fresh, own = draw[:, 1 + 2 * slot], draw[:, 2 + 2 * slot] < 0.5
            # Low ranks are common: the first of 40 words comes up a sixth of the time.
            at = np.where(own, fresh, follows[before, 0])
            at = np.where(table.even[kind], at, at * at)
            rank = (at * table.count[kind]).astype(np.int64)
            word = ranking[speaker, table.first[kind] + rank]
            # The first word's capital is in the second half of the table.
            entries[:, slot] = np.where(kind >= 0, word + (slot == 0) * len(table.kind), -1)
            before = word
        return entries

    def _preferences(self, ids: np.ndarray) -> np.ndarray:
        """Each role's entries of each kind, the preferred first, int64 [roles, entries]."""
        table = words()
        place = (np.arange(len(table.kind)) - table.first[table.kind]) / table.count[table.kind]
        own = uniforms(self._key("preferences"), ids, len(table.kind))
        individuality = self._options["individuality"]
        order = (1 - individuality) * place + individuality * own
        # Kinds stay where they are: the whole part of the key is the kind.
        return np.argsort(table.kind + order / 2, axis=1, kind="stable")
