"""Super-networks by name."""

from __future__ import annotations

from collections.abc import Callable

from subfleet.core.supernet import SuperNetwork
from subfleet.models.chain import chain as chain
from subfleet.models.cnn import cifar_cnn, leaf_cnn, logreg, small_cnn
from subfleet.models.elasticity import elastic as elastic
from subfleet.models.metagater import metagater_a, metagater_b
from subfleet.models.mobilenet import adds_mobilenet, mobilenet_v2
from subfleet.models.norms import MaskedLayerNorm as MaskedLayerNorm
from subfleet.models.norms import MaskedLayerNorm2d as MaskedLayerNorm2d
from subfleet.models.resnet import resnet18, resnet34, resnet56
from subfleet.models.text import char_lstm, sent_lstm
from subfleet.models.tracing import explain as explain
from subfleet.models.tracing import supernet as supernet
from subfleet.models.vgg import vgg

ZOO: dict[str, Callable[..., SuperNetwork]] = {
    "small_cnn": small_cnn,
    "leaf_cnn": leaf_cnn,
    "cifar_cnn": cifar_cnn,
    "logreg": logreg,
    "vgg": vgg,
    "adds_mobilenet": adds_mobilenet,
    "metagater_a": metagater_a,
    "metagater_b": metagater_b,
    "mobilenet_v2": mobilenet_v2,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet56": resnet56,
    "char_lstm": char_lstm,
    "sent_lstm": sent_lstm,
}
"""Name -> factory. Every factory takes `input_shape` and `num_classes` by keyword; those of text
take `vocabulary` besides, and `embedding` where word vectors may come with the data."""
