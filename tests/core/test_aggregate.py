"""Indexed aggregation: the seven oracles, and the three forms of one sum."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core import aggregate
from subfleet.core.aggregate import Update, accumulate, coverage_counts, finish, merge, sums
from subfleet.core.errors import InputError
from subfleet.core.units import Block, Free, IndexMap, Unit, UnitSpace

SPACE = UnitSpace(
    {"c": 4, "f": 6},
    {
        "conv.weight": (Unit("c"), Free(), Free()),
        "fc.weight": (Unit("f"), Block("c", 2)),
        "out.bias": (Free(),),
    },
    {"conv.weight": (4, 2, 2), "fc.weight": (6, 8), "out.bias": (3,)},
)
MATRIX = UnitSpace({"o": 3, "i": 3}, {"w": (Unit("o"), Unit("i"))}, {"w": (3, 3)})
BIAS = UnitSpace({"h": 4}, {"b": (Unit("h"),)}, {"b": (4,)})


def random_tensors(generator, space=SPACE, kept=None, dtype=torch.float64):
    shapes = space.slice_shapes(kept or IndexMap.full())
    return {n: torch.from_numpy(generator.standard_normal(s)).to(dtype) for n, s in shapes.items()}


def random_clients(seed, count, space=SPACE, dtype=torch.float64, distinct=None):
    """(map, small tensors, weight) of some clients; at most `distinct` different maps."""
    generator = np.random.default_rng(seed)
    pool = []
    for _ in range(distinct or count):
        counts = {g: int(generator.integers(1, c + 1)) for g, c in space.groups.items()}
        pool.append(IndexMap.random(space, counts, generator))
    clients = []
    for _ in range(count):
        kept = pool[int(generator.integers(len(pool)))]
        weight = int(generator.integers(1, 100))
        clients.append((kept, random_tensors(generator, space, kept, dtype), weight))
    return clients


def total(clients, space=SPACE):
    update = Update()
    for kept, tensors, weight in clients:
        accumulate(update, space, kept, tensors, weight)
    return update


def by_definition(clients, space, current):
    """num / den, coordinate by coordinate, from dense coverages."""
    new = {}
    for name, now in current.items():
        num, den = torch.zeros_like(now), torch.zeros_like(now)
        for kept, tensors, weight in clients:
            if name in tensors:
                num += weight * space.scatter({name: tensors[name]}, kept)[name]
                den += weight * space.coverage(kept, now.dtype)[name]
        new[name] = torch.where(den > 0, num / den, now)
    return new


def assert_close(a, b, atol=1e-12):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


@given(st.integers(0, 100), st.integers(1, 12))
def test_1_full_maps_are_fedavg(seed, count):
    generator = np.random.default_rng(seed)
    clients = [
        (IndexMap.full(), random_tensors(generator), int(generator.integers(1, 500)))
        for _ in range(count)
    ]
    new = finish(total(clients), SPACE, random_tensors(generator))
    weight = sum(n for *_, n in clients)
    fedavg = {n: sum(a * t[n] for _, t, a in clients) / weight for n in SPACE.shapes}
    assert_close(new, fedavg)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((1, 3), [[2, 2, 2], [4.25, 4.25, 2], [5, 5, 9]]),
        ((1, 1), [[2, 2, 2], [3.5, 3.5, 2], [5, 5, 9]]),
    ],
)
def test_2_two_overlapping_clients(weights, expected):
    a, b = IndexMap.of({"o": [0, 1]}), IndexMap.of({"o": [1, 2], "i": [0, 1]})
    clients = [
        (a, {"w": torch.full((2, 3), 2.0)}, weights[0]),
        (b, {"w": torch.full((2, 2), 5.0)}, weights[1]),
    ]
    new = finish(total(clients, MATRIX), MATRIX, {"w": torch.full((3, 3), 9.0)})
    assert new["w"].tolist() == expected and new["w"].dtype == torch.float32


@given(st.integers(0, 100), st.sampled_from([torch.float32, torch.float64]))
def test_3_returned_slices_change_nothing(seed, dtype):
    generator = np.random.default_rng(seed)
    current = random_tensors(generator, dtype=dtype)
    clients = [
        (kept, SPACE.extract(current, kept), weight)
        for kept, _, weight in random_clients(seed, 12, distinct=5)
    ]
    for rule in ("count", "all"):
        new = finish(total(clients), SPACE, current, rule)
        # In float64 sums, float32 values come back to the bit.
        assert_close(new, current, atol=0 if dtype == torch.float32 else 1e-14)


@given(st.integers(0, 100), st.integers(1, 24), st.integers(1, 24), st.data())
def test_4_any_split_and_merge_gives_the_same(seed, count, distinct, data):
    clients = random_clients(seed, count, distinct=distinct)
    current = random_tensors(np.random.default_rng(seed + 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    bounds = [0, *cuts, count]
    pieces = [total(clients[a:b]) for a, b in itertools.pairwise(bounds)]
    merged = Update()
    for piece in pieces:
        merged = merge(merged, piece, SPACE, reuse=data.draw(st.booleans()))
    whole = total(clients)
    assert_close(finish(merged, SPACE, current), finish(whole, SPACE, current))
    assert_close(finish(merged, SPACE, current), by_definition(clients, SPACE, current))
    assert merged.weight == whole.weight and merged.clients == whole.clients == count
    expected = {
        g: sum(
            np.isin(np.arange(size), kept.kept.get(g, np.arange(size))).astype(int)
            for kept, *_ in clients
        )
        for g, size in SPACE.groups.items()
    }
    for update in (merged, whole):
        counts = coverage_counts(update, SPACE)
        assert all((counts[g] == expected[g]).all() for g in expected)
        assert all(c.dtype == np.int64 for c in counts.values())


def test_7_permuting_units_permutes_the_result():
    clients = random_clients(3, 10)
    current = random_tensors(np.random.default_rng(0))
    order = {g: np.random.default_rng(9).permutation(c) for g, c in SPACE.groups.items()}
    to = {g: np.argsort(o) for g, o in order.items()}  # old unit -> new unit

    def permute(tensors):
        c, f = torch.from_numpy(order["c"]), torch.from_numpy(order["f"])
        block = (c[:, None] * 2 + torch.arange(2)).reshape(-1)
        return {
            "conv.weight": tensors["conv.weight"][c],
            "fc.weight": tensors["fc.weight"][f][:, block],
            "out.bias": tensors["out.bias"],
        }

    moved = []
    for kept, tensors, weight in clients:
        dense = permute(SPACE.scatter(tensors, kept))
        renamed = IndexMap.of({g: np.sort(to[g][i]) for g, i in kept.kept.items()})
        moved.append((renamed, SPACE.extract(dense, renamed), weight))
    a = permute(finish(total(clients), SPACE, current))
    assert_close(a, finish(total(moved), SPACE, permute(current)))


NESTED = [
    (IndexMap.full(), {"b": torch.ones(4)}, 1),
    (IndexMap.prefix({"h": 2}), {"b": torch.full((2,), 3.0)}, 3),
]


def test_nested_widths():
    zero = {"b": torch.zeros(4)}
    assert finish(total(NESTED, BIAS), BIAS, zero)["b"].tolist() == [2.5, 2.5, 1, 1]
    assert finish(total(NESTED[1:], BIAS), BIAS, zero)["b"].tolist() == [3, 3, 0, 0]
    every = finish(total(NESTED, BIAS), BIAS, zero, "all")
    assert every["b"].tolist() == [2.5, 2.5, 0.25, 0.25]
    with pytest.raises(InputError, match="unknown normaliser 'sum'"):
        finish(Update(), BIAS, zero, "sum")


def test_normaliser_all_is_its_formula():
    clients = random_clients(5, 20)
    current = random_tensors(np.random.default_rng(1))
    weight = sum(n for *_, n in clients)
    expected = {n: t.clone() for n, t in current.items()}
    for kept, tensors, n in clients:
        step = {k: t - SPACE.extract(current, kept)[k] for k, t in tensors.items()}
        SPACE.scatter_add_(expected, step, kept, alpha=n / weight)
    assert_close(finish(total(clients), SPACE, current, "all"), expected)


def test_absent_tensors_have_coverage_zero():
    full = IndexMap.full()
    clients = [
        (full, {"conv.weight": torch.ones(4, 2, 2)}, 1),
        (full, {"conv.weight": torch.full((4, 2, 2), 3.0), "out.bias": torch.ones(3)}, 1),
    ]
    current = {n: torch.full(s, 7.0) for n, s in SPACE.shapes.items()}
    new = finish(total(clients), SPACE, current)
    assert (new["conv.weight"] == 2).all() and (new["out.bias"] == 1).all()
    assert new["fc.weight"] is current["fc.weight"]
    assert finish(Update(), SPACE, current) == current


@pytest.mark.parametrize("distinct", [1, 3, 8, 9, 30])
def test_dense_form_starts_beyond_the_limit(distinct):
    generator = np.random.default_rng(0)
    space = UnitSpace({"h": 40}, {"b": (Unit("h"),)}, {"b": (40,)})
    chosen = [IndexMap.of({"h": [i, i + 1]}) for i in range(distinct)]
    clients = [(chosen[i % distinct], {"b": torch.rand(2)}, 1 + i) for i in range(60)]
    update = total(clients, space)
    assert (update.dense is not None) == (distinct > aggregate.DENSE_LIMIT)
    assert bool(update.parts) != (update.dense is not None)
    current = {"b": torch.from_numpy(generator.standard_normal(40))}
    expected = by_definition(
        [(m, {"b": t["b"].double()}, a) for m, t, a in clients], space, current
    )
    assert_close(finish(update, space, current), expected)
    num, den = sums(update, space)
    assert num["b"].dtype == den["b"].dtype == torch.float64


def read_only_copy(update):
    """Through pickle, as Ray does it: buffers out of band and read-only."""
    buffers = []
    data = pickle.dumps(update, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[bytes(b) for b in buffers]), len(data)


@pytest.mark.parametrize("distinct", [2, 20])
@pytest.mark.filterwarnings("error")
def test_unpickled_updates_are_read_only_and_still_add_up(distinct):
    clients = random_clients(8, 40, distinct=distinct)
    current = random_tensors(np.random.default_rng(2))
    a, b = total(clients[:20]), total(clients[20:])
    wanted = finish(merge(a, b, SPACE), SPACE, current)
    for reuse in (False, True):
        (left, size), (right, _) = read_only_copy(a), read_only_copy(b)
        assert size < 4000
        assert_close(finish(merge(left, right, SPACE, reuse=reuse), SPACE, current), wanted, 0)
    left, _ = read_only_copy(a)
    for kept, tensors, weight in clients[20:]:
        accumulate(left, SPACE, kept, tensors, weight)
    one_by_one = total(clients)
    assert_close(finish(left, SPACE, current), finish(one_by_one, SPACE, current), 0)


@pytest.mark.parametrize("distinct", [2, 20])
def test_merge_leaves_its_inputs_alone(distinct):
    clients = random_clients(8, 40, distinct=distinct)
    current = random_tensors(np.random.default_rng(2))
    a, b = total(clients[:20]), total(clients[20:])
    before = [finish(u, SPACE, current) for u in (a, b)]
    both = merge(a, b, SPACE)
    accumulate(both, SPACE, *clients[0])
    for update, old in zip((a, b), before, strict=True):
        assert_close(finish(update, SPACE, current), old, 0)
        assert update.clients == 20
    twice = merge(a, a, SPACE)
    assert_close(finish(twice, SPACE, current), before[0])


def test_float32_clients_are_summed_in_float64():
    # 1 + 2^-30 does not exist in float32; the mean of many small steps must see it.
    update = Update()
    tiny = {"b": torch.full((4,), 2.0**-30)}
    accumulate(update, BIAS, IndexMap.full(), {"b": torch.ones(4)}, 1)
    for _ in range(1000):
        accumulate(update, BIAS, IndexMap.full(), tiny, 1)
    num, den = sums(update, BIAS)
    assert num["b"].tolist() == [1 + 1000 * 2.0**-30] * 4 and den["b"].tolist() == [1001] * 4


def test_any_memory_format_gives_the_same_contiguous_sums():
    space = UnitSpace({"c": 8}, {"w": (Unit("c"), Free(), Free(), Free())}, {"w": (8, 4, 3, 3)})
    w = torch.rand(8, 4, 3, 3)
    a, b = Update(), Update()
    for _ in range(2):
        accumulate(a, space, IndexMap.full(), {"w": w}, 3)
        accumulate(b, space, IndexMap.full(), {"w": w.to(memory_format=torch.channels_last)}, 3)
    (part,) = b.parts.values()
    assert part.total["w"].is_contiguous()
    assert_close(finish(a, space, {"w": w}), finish(b, space, {"w": w}), 0)


def test_zero_weight_covers_nothing():
    update = total([(IndexMap.full(), {"b": torch.ones(4)}, 0)], BIAS)
    assert finish(update, BIAS, {"b": torch.full((4,), 9.0)})["b"].tolist() == [9] * 4
    assert coverage_counts(update, BIAS)["h"].tolist() == [1] * 4


@pytest.mark.parametrize("distinct", [2, 30])
def test_leaves_that_no_map_cuts_are_covered_whole(distinct):
    """A moment that is cut like its weights, and a row that every third client returns."""
    clients, rows = [], []
    for i, (kept, tensors, weight) in enumerate(random_clients(4, 40, distinct=distinct)):
        tensors = tensors | {f"moment/{n}": -t for n, t in tensors.items()}
        if i % 3 == 0:
            tensors["row"] = torch.full((2,), float(i))
            rows.append((weight, i))
        clients.append((kept, tensors, weight))
    start = random_tensors(np.random.default_rng(2))
    current = start | {f"moment/{n}": -t for n, t in start.items()}
    current |= {"row": torch.zeros(2), "nobody": torch.ones(5)}
    first, _ = read_only_copy(total(clients[:20]))
    both = merge(first, total(clients[20:]), SPACE, reuse=True)
    plain = finish(total([(k, {n: t[n] for n in start}, w) for k, t, w in clients]), SPACE, start)
    new = finish(both, SPACE, current)
    assert_close({n: new[n] for n in start}, plain)
    assert_close({n: -new[f"moment/{n}"] for n in start}, plain)
    mean = sum(w * i for w, i in rows) / sum(w for w, _ in rows)
    assert new["row"].tolist() == pytest.approx([mean] * 2)
    assert new["nobody"] is current["nobody"]
    every = finish(both, SPACE, current, "all")["row"]  # those without the row leave it at 0
    assert every.tolist() == pytest.approx([sum(w * i for w, i in rows) / both.weight] * 2)


@pytest.mark.parametrize("kept", [IndexMap.full(), IndexMap.prefix({"h": 2})])
def test_a_free_leaf_has_one_shape(kept):
    a, b = (total([(kept, {"row": torch.ones(n)}, 1)], BIAS) for n in (1, 3))
    with pytest.raises(InputError, match=r"'row' has shape"):
        merge(a, b, BIAS)
    with pytest.raises(InputError, match=r"'row' has shape"):
        accumulate(b, BIAS, kept, {"row": torch.ones(1)})
    with pytest.raises(InputError, match=r"'row' with full shape \(3,\), the server holds \(1,\)"):
        finish(b, BIAS, {"row": torch.zeros(1)})


def test_bad_contributions_are_refused():
    update = Update()
    for kept in (IndexMap.full(), IndexMap.prefix({"h": 2})):
        one = total([(kept, {"b": torch.ones(BIAS.slice_shapes(kept)["b"])}, 1)], BIAS)
        with pytest.raises(InputError, match=r"\['b'\] that the server does not hold"):
            finish(one, BIAS, {})
    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(InputError, match="aggregation weight"):
            accumulate(update, BIAS, IndexMap.full(), {"b": torch.ones(4)}, weight)
    for _ in range(2):  # the first client of a map, and a later one
        with pytest.raises(InputError, match="'b' has shape"):
            accumulate(update, BIAS, IndexMap.full(), {"b": torch.ones(1)})
        accumulate(update, BIAS, IndexMap.full(), {"b": torch.ones(4)})
    assert update.clients == 2
