"""Recurrent networks for text: sizes, cuts, frozen word vectors, and whole runs on tokens."""

from __future__ import annotations

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from torch import Tensor
from torch.func import functional_call

from subfleet import registry
from subfleet.algorithms.fedpa import FedPA
from subfleet.config import Experiment, ModelTable
from subfleet.core.budget import width_map
from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule, Params, Stream
from subfleet.core.scaling import Scaling
from subfleet.core.supernet import SuperNetwork, has_dropout
from subfleet.core.units import Free, IndexMap, Unit
from subfleet.datasets import SETS
from subfleet.datasets.federation import offsets_of
from subfleet.datasets.memory import InMemory
from subfleet.launch import launch
from subfleet.models import ZOO
from subfleet.platform.record import Choice, possible
from subfleet.platform.resident import Resident

WORDS, LENGTH, CLASSES = 12, 6, 3
VECTORS = np.random.default_rng(3).standard_normal((WORDS, 5)).astype(np.float32)
SIZES = {"input_shape": (LENGTH,), "num_classes": CLASSES, "vocabulary": WORDS, "hidden": 7}


def small(name: str, **options) -> SuperNetwork:
    return ZOO[name](**SIZES | {"dense": 8} | options)


class Text(InMemory):
    """Rows of int16 tokens whose class the last one decides; every other token is noise."""

    def __init__(self, clients: int = 8, embedding: np.ndarray | None = None) -> None:
        draw = np.random.default_rng(1)
        x = draw.integers(0, WORDS, (clients * 20, LENGTH)).astype(np.int16)
        y = x[:, -1].astype(np.int64) % CLASSES
        super().__init__(x, y, offsets_of(np.full(clients, 20)), num_classes=CLASSES, name="text")
        self.vocabulary, self.embedding = WORDS, embedding


# --- sizes ---------------------------------------------------------------------------------------


def test_sizes_of_the_shakespeare_network_of_the_papers() -> None:
    paper = partial(
        ZOO["char_lstm"], vocabulary=80, embedding_size=32, hidden=256, bidirectional=True
    )
    net = paper(dense=0)
    rows = {layer.name: layer for layer in net.layers}
    assert list(rows) == [
        "embedding",
        *("lstm.l0", "lstm.l0_reverse", "lstm.l1", "lstm.l1_reverse"),
        "fc2",
    ]
    assert net.cost(count_bias=True).params == 2_560 + 2_170_880 + 41_040
    assert net.stored_params(IndexMap.full()) == 2_560 + 2_170_880 + 41_040
    step = 2 * 4 * 256 * (32 + 256) + 2 * 4 * 256 * (512 + 256)
    assert net.cost().macs == 80 * step + 512 * 80
    sampled = paper(dense=256)  # so that ADDS has something to sample
    assert dict(sampled.space.groups) == {"fc1": 256}
    assert sampled.cost(count_bias=True).params == 2_560 + 2_170_880 + 131_328 + 20_560


def test_sizes_of_the_sentiment_network_of_the_papers() -> None:
    glove = np.zeros((50, 300), np.float32)
    net = ZOO["sent_lstm"](vocabulary=50, embedding=glove, hidden=256, dense=128)
    assert net.cost(count_bias=True).params == 2_719_744 + 65_922
    assert net.stored_params(IndexMap.full()) == 2_719_744 + 65_922, "GloVe is not sent"
    step = 2 * 4 * 256 * (300 + 256) + 2 * 4 * 256 * (512 + 256)
    assert net.cost().macs == 25 * step + 512 * 128 + 128 * 2


@pytest.mark.parametrize("name", ["char_lstm", "sent_lstm"])
@pytest.mark.parametrize("kept", [8, 3])
def test_costs_count_what_the_small_module_holds(name: str, kept: int) -> None:
    net, map = small(name, width=1.0), IndexMap.prefix({"fc1": kept})
    held = sum(p.numel() for p in net.module(map).parameters())
    assert net.cost(map, count_bias=True).params == held == net.stored_params(map)
    assert net.wire_bytes(IndexMap.of({"fc1": [1, 4]})).map == 1, "8 units, no recurrent ones"


def test_width_scales_the_hidden_sizes_and_zero_leaves_the_hidden_layer_out() -> None:
    net = small("char_lstm", hidden=10, width=0.5)
    assert net.space.shapes["lstm.weight_hh_l0"] == (4 * 5, 5)
    assert dict(net.space.groups) == {"fc1": 4}
    assert small("char_lstm", dense=0).elastic == ()


# --- what it computes ----------------------------------------------------------------------------


def lstm(w: Params, layer: int, x_BTE: Tensor, *, reverse: bool) -> Tensor:
    """One layer in one direction, by its equations, torch's order of gates: i, f, g, o."""
    end = f"l{layer}" + ("_reverse" if reverse else "")
    hidden = w[f"lstm.weight_hh_{end}"].shape[1]
    h = c = torch.zeros(len(x_BTE), hidden, dtype=x_BTE.dtype)
    out = []
    for x in x_BTE.flip(1).unbind(1) if reverse else x_BTE.unbind(1):
        gates = x @ w[f"lstm.weight_ih_{end}"].T + w[f"lstm.bias_ih_{end}"]
        gates = gates + h @ w[f"lstm.weight_hh_{end}"].T + w[f"lstm.bias_hh_{end}"]
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out[::-1] if reverse else out, 1)


def plain(w: Params, x: Tensor, table: Tensor, *, both: bool, pool: str) -> Tensor:
    """Two LSTM layers, the final states or the largest outputs, FC, FC."""
    rows = table[x]
    for layer in (0, 1):
        parts = [lstm(w, layer, rows, reverse=reverse) for reverse in (False, True)[: 1 + both]]
        rows = torch.cat(parts, dim=2)
    # A direction's final state stands at the last token, read backwards at the first.
    final = [part[:, 0 if reverse else -1] for reverse, part in enumerate(parts)]
    if pool == "max":
        final = [part.amax(1) for part in parts]
    hidden = (torch.cat(final, 1) @ w["fc1.weight"].T + w["fc1.bias"]).relu()
    return hidden @ w["fc2.weight"].T + w["fc2.bias"]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("pool", ["last", "max"])
@pytest.mark.parametrize("vectors", [None, VECTORS])
def test_modules_compute_the_equations(both: bool, pool: str, vectors: np.ndarray | None) -> None:
    options = {"bidirectional": both, "embedding_size": 4, "pool": pool}
    net = small("sent_lstm", embedding=vectors, **options)
    kept = IndexMap.of({"fc1": [0, 2, 7]})
    w = {n: t.double() for n, t in net.space.extract(net.init(0), kept).items()}
    module = net.module(kept).double()
    module.load_state_dict(w)
    x = torch.from_numpy(np.random.default_rng(0).integers(0, WORDS, (4, LENGTH)))
    table = w["embedding.weight"] if vectors is None else torch.from_numpy(vectors).double()
    torch.testing.assert_close(module(x), plain(w, x, table, both=both, pool=pool))


def test_only_the_hidden_layer_is_cut() -> None:
    net = small("char_lstm", bidirectional=True)
    assert net.elastic == ("fc1",)
    assert net.space.axes["fc1.weight"] == (Unit("fc1"), Free(14))
    assert net.space.axes["fc2.weight"] == (Free(CLASSES), Unit("fc1"))
    kept = width_map(net, 0.25)
    shapes = net.space.slice_shapes(kept)
    cut = {name for name, shape in shapes.items() if shape != net.space.shapes[name]}
    assert cut == {"fc1.weight", "fc1.bias", "fc2.weight"}


def test_a_mask_on_the_hidden_layer_is_the_slice() -> None:
    net, kept = small("char_lstm"), IndexMap.of({"fc1": [1, 2, 6]})
    w = {n: t.double() for n, t in net.init(1).items()}
    cut = net.module(kept).double()
    cut.load_state_dict(net.space.extract(w, kept))
    x = torch.randint(0, WORDS, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    masked = net.space.scatter(net.space.extract(w, kept), kept)
    torch.testing.assert_close(functional_call(net.module().double(), masked, (x,)), cut(x))


# --- frozen word vectors -------------------------------------------------------------------------


def test_word_vectors_are_constants_outside_the_tree() -> None:
    net = small("sent_lstm", embedding=VECTORS.astype(np.float64))
    assert not any("embedding" in n or "vectors" in n for n in net.space.shapes)
    assert set(net.module().state_dict()) == set(net.init(0)) == set(net.space.shapes)
    resident = Resident(net, IndexMap.full(), Choice("v", "cpu", "loop"))
    assert resident.statistics == {} and set(resident.params) == set(net.space.shapes)
    assert small("sent_lstm", embedding=VECTORS, pretrained=False).space.shapes[
        "embedding.weight"
    ] == (WORDS, 64)


def test_a_network_with_word_vectors_pickles_and_shares_them() -> None:
    table = VECTORS.copy()
    table.setflags(write=False)  # as Ray hands arrays out
    net = pickle.loads(pickle.dumps(small("sent_lstm", embedding=table)))
    module, bare = net.module(), net.module(device="meta")
    assert isinstance(module.vectors, Tensor)
    assert module.vectors.data_ptr() == net.module().vectors.data_ptr()
    # Without storage of its own the module still computes: the constants come along.
    x = torch.zeros(2, LENGTH, dtype=torch.int64)
    w = net.init(0)
    module.load_state_dict(w)
    assert torch.equal(functional_call(bare, w, (x,)), module(x))


# --- tokens through the platform -----------------------------------------------------------------


@pytest.mark.parametrize("stored", [np.int8, np.int16, np.int32, np.int64])
def test_tokens_reach_the_network_as_int64(stored: type) -> None:
    resident = Resident(small("char_lstm"), IndexMap.full(), Choice("v", "cpu", "loop"))
    tokens = np.array([[3, 0, 11]], stored)
    seen = resident.images(torch.from_numpy(tokens), Scaling(2.0, 1.0))
    assert seen.dtype == torch.int64 and seen.tolist() == [[3, 0, 11]], "never scaled"


def algorithm(net: SuperNetwork, rounds: int = 3) -> FedPA:
    rule, stream = LocalRule(lr=0.5, clip_norm=5.0), Stream(batch=8, epochs=2)
    return FedPA(toys.setting(net, (1.0, 0.5), rule, stream, rounds=rounds))


@pytest.mark.parametrize("vectors", [None, VECTORS])
def test_runs_repeat_to_the_bit_and_recurrent_networks_loop(
    tmp_path: Path, vectors: np.ndarray | None
) -> None:
    net, data = small("sent_lstm", embedding=vectors), Text(embedding=vectors)
    options = {"eval_every": 1, "engine": "vmap"}
    one = toys.run(toys.job(algorithm(net), data, **options), tmp_path / "one")
    two = toys.run(toys.job(algorithm(net), data, **options), tmp_path / "two", workers=2)
    assert one["params_sha256"] == two["params_sha256"]
    assert '"way": "loop"' in (tmp_path / "one" / "engine.json").read_text()
    assert "vmap" not in (tmp_path / "one" / "engine.json").read_text()


def test_dropout_between_recurrent_layers_is_seen() -> None:
    assert possible(small("char_lstm"), toys.loss_program()) == {"loop"}
    assert has_dropout(torch.nn.LSTM(3, 4, 2, dropout=0.5))
    assert not has_dropout(torch.nn.LSTM(3, 4, 2))


def test_the_gradient_tree_of_a_step_reaches_the_recurrent_layers() -> None:
    net = small("char_lstm")
    resident = Resident(net, IndexMap.full(), Choice("v", "cpu", "loop"))
    w = net.init(0)
    x = torch.from_numpy(Text().block(np.array([0]), "train").x).long()
    grads = torch.func.grad(lambda p: resident(p, x).square().sum())(w)
    assert set(grads) == set(w)
    assert all(bool(g.abs().sum() > 0) for g in grads.values())


def experiment(model: dict, **run) -> Experiment:
    return Experiment.model_validate(
        {
            "data": {"name": "toy_text", "clients": 8},
            "model": model,
            "fleet": {"tiers": [{"name": "a", "share": 1, "width": 0.5}]},
            "train": {"lr": 1.0, "batch_size": 8, "epochs": 4, "clip_norm": 5.0},
            "run": {"rounds": 12, "cohort": 6, "eval_every": 12, "checkpoint_every": 0} | run,
        }
    )


@pytest.fixture
def known_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETS, "toy_text", Text)


@pytest.mark.usefixtures("known_text")
def test_a_run_on_tokens_learns(tmp_path: Path) -> None:
    model = {"name": "char_lstm", "hidden": 16, "dense": 16, "bidirectional": True}
    run = launch(experiment(model), out=tmp_path / "run", local=True)
    assert run.params()["embedding.weight"].shape == (WORDS, 32)
    assert run.metrics[-1]["loss_train"] < 0.7 * run.metrics[0]["loss_train"]


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("known_text")
def test_a_model_for_images_refuses_tokens(tmp_path: Path) -> None:
    words = "'small_cnn': the data are tokens, .*; choose one of char_lstm, sent_lstm"
    with pytest.raises(InputError, match=words):
        launch(experiment({"name": "small_cnn"}), out=tmp_path / "run", local=True)


def test_a_text_model_refuses_images_and_odd_vectors() -> None:
    with pytest.raises(InputError, match=r"reads rows of tokens, .* \(1, 28, 28\)"):
        ZOO["char_lstm"](input_shape=(1, 28, 28))
    with pytest.raises(InputError, match="a vocabulary of 0; choose another model"):
        ZOO["char_lstm"](input_shape=(9,), vocabulary=0)
    with pytest.raises(InputError, match=r"word vectors have shape \(12, 5\), its vocabulary 13"):
        small("sent_lstm", vocabulary=13, embedding=VECTORS)
    with pytest.raises(InputError, match=r"model\.layers is 0; give a whole number from 1 up"):
        small("char_lstm", layers=0)
    with pytest.raises(InputError, match=r"model\.pool is 'mean'; choose last or max"):
        small("char_lstm", pool="mean")
    with pytest.raises(InputError, match=r"model\.vocabulary follows from the run"):
        registry.build_model(
            ModelTable.model_validate({"name": "char_lstm", "vocabulary": 5}), vocabulary=5
        )
