import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from subfleet.core.errors import InputError
from subfleet.platform import checkpoint

DTYPES = [np.float32, np.float64, np.int64, np.bool_, np.uint8]
arrays = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    )
)
leaves = (
    arrays
    | arrays.map(lambda a: torch.from_numpy(a.copy()))
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary(max_size=20)
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.integers()
states = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(st.sampled_from(["$map", "$tensor", "a"]), inner)
    ),
    max_leaves=12,
)


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, (np.ndarray, torch.Tensor)):
        assert a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    elif isinstance(a, float):
        assert a == b or (math.isnan(a) and math.isnan(b))
    else:
        assert a == b


@given(state=states)
def test_any_state_comes_back(tmp_path_factory, state):
    folder = tmp_path_factory.mktemp("c")
    checkpoint.save(folder, 1, state, fingerprint="f")
    found = checkpoint.load_latest(folder, fingerprint="f")
    assert found is not None and found.round == 1 and found.warnings == ()
    same(state, found.state)


def test_views_and_odd_memory_come_back(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    state = {
        "view": x[1:],
        "transposed": x.T,
        "whole": x,
        "half": x.to(torch.bfloat16),
        "grad": x.clone().requires_grad_(),
        "numpy": np.arange(6).reshape(2, 3).T,
        "big": np.array([1.5], dtype=">f8"),
    }
    checkpoint.save(tmp_path, 1, state, fingerprint="f")
    found = checkpoint.load_latest(tmp_path, fingerprint="f")
    assert found is not None
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found.state[key], value.detach())
        else:
            assert np.array_equal(found.state[key], value)


def test_what_cannot_be_saved_is_named(tmp_path):
    checkpoint.save(tmp_path, 1, {}, fingerprint="f")
    with pytest.raises(InputError, match=r"state\.a\[1\]: a set cannot be saved"):
        checkpoint.save(tmp_path, 2, {"a": [1, {2}]}, fingerprint="f")
    with pytest.raises(InputError, match=r"state\.b: arrays of <U1"):
        checkpoint.save(tmp_path, 2, {"b": np.array(["x"])}, fingerprint="f")
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]


def test_the_last_ones_are_kept(tmp_path):
    for number in (5, 10, 15, 20):
        checkpoint.save(tmp_path, number, {"n": number}, fingerprint="f", keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000015", "round-000020"]
    checkpoint.save(tmp_path, 17, {"n": 17}, fingerprint="f", keep=2)  # after falling back to 15
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000015", "round-000017"]


def test_none_at_all(tmp_path):
    assert checkpoint.load_latest(tmp_path / "absent", fingerprint="f") is None
    assert checkpoint.load_latest(tmp_path, fingerprint="f") is None


def cut(path):
    file = path / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def flip(path):
    file = path / "arrays.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def cut_manifest(path):
    file = path / "manifest.json"
    file.write_bytes(file.read_bytes()[:40])


def empty_manifest(path):
    (path / "manifest.json").write_text('{"round": 2, "fingerprint": "f", "files": {}}')


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip,
        cut_manifest,
        empty_manifest,
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "state.json").unlink(),
    ],
)
def test_a_damaged_newest_falls_back_with_a_warning(tmp_path, damage):
    for number in (1, 2):
        state = {"t": torch.ones(5), "a": np.ones(5), "n": number}
        newest = checkpoint.save(tmp_path, number, state, fingerprint="f")
    damage(newest)
    found = checkpoint.load_latest(tmp_path, fingerprint="f")
    assert found is not None and found.round == 1 and found.state["n"] == 1
    assert len(found.warnings) == 1 and "round-000002 is damaged" in found.warnings[0]
    # The round is reached again: the whole one takes the damaged one's place.
    checkpoint.save(tmp_path, 2, {"n": 2}, fingerprint="f")
    again = checkpoint.load_latest(tmp_path, fingerprint="f")
    assert again is not None and again.round == 2 and again.warnings == ()


def test_all_damaged_is_an_error(tmp_path):
    for number in (1, 2):
        cut_manifest(checkpoint.save(tmp_path, number, {}, fingerprint="f"))
    with pytest.raises(InputError, match="none of 2 checkpoints is whole"):
        checkpoint.load_latest(tmp_path, fingerprint="f")


def test_another_experiment_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {}, fingerprint="f1")
    with pytest.raises(InputError, match=r"another experiment .fingerprint f1, this one f2"):
        checkpoint.load_latest(tmp_path, fingerprint="f2")


def test_a_kill_while_writing_leaves_the_one_before(tmp_path):
    checkpoint.save(tmp_path, 1, {"n": 1}, fingerprint="f")
    half = tmp_path / ".tmp-round-000002"
    half.mkdir()
    (half / "state.json").write_text("{")
    found = checkpoint.load_latest(tmp_path, fingerprint="f")
    assert found is not None and found.round == 1
    checkpoint.save(tmp_path, 2, {"n": 2}, fingerprint="f")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["round-000001", "round-000002"]


def test_attached_files_are_held_to_their_sums(tmp_path):
    shared = tmp_path / "shared"
    shared.write_bytes(b"x" * 1000)

    def attach(path):
        (path / "kept").mkdir()
        (path / "kept" / "rows").hardlink_to(shared)
        (path / "kept" / "index").write_text("1")

    folder = tmp_path / "c"
    first = checkpoint.save(folder, 1, {}, fingerprint="f", attach=attach)
    second = checkpoint.save(folder, 2, {}, fingerprint="f", attach=attach)
    sums = [json.loads((p / "manifest.json").read_text())["files"] for p in (first, second)]
    assert sums[0] == sums[1] and "kept/rows" in sums[0]
    (second / "kept" / "index").write_text("2")
    found = checkpoint.load_latest(folder, fingerprint="f")
    assert found is not None and found.round == 1 and "kept/index" in found.warnings[0]


def test_a_failing_attachment_leaves_nothing(tmp_path):
    def attach(path):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        checkpoint.save(tmp_path, 1, {}, fingerprint="f", attach=attach)
    assert list(tmp_path.iterdir()) == []
