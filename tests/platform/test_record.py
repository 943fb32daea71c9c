import json
from collections import OrderedDict

import pytest
import toys
from torch import nn

from subfleet.core.errors import InputError
from subfleet.models import chain
from subfleet.platform.record import Choice, EngineRecord, choose, must_loop, variant_name


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


def test_a_choice_that_begins_later_does_not_hold_yet():
    later = EngineRecord((Choice("a", "cpu", "loop", from_round=3),))
    assert later.at("a", "cpu", 2) is None and later.at("a", "cpu", 3) is not None


@pytest.mark.parametrize(
    "wrong",
    [
        {"way": "zzz"},
        {"device": "tpu"},
        {"memory_format": "weird"},
        {"dtype": "bfloat16"},
        {"compiled": True},
        {"compiled": 0},
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


def way(net, device="cpu", engine="auto", *, search=False):
    loop = search or must_loop(net)
    return choose(net, (1, 2), device, engine, loop=loop, round=1).way


def test_auto_loops_on_cpus_and_maps_on_gpus():
    assert way(toys.cnn()) == "loop"
    assert way(toys.cnn(), "cuda") == "vmap"
    assert way(toys.mlp()) == "vmap", "small and dense: steps are mostly overhead"
    large = chain(
        "large", nn.Sequential(OrderedDict(fc=nn.Linear(784, 512), out=nn.Linear(512, 9))), (784,)
    )
    assert way(large) == "loop", "four clients' parameters leave the cache"
    assert way(toys.mlp(), engine="vmap") == "vmap"
    assert way(toys.mlp(), "cuda", "loop") == "loop"


def test_batch_norm_dropout_and_searches_always_loop():
    dropping = chain(
        "dropping",
        nn.Sequential(OrderedDict(fc=nn.Linear(4, 4), drop=nn.Dropout(0.5), head=nn.Linear(4, 2))),
        (4,),
    )
    for net in (toys.mlp(norm=True), toys.cnn("batch"), dropping):
        assert way(net, "cuda", "vmap") == "loop"
    assert way(toys.mlp(), "cuda", "vmap", search=True) == "loop"
    assert way(toys.cnn("group"), "cuda") == "vmap"


def test_images_loop_in_channels_last_and_are_mapped_contiguously():
    assert (
        choose(toys.cnn(), 1, "cpu", "auto", loop=False, round=1).memory_format == "channels_last"
    )
    assert choose(toys.cnn(), 1, "cpu", "vmap", loop=False, round=1).memory_format == "contiguous"
    assert choose(toys.mlp(), 1, "cpu", "loop", loop=False, round=1).memory_format == "contiguous"


def test_variants_are_known_by_their_repr():
    assert variant_name((8, 4)) == "(8, 4)"
    assert choose(toys.mlp(), (8, 4), "cpu", "loop", loop=False, round=3) == Choice(
        "(8, 4)", "cpu", "loop", from_round=3
    )
