"""Recurrent super-networks for text: an LSTM over tokens, hidden FC layer, classes.

A sub-network keeps some units of the hidden FC layer. The vocabulary, the recurrent
units and the classes are never dropped: their axes are free, so that they are no
part of an index map and cost it no bit on the wire (ADDS, section 4.1).

Legend: B rows, T tokens a row, E numbers a token, H recurrent units a direction.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subfleet.core.cost import Layer
from subfleet.core.errors import InputError
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import Binding, Free, Unit, UnitSpace
from subfleet.models.cnn import scaled

HIDDEN_FC = "fc1"

Pool = Literal["last", "max"]
"""What stands for a row: the final states, or each unit's largest output over the tokens."""


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """The sizes of a text network; `dense` = 0 leaves the hidden FC layer out."""

    vocabulary: int
    embedding_size: int
    hidden: int
    layers: int
    bidirectional: bool
    dense: int
    num_classes: int
    pool: Pool

    def __post_init__(self) -> None:
        for name in ("embedding_size", "hidden", "layers", "dense"):
            value, least = getattr(self, name), 0 if name == "dense" else 1
            if value < least:
                raise InputError(f"model.{name} is {value}; give a whole number from {least} up")
        if self.pool not in ("last", "max"):
            raise InputError(f"model.pool is {self.pool!r}; choose last or max")

    @property
    def directions(self) -> int:
        """1, or 2 where the text is read backwards too."""
        return 2 if self.bidirectional else 1

    @property
    def features(self) -> int:
        """What the recurrent layers say of a row."""
        return self.directions * self.hidden


class TextNet(nn.Module):
    """Embedding, LSTM layers, FC. Takes int64 tokens [B, T], gives class scores.

    With pool "last" the FC layers see the last LSTM layer's final states: the forward
    one's after the last token, the backward one's after the first. `vectors`, float32
    [vocabulary, E], are constants in the embedding's place: neither trained, averaged
    nor sent.
    """

    vectors: Tensor | None

    def __init__(self, sizes: TextSizes, vectors: np.ndarray | None = None) -> None:
        super().__init__()
        if vectors is None:
            self.embedding = nn.Embedding(sizes.vocabulary, sizes.embedding_size)
        # Outside the state dictionary, a buffer follows its module to the device and no further.
        constant = None if vectors is None else _shared(vectors)
        self.register_buffer("vectors", constant, persistent=False)
        self.lstm = nn.LSTM(
            sizes.embedding_size,
            sizes.hidden,
            sizes.layers,
            batch_first=True,
            bidirectional=sizes.bidirectional,
        )
        if sizes.dense:
            self.fc1 = nn.Linear(sizes.features, sizes.dense)
        self.fc2 = nn.Linear(sizes.dense or sizes.features, sizes.num_classes)
        self.has_dense = sizes.dense > 0
        self.directions, self.pool = sizes.directions, sizes.pool

    def forward(self, x_BT: Tensor) -> Tensor:
        """Class scores [B, num_classes] of tokens [B, T]."""
        table = self.embedding.weight if self.vectors is None else self.vectors
        x_BTE = F.embedding(x_BT, table)
        outputs, (final, _) = self.lstm(
            x_BTE
        )  # [B, T, directions * H], [layers * directions, B, H]
        if self.pool == "max":
            features = outputs.amax(dim=1)
        else:
            features = torch.cat(list(final[-self.directions :]), dim=1)
        if self.has_dense:
            features = F.relu(self.fc1(features))
        return self.fc2(features)


def _shared(vectors: np.ndarray) -> Tensor:
    """The array as a tensor over the same memory: one table for all networks of a process."""
    with warnings.catch_warnings():
        # Ray maps arrays read-only, which torch warns of. Nobody writes to a constant.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(vectors)


def build_text(
    sizes: TextSizes, vectors: np.ndarray | None, counts: Mapping[str, int]
) -> nn.Module:
    """The physically small network in which the hidden FC layer has `counts["fc1"]` units."""
    return TextNet(replace(sizes, dense=counts.get(HIDDEN_FC, 0)), vectors)


def text_network(
    name: str,
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    vocabulary: int,
    embedding: np.ndarray | None = None,
    embedding_size: int,
    hidden: int,
    layers: int,
    bidirectional: bool,
    dense: int,
    pool: Pool,
    width: float,
) -> SuperNetwork:
    """A super-network around `TextNet`; raises `InputError` for data that are not tokens."""
    if len(input_shape) != 1 or vocabulary < 1:
        raise InputError(
            f"model {name!r} reads rows of tokens, and the data have rows of shape "
            f"{tuple(input_shape)} and a vocabulary of {vocabulary}; choose another model, or "
            "give your data set the attribute `vocabulary`: tokens run from 0 to it, exclusive"
        )
    vectors = None if embedding is None else np.ascontiguousarray(embedding, np.float32)
    if vectors is not None and (vectors.ndim != 2 or len(vectors) != vocabulary):
        raise InputError(
            f"model {name!r}: the data set's word vectors have shape {vectors.shape}, its "
            f"vocabulary {vocabulary} tokens; give one vector for each token"
        )
    sizes = TextSizes(
        vocabulary=vocabulary,
        embedding_size=embedding_size if vectors is None else vectors.shape[1],
        hidden=scaled(hidden, width),
        layers=layers,
        bidirectional=bidirectional,
        dense=dense and scaled(dense, width),
        num_classes=num_classes,
        pool=pool,
    )
    groups = {HIDDEN_FC: sizes.dense} if sizes.dense else {}
    with torch.device("meta"):
        state = TextNet(sizes, vectors).state_dict()
    shapes = {leaf: tuple(tensor.shape) for leaf, tensor in state.items()}
    return SuperNetwork(
        name=name,
        space=UnitSpace(
            groups, {leaf: _axes(leaf, sizes, shapes[leaf]) for leaf in shapes}, shapes
        ),
        layers=tuple(_rows(sizes, input_shape[0], frozen=vectors is not None)),
        build=partial(build_text, sizes, vectors),
        input_shape=tuple(input_shape),
        num_classes=num_classes,
        elastic=tuple(groups),
        input_dtype=torch.int64,
    )


def _axes(leaf: str, sizes: TextSizes, shape: tuple[int, ...]) -> tuple[Binding, ...]:
    """The bindings of one tensor: the hidden FC layer's units, all else free."""
    free: tuple[Binding, ...] = tuple(Free(size) for size in shape)
    if sizes.dense and leaf.startswith(f"{HIDDEN_FC}."):
        return (Unit(HIDDEN_FC), *free[1:])
    if sizes.dense and leaf == "fc2.weight":
        return (free[0], Unit(HIDDEN_FC))
    return free


def _rows(sizes: TextSizes, tokens: int, *, frozen: bool) -> Iterator[Layer]:
    """The cost table: a row for each LSTM layer and direction."""
    if not frozen:
        yield Layer(
            name="embedding",
            kind="embedding",
            inputs=Free(sizes.vocabulary),
            outputs=Free(sizes.embedding_size),
            positions=tokens,
        )
    inputs = sizes.embedding_size
    for layer in range(sizes.layers):
        for suffix in ("", "_reverse")[: sizes.directions]:
            yield Layer(
                name=f"lstm.l{layer}{suffix}",
                kind="lstm",
                inputs=Free(inputs),
                outputs=Free(sizes.hidden),
                positions=tokens,
            )
        inputs = sizes.features
    before: Binding = Free(sizes.features)
    if sizes.dense:
        yield Layer(
            name=HIDDEN_FC, kind="linear", inputs=before, outputs=Unit(HIDDEN_FC), bias=True
        )
        before = Unit(HIDDEN_FC)
    yield Layer(
        name="fc2", kind="linear", inputs=before, outputs=Free(sizes.num_classes), bias=True
    )


def char_lstm(
    *,
    input_shape: tuple[int, ...] = (80,),
    num_classes: int = 80,
    vocabulary: int = 81,
    embedding_size: int = 32,
    hidden: int = 64,
    layers: int = 2,
    bidirectional: bool = False,
    dense: int = 64,
    pool: Pool = "last",
    width: float = 1.0,
) -> SuperNetwork:
    """The next character of a text (Shakespeare): two LSTM layers of 64, hidden FC 64.

    ADDS's network is hidden 256, bidirectional, and dense 256 so that there is something
    to sample; with dense 0 it has 2,214,480 parameters on 80 characters. LEAF's is
    embedding_size 8, hidden 256, dense 0. `width` scales `hidden` and `dense`.

    >>> net = char_lstm()
    >>> dict(net.space.groups), net.module()(torch.zeros(2, 80, dtype=torch.int64)).shape
    ({'fc1': 64}, torch.Size([2, 80]))
    """
    return text_network(
        "char_lstm",
        input_shape=input_shape,
        num_classes=num_classes,
        vocabulary=vocabulary,
        embedding_size=embedding_size,
        hidden=hidden,
        layers=layers,
        bidirectional=bidirectional,
        dense=dense,
        pool=pool,
        width=width,
    )


def sent_lstm(
    *,
    input_shape: tuple[int, ...] = (25,),
    num_classes: int = 2,
    vocabulary: int = 1000,
    embedding: np.ndarray | None = None,
    embedding_size: int = 64,
    pretrained: bool = True,
    hidden: int = 64,
    layers: int = 2,
    bidirectional: bool = True,
    dense: int = 64,
    pool: Pool = "max",
    width: float = 1.0,
) -> SuperNetwork:
    """What a short text is about (Sentiment140): two LSTM layers of 64 both ways, hidden FC 64.

    Word vectors of the data set (`embedding`, [vocabulary, E]) are used as they are,
    frozen; without any, or with `pretrained` false, an embedding of `embedding_size` is
    learnt, which takes far more rounds. ADDS's network is hidden 256, dense 128 on GloVe's
    300 numbers a word: 2,785,666 parameters. `width` scales `hidden` and `dense`.
    """
    return text_network(
        "sent_lstm",
        input_shape=input_shape,
        num_classes=num_classes,
        vocabulary=vocabulary,
        embedding=embedding if pretrained else None,
        embedding_size=embedding_size,
        hidden=hidden,
        layers=layers,
        bidirectional=bidirectional,
        dense=dense,
        pool=pool,
        width=width,
    )
