import json
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import nn

from subfleet.core.errors import InputError
from subfleet.core.program import ClientResult, RunProgram, StepProgram
from subfleet.models import chain, char_lstm, supernet
from subfleet.platform.record import (
    Choice,
    EngineRecord,
    candidates,
    possible,
    variant_name,
)


def test_the_last_entry_that_has_begun_holds_whatever_the_order_of_others():
    record = EngineRecord(
        (
            Choice("a", "cpu", "loop"),
            Choice("a", "cuda", "vmap", 256),
            Choice("a", "cpu", "vmap", 8, from_round=5),
            Choice("a", "cpu", "vmap", 4, from_round=7),
        )
    )
    held = [record.at("a", "cpu", r) for r in (1, 4, 5, 6, 7, 99)]
    assert [choice and choice.side_by_side for choice in held] == [1, 1, 8, 8, 4, 4]
    assert record.at("a", "cuda", 9) == Choice("a", "cuda", "vmap", 256)
    assert record.at("c", "cpu", 1) is None and record.at("b", "cuda", 1) is None


def test_what_was_chosen_in_rounds_of_another_kind_does_not_hold():
    record = EngineRecord(tuple(Choice("a", "cpu", "vmap", n, from_round=n) for n in (2, 3, 4, 5)))
    odd = [record.at("a", "cpu", r, lambda other: other % 2 == 1) for r in (2, 3, 4, 5, 6)]
    assert [choice and choice.from_round for choice in odd] == [None, 3, 3, 5, 5]


def test_a_choice_that_begins_later_does_not_hold_yet():
    later = EngineRecord((Choice("a", "cpu", "loop", from_round=3),))
    assert later.at("a", "cpu", 2) is None and later.at("a", "cpu", 3) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"way": "zzz"},
        {"device": "tpu"},
        {"memory_format": "weird"},
        {"dtype": "float16"},
        {"compiled": 0},
        {"factored": 1},
        {"products": "cublas"},
        {"threads": 2},
        {"side_by_side": 0},
        {"side_by_side": "4"},
        {"from_round": 0},
        {"from_round": 1.5},
    ],
)
def test_what_cannot_be_computed_is_refused(wrong):
    entry = {"variant": "a", "device": "cpu", "way": "loop"} | wrong
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name}={wrong[name]!r} for variant a"):
        EngineRecord.from_json({"version": 1, "choices": [entry]})


@pytest.mark.parametrize("other", [{"way": "loop"}, {"way": "vmap", "device": "cuda"}])
def test_onednn_is_refused_where_it_multiplies_nothing(other):
    entry = {"variant": "a", "device": "cpu", "products": "onednn"} | other
    with pytest.raises(InputError, match="products='onednn' for variant a"):
        EngineRecord.from_json({"version": 1, "choices": [entry]})


def test_a_record_grows_at_its_end():
    first = EngineRecord((Choice("a", "cpu", "loop"),))
    grown = first.extended([Choice("b", "cpu", "loop")])
    assert grown.begins_with(first) and grown.begins_with(EngineRecord())
    assert not first.begins_with(grown)
    assert not grown.begins_with(EngineRecord((Choice("b", "cpu", "loop"),)))


def test_survives_json_and_a_file(tmp_path):
    record = EngineRecord((Choice("(4, 2)", "cuda", "vmap", 256, "channels_last", from_round=2),))
    assert EngineRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(record.to_json()))
    assert EngineRecord.load(str(path)) == record


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "engine.json"),
        ('{"choices": []}', "not an engine record"),
        ('{"version": 99, "choices": []}', "version 99"),
        ('{"version": 1, "choices": [{"variant": "a"}]}', "not an engine record"),
        ('{"version": 1, "choices": [{"variant": "a", "device": "cpu", "wey": 1}]}', "wey"),
    ],
)
def test_what_is_no_record_is_one_message(tmp_path, text, part):
    path = tmp_path / "engine.json"
    path.write_text(text)
    with pytest.raises(InputError, match=part):
        EngineRecord.load(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"--engine-record .*nowhere\.json"):
        EngineRecord.load(str(tmp_path / "nowhere.json"))


LOSS = toys.loss_program()
SEARCH = RunProgram(run=print)  # pyright: ignore[reportArgumentType]


def tried(net, device="cpu", engine="auto", program=LOSS, dtype="float32"):
    ways = possible(net, program)
    return candidates(net, (1, 2), device, engine, dtype, ways=ways, round=3)


def ways(*given, **options):
    return [choice.way for choice in tried(*given, **options)]


def dense(width: int):
    layers = OrderedDict(fc=nn.Linear(784, width), out=nn.Linear(width, 9))
    return chain("dense", nn.Sequential(layers), (784,))


def test_what_is_tried_on_cpus_and_gpus():
    assert ways(toys.cnn()) == ["traced", "loop"], "mapped convolutions never pay on a CPU"
    assert ways(toys.cnn(), "cuda") == ["vmap", "vmap", "traced", "loop"]
    assert [c.side_by_side for c in tried(toys.cnn(), "cuda")] == [256, 64, 1, 1]
    assert [c.side_by_side for c in tried(toys.mlp())] == [128, 32, 1, 1]
    # Four clients' parameters leave the cache; but held as factors many may go side by side.
    assert ways(dense(2048)) == ["traced", "traced", "loop", "vmap", "vmap"]
    assert [c.products for c in tried(dense(2048))] == ["onednn", "blas", "blas", "onednn", "blas"]
    assert [c.factored for c in tried(dense(2048))] == [True, True, False, True, True]
    assert [c.side_by_side for c in tried(dense(2048))] == [1, 1, 1, 82, 82], "half a gigabyte"
    assert ways(dense(1 << 18)) == ["traced", "traced", "loop"]
    assert ways(toys.mlp(), engine="vmap") == ["vmap", "loop"]
    assert ways(toys.mlp(), "cuda", "traced") == ["traced", "loop"]
    assert ways(toys.mlp(), "cuda", "loop") == ["loop"]


def with_layer(layer):
    layers = OrderedDict(fc=nn.Linear(4, 4), own=layer, head=nn.Linear(4, 2))
    return supernet(nn.Sequential(layers), torch.zeros(2, 4))


class Drops(nn.Module):
    """Calls dropout itself."""

    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


def test_norms_and_dropout_are_mapped_where_their_layers_are_known():
    for net in (toys.mlp(norm=True), toys.cnn("batch"), with_layer(nn.Dropout(0.5))):
        assert ways(net, "cuda", "vmap") == ["vmap", "loop"]
    for layer in (nn.AlphaDropout(0.5), Drops()):
        assert ways(with_layer(layer), "cuda", "vmap") == ["loop"]
        assert ways(with_layer(layer), "cuda") == ["traced", "loop"]
    still = replace(toys.mlp(), statistics=frozenset({"fc0.bias"}))  # held by no known layer
    assert ways(still, "cuda", "vmap") == ["loop"]
    # A step program's layers are not told which rows are padding.
    steps = StepProgram(lambda: {}, lambda: ({}, {}), lambda: ClientResult({}), {})
    assert ways(toys.mlp(norm=True), "cuda", "auto", steps) == ["loop"]
    assert ways(with_layer(nn.Dropout(0.5)), "cuda", "vmap", steps) == ["vmap", "loop"]


def test_searches_and_recurrent_layers_are_not_mapped():
    assert ways(toys.mlp(), "cuda", "vmap", SEARCH) == ["loop"]
    assert ways(toys.cnn("group"), "cuda")[0] == "vmap"
    assert ways(char_lstm(hidden=4, embedding_size=3)) == ["loop"]


def test_images_lie_in_channels_last_unless_they_are_mapped():
    formats = {c.way: c.memory_format for c in tried(toys.cnn(), "cuda")}
    assert formats == {"vmap": "contiguous", "traced": "channels_last", "loop": "channels_last"}
    assert {c.memory_format for c in tried(toys.mlp())} == {"contiguous"}


def test_code_that_cannot_have_channels_last_is_spared():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(108, 4)

        def forward(self, x):
            x = self.conv(x)
            return self.head(x.view(x.size(0), -1))

    assert {c.memory_format for c in tried(supernet(Views(), torch.zeros(1, 1, 8, 8)))} == {
        "contiguous"
    }


def test_a_choice_says_what_was_asked():
    assert variant_name((8, 4)) == "(8, 4)"
    (choice,) = tried(toys.mlp(), engine="loop", dtype="bfloat16")
    assert choice == Choice("(1, 2)", "cpu", "loop", dtype="bfloat16", from_round=3)
