"""What the labels and the tokens of the data sets stand for, as their publishers have it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from subfleet.datasets.cinic10 import CLASSES
from subfleet.datasets.glyphs import CHARACTERS
from subfleet.datasets.shakespeare import ALPHABET, UNKNOWN

_SMILES = ("not smiling", "smiling")
_MOODS = ("negative", "positive")

LABELS: Mapping[str, Sequence[str]] = {
    "celeba": _SMILES,
    "cifar10": CLASSES,  # CINIC-10 took them over, in their order
    "cinic10": CLASSES,
    "femnist": tuple(CHARACTERS),
    "mnist": tuple("0123456789"),
    "sent140": _MOODS,
    "shakespeare": tuple(ALPHABET),
    "synthetic_celeba": _SMILES,
    "synthetic_femnist": tuple(CHARACTERS),
    "synthetic_sent140": _MOODS,
    "synthetic_shakespeare": tuple(ALPHABET),
}
"""Data set by name -> what label i is; the others have no names for theirs here."""

_LETTERS = f"token i is character i of {json.dumps(ALPHABET)}, {UNKNOWN} any other character"

TOKENS: Mapping[str, str] = {
    "sent140": (
        "words and . , ! ? ; in lower case; 0 fills up at the end, 1 is unknown, the others are "
        "2 + the word's line in data.glove, counted from 0, or without that file 2 + the CRC-32 "
        "of its UTF-8 modulo data.vocabulary - 2"
    ),
    "shakespeare": _LETTERS,
    "synthetic_sent140": "0 fills up at the end, 1 is unknown, the others stand for no real words",
    "synthetic_shakespeare": _LETTERS,
}
"""Data set by name -> what its tokens are, in words."""
