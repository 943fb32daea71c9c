"""Index maps and unit spaces: cutting out, putting back, and what a map weighs."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core.errors import InputError
from subfleet.core.units import Block, Concat, Free, Gates, IndexMap, Unit, UnitSpace, extent

C, D, F, H, E = 4, 3, 5, 3, 2  # conv, second conv, FC, LSTM, embedding units

# One tensor for each row of the table of layer types.
AXES = {
    "conv.weight": (Unit("d"), Unit("c"), Free(), Free()),
    "conv.bias": (Unit("d"),),
    "depthwise.weight": (Unit("c"), Free(), Free(), Free()),
    "norm.running_mean": (Unit("c"),),
    "flat.weight": (Unit("f"), Block("d", 4)),
    "lstm.weight_ih": (Gates("h"), Unit("e")),
    "lstm.weight_hh": (Gates("h"), Unit("h")),
    "lstm.bias_ih": (Gates("h"),),
    "after_bilstm.weight": (Free(), Concat((Unit("h"), Unit("hr")))),
    "after_concat.weight": (Unit("f"), Concat((Unit("c"), Free(2), Block("d", 4)))),
    "embedding.weight": (Free(), Unit("e")),
    "classifier.weight": (Free(), Unit("f")),
    "odd": (Unit("c"), Free(), Unit("d"), Unit("f")),
}
GROUPS = {"c": C, "d": D, "f": F, "h": H, "hr": H, "e": E}
FREE = {
    "conv.weight": (2, 2),
    "depthwise.weight": (1, 3, 3),
    "after_bilstm.weight": (6,),
    "embedding.weight": (7,),
    "classifier.weight": (6,),
    "odd": (2,),
}


def make_space():
    shapes = {}
    for name, bindings in AXES.items():
        free = iter(FREE.get(name, ()))
        shapes[name] = tuple(
            next(free) if isinstance(b, Free) else extent(b, GROUPS) for b in bindings
        )
    return UnitSpace(GROUPS, AXES, shapes)


SPACE = make_space()


def numbered(space, dtype=torch.float64):
    out, start = {}, 1
    for name, shape in space.shapes.items():
        count = int(np.prod(shape))
        out[name] = torch.arange(start, start + count, dtype=dtype).reshape(shape)
        start += count
    return out


@st.composite
def maps(draw, groups=GROUPS):
    kept = {}
    for group, size in groups.items():
        units = draw(st.none() | st.sets(st.integers(0, size - 1), min_size=1))
        if units is not None:
            kept[group] = sorted(units)
    return IndexMap.of(kept)


@pytest.mark.parametrize(
    ("binding", "expected"),
    [
        (Unit("h"), [0, 2]),
        (Block("h", 3), [0, 1, 2, 6, 7, 8]),
        (Gates("h"), [0, 2, 3, 5, 6, 8, 9, 11]),
        (Concat((Unit("h"), Free(2), Unit("hr"))), [0, 2, 3, 4, 6]),
        (Free(3), [0, 1, 2]),
    ],
)
def test_indices_by_hand(binding, expected):
    kept = IndexMap.of({"h": [0, 2], "hr": [1]})
    assert SPACE.indices(binding, kept).tolist() == expected


@given(maps())
def test_slice_is_numpy_ix(kept):
    full = numbered(SPACE)
    small = SPACE.extract(full, kept)
    for name, bindings in AXES.items():
        index = [
            SPACE.indices(b, kept, size)
            for b, size in zip(bindings, SPACE.shapes[name], strict=True)
        ]
        np.testing.assert_array_equal(small[name].numpy(), full[name].numpy()[np.ix_(*index)])
        assert small[name].is_contiguous()
    assert {n: tuple(t.shape) for n, t in small.items()} == SPACE.slice_shapes(kept)
    assert sum(t.numel() for t in small.values()) == SPACE.slice_numel(kept)
    views = SPACE.extract(full, kept, copy=False)
    assert all(torch.equal(views[name], small[name]) for name in small)


@given(maps())
def test_extract_scatter_extract_is_the_identity(kept):
    small = SPACE.extract(numbered(SPACE), kept)
    dense = SPACE.scatter(small, kept)
    again = SPACE.extract(dense, kept)
    assert all(torch.equal(small[name], again[name]) for name in small)
    # Outside the coverage the dense tensors are 0; the numbers start at 1.
    coverage = SPACE.coverage(kept, torch.float64)
    assert all(torch.equal((dense[name] != 0).double(), coverage[name]) for name in dense)


@given(maps())
def test_coverage_is_the_scatter_of_ones_and_the_outer_product(kept):
    ones = {n: torch.ones(s) for n, s in SPACE.slice_shapes(kept).items()}
    scattered, coverage = SPACE.scatter(ones, kept), SPACE.coverage(kept)
    for name, bindings in AXES.items():
        assert torch.equal(scattered[name], coverage[name])
        outer = np.ones(())
        for binding, size in zip(bindings, SPACE.shapes[name], strict=True):
            outer = np.multiply.outer(
                outer, np.isin(np.arange(size), SPACE.indices(binding, kept, size))
            )
        np.testing.assert_array_equal(coverage[name].numpy(), outer)
    assert sum(c.sum() for c in coverage.values()) == SPACE.slice_numel(kept)


@given(maps())
def test_scatter_add_and_scatter_into(kept):
    full = numbered(SPACE)
    small = SPACE.extract(full, kept)
    dense = {n: t.clone() for n, t in full.items()}
    SPACE.scatter_add_(dense, {n: t.float() for n, t in small.items()}, kept, alpha=2.0)
    coverage = SPACE.coverage(kept, torch.float64)
    for name in AXES:
        assert torch.equal(dense[name], full[name] * (1 + 2 * coverage[name]))
    zeros = {n: torch.zeros_like(t) for n, t in small.items()}
    out = SPACE.scatter(zeros, kept, out={n: t.clone() for n, t in full.items()})
    assert all(torch.equal(out[n], full[n] * (1 - coverage[n])) for n in AXES)


@given(maps(), st.integers(0, 10))
def test_permuting_units_permutes_the_slice_of_a_renamed_map(kept, seed):
    # Keep units S of w, or units p(S) of the network in which unit u moved to p(u).
    generator = np.random.default_rng(seed)
    to = {g: generator.permutation(size) for g, size in GROUPS.items()}
    full = numbered(SPACE)
    moved = {}
    for name, bindings in AXES.items():
        tensor = full[name]
        for axis, binding in enumerate(bindings):
            order = permuted(binding, to, tensor.shape[axis])
            tensor = tensor.index_select(axis, torch.from_numpy(order))
        moved[name] = tensor
    renamed = IndexMap.of({g: np.sort(to[g][i]) for g, i in kept.kept.items()})
    a, b = SPACE.extract(full, kept), SPACE.extract(moved, renamed)
    for name in AXES:
        assert sorted(a[name].flatten().tolist()) == sorted(b[name].flatten().tolist())


def permuted(binding, to, size):
    """For each new position along an axis, the old one."""
    match binding:
        case Free(length):
            return np.arange(length or size)
        case Unit(g):
            return np.argsort(to[g])
        case Block(g, e):
            return (np.argsort(to[g])[:, None] * e + np.arange(e)).reshape(-1)
        case Gates(g, q):
            return (np.arange(q)[:, None] * GROUPS[g] + np.argsort(to[g])).reshape(-1)
        case Concat(parts):
            ends = np.cumsum([0] + [extent(p, GROUPS) for p in parts])
            return np.concatenate(
                [permuted(p, to, None) + e for p, e in zip(parts, ends, strict=False)]
            )


@st.composite
def nested(draw):
    """A prefix of every group, and a shorter one of it."""
    wide = {g: draw(st.integers(1, size)) for g, size in GROUPS.items()}
    return wide, {g: draw(st.integers(1, count)) for g, count in wide.items()}


@given(nested())
def test_prefix_slices_nest(widths):
    """Gates, concatenations with a free part, flattened blocks, a whole axis: all of them."""
    wide, narrow = map(IndexMap.prefix, widths)
    full = numbered(SPACE)
    inner = SPACE.within(wide)
    twice = inner.extract(SPACE.extract(full, wide), narrow)
    once = SPACE.extract(full, narrow)
    assert twice.keys() == once.keys() == AXES.keys()
    assert all(torch.equal(twice[n], once[n]) for n in AXES)
    assert inner.slice_shapes(narrow) == SPACE.slice_shapes(narrow)
    assert dict(inner.groups) == widths[0] and inner.shapes == SPACE.slice_shapes(wide)


@given(maps(), st.data())
def test_maps_within_a_sub_network_count_among_its_own_units(kept, data):
    counts = SPACE.counts_by_group(kept)
    own = data.draw(maps(counts))
    outer = {
        g: kept.kept.get(g, np.arange(GROUPS[g]))[own.kept.get(g, np.arange(counts[g]))]
        for g in GROUPS
    }
    full = numbered(SPACE)
    twice = SPACE.within(kept).extract(SPACE.extract(full, kept), own)
    once = SPACE.extract(full, IndexMap.of(outer))
    assert all(torch.equal(twice[n], once[n]) for n in AXES)
    assert SPACE.within(IndexMap.full()) == SPACE
    with pytest.raises(InputError, match=f"has units 0 to {counts['c'] - 1}"):
        SPACE.within(kept).validate(IndexMap.prefix({"c": counts["c"] + 1}))


def test_lstm_slice_equals_a_small_lstm():
    torch.manual_seed(0)
    big = torch.nn.LSTM(E, H, batch_first=True).double()
    axes = {
        "weight_ih_l0": (Gates("h"), Unit("e")),
        "weight_hh_l0": (Gates("h"), Unit("h")),
        "bias_ih_l0": (Gates("h"),),
        "bias_hh_l0": (Gates("h"),),
    }
    state = {n: p.detach() for n, p in big.named_parameters()}
    space = UnitSpace({"h": H, "e": E}, axes, {n: tuple(t.shape) for n, t in state.items()})
    kept = IndexMap.of({"h": [0, 2], "e": [1]})
    small = torch.nn.LSTM(1, 2, batch_first=True).double()
    small.load_state_dict(space.extract(state, kept))
    x = torch.randn(4, 6, E, dtype=torch.float64)
    x[..., 0] = 0  # the dropped input unit, masked
    masked = state["weight_hh_l0"].clone()
    masked[:, 1] = 0  # the dropped hidden unit feeds nothing back
    big.load_state_dict(state | {"weight_hh_l0": masked})
    torch.testing.assert_close(big(x)[0][..., [0, 2]], small(x[..., 1:])[0], rtol=0, atol=1e-12)


def test_full_maps_view_and_copy():
    full = numbered(SPACE)
    assert SPACE.extract(full, IndexMap.full(), copy=False)["conv.bias"] is full["conv.bias"]
    copied = SPACE.extract(full, IndexMap.full())["conv.bias"]
    assert copied.data_ptr() != full["conv.bias"].data_ptr()
    assert set(SPACE.extract({"conv.bias": full["conv.bias"]}, IndexMap.full())) == {"conv.bias"}


def test_equal_maps_share_keys_and_survive_pickling():
    a, b = IndexMap.prefix({"c": 2, "d": 1}), IndexMap.of({"d": np.array([0]), "c": [0, 1]})
    assert a == b and hash(a) == hash(b) and a.key == b.key and a.is_prefix
    assert a != IndexMap.prefix({"c": 2}) and a != IndexMap.full() and a != "map"
    arbitrary = IndexMap.of({"c": [1, 3]})
    assert not arbitrary.is_prefix and "c: [1, 3]" in repr(arbitrary)
    for one in (a, arbitrary, IndexMap.full()):
        back = pickle.loads(pickle.dumps(one))
        assert back == one and list(back.kept) == list(one.kept)
        assert all(np.array_equal(back.kept[g], one.kept[g]) for g in one.kept)
        assert not any(i.flags.writeable for i in back.kept.values())
    wide = IndexMap.prefix({f"layer{i}": 1024 for i in range(5)})
    assert len(pickle.dumps(wide)) < 400
    assert IndexMap.from_masks({"c": np.array([0, 1, 0, 1])}) == arbitrary


def test_counts_and_canonical_form():
    kept = IndexMap.of({"c": [1, 3], "d": [0, 1, 2]})
    assert SPACE.counts(kept) == (2, 3, 5, 3, 3, 2)
    assert SPACE.canonical(kept) == IndexMap.of({"c": [1, 3]})
    whole = IndexMap.prefix(GROUPS)
    assert whole.is_full(SPACE) and SPACE.canonical(whole) == IndexMap.full()


def test_rolling_and_random_maps():
    assert IndexMap.rolling(SPACE, {"c": 3, "f": 2}, start=3) == IndexMap.of(
        {"c": [0, 1, 3], "f": [3, 4]}
    )
    counts = {"f": 2, "c": 3}
    draws = [IndexMap.random(SPACE, counts, np.random.default_rng(i)) for i in range(50)]
    assert draws[0] == IndexMap.random(SPACE, dict(reversed(counts.items())), rng(0))
    assert len(set(draws)) > 10
    assert all(SPACE.counts(d)[0] == 3 and SPACE.counts(d)[2] == 2 for d in draws)
    seen = np.bincount(np.concatenate([d.kept["f"] for d in draws]), minlength=5)
    assert (seen > 5).all()


def rng(seed):
    return np.random.default_rng(seed)


def test_wire_bytes_of_a_map():
    # J_w = 4 + 3 + 5 + 3 + 3 + 2 = 20 units: 3 bytes as bits; 6 groups: 12 as counts.
    assert IndexMap.full().wire_bytes(SPACE) == 0
    assert IndexMap.prefix(GROUPS).wire_bytes(SPACE) == 0
    assert IndexMap.prefix({"c": 2}).wire_bytes(SPACE) == 12
    assert IndexMap.of({"c": [1]}).wire_bytes(SPACE) == 3
    adds = UnitSpace({"a": 64, "b": 128, "c": 256, "d": 1024, "e": 1024}, {}, {})
    assert adds.num_units == 2496
    assert IndexMap.of({"a": [5, 9]}).wire_bytes(adds) == 312


@pytest.mark.parametrize(
    ("units", "says"),
    [
        ([1, 1], "not strictly increasing"),
        ([2, 1], "not strictly increasing"),
        ([-1, 2], "not strictly increasing"),
        ([0.5], "flat list of integers"),
        ([[0], [1]], "flat list of integers"),
    ],
)
def test_bad_indices_are_named(units, says):
    with pytest.raises(InputError, match=says):
        IndexMap.of({"c": units})


def test_maps_that_do_not_fit_the_space():
    with pytest.raises(InputError, match="'c' keeps no unit; keep at least 1"):
        SPACE.validate(IndexMap.of({"c": []}))
    with pytest.raises(InputError, match="'c' has units 0 to 3, the map keeps unit 4"):
        SPACE.validate(IndexMap.of({"c": [0, 4]}))
    with pytest.raises(InputError, match="unknown unit group 'conv'"):
        SPACE.extract(numbered(SPACE), IndexMap.prefix({"conv": 1}))
    with pytest.raises(InputError, match="5 units asked of 4"):
        IndexMap.random(SPACE, {"c": 5}, rng(0))
    with pytest.raises(InputError, match=r"shape \(4,\), the map cuts out \(3,\)"):
        SPACE.scatter({"conv.bias": torch.zeros(4)}, IndexMap.full())


@given(maps())
def test_leaves_beside_the_network_are_bound_by_their_last_part_or_free(kept):
    full = numbered(SPACE)
    leaves = {"free": torch.tensor([7.0, 8.0]), "scalar": torch.tensor(2.0)}
    leaves |= {f"adam/m/{n}": -t for n, t in full.items()}
    small, alone = SPACE.extract(leaves, kept), SPACE.extract(full, kept)
    assert torch.equal(small["free"], leaves["free"]) and small["scalar"] == 2
    assert small["free"].data_ptr() != leaves["free"].data_ptr()
    assert all(torch.equal(small[f"adam/m/{n}"], -alone[n]) for n in full)
    assert SPACE.cut_numel(leaves, kept) == 3 + SPACE.slice_numel(kept)
    SPACE.check(small, kept)
    dense = SPACE.scatter(small, kept)
    coverage = SPACE.coverage(kept, torch.float64)
    assert torch.equal(dense["free"], leaves["free"]) and dense["scalar"].shape == ()
    assert all(torch.equal(dense[f"adam/m/{n}"], -full[n] * coverage[n]) for n in full)
    SPACE.add_constant_(dense, kept, 1.0)
    assert dense["free"].tolist() == [8, 9] and dense["scalar"] == 3
    with pytest.raises(InputError, match=r"'free' has shape \(1,\), elsewhere \(2,\)"):
        SPACE.scatter_add_(dense, {"free": torch.ones(1)}, kept)
    with pytest.raises(InputError, match=r"'m/conv.bias' has shape \(9,\), the map cuts out"):
        SPACE.check({"m/conv.bias": torch.ones(9)}, kept)


def test_spaces_that_contradict_themselves():
    with pytest.raises(InputError, match="'w' has shape"):
        UnitSpace({"c": 3}, {"w": (Unit("c"),)}, {"w": (4,)})
    with pytest.raises(InputError, match="'w' has shape"):
        UnitSpace({"c": 3}, {"w": (Unit("c"),)}, {"w": (3, 2)})
    with pytest.raises(InputError, match="not both"):
        UnitSpace({"c": 3}, {"w": (Unit("c"),)}, {})
    with pytest.raises(InputError, match="no extent"):
        extent(Free(), {})


def test_cuts_are_kept_for_a_bounded_number_of_maps():
    space = pickle.loads(pickle.dumps(SPACE))
    full = {"classifier.weight": numbered(SPACE)["classifier.weight"]}
    generator = rng(0)
    for _ in range(600):
        space.extract(full, IndexMap.random(space, {"c": 2, "f": 3, "d": 2}, generator))
    for units in itertools.product(*[[[0], [1], [0, 1]]] * 6):
        space.extract(full, IndexMap.of(dict(zip(GROUPS, units, strict=True))))
    assert len(space._cuts) == 256 and space == SPACE
