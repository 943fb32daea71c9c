import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subfleet.core import aggregate, lowrank
from subfleet.core.errors import InputError
from subfleet.core.lowrank import LowRank
from subfleet.core.maps import IndexMap
from subfleet.core.units import Free, Unit, UnitSpace

FULL = IndexMap.full()
SPACE = UnitSpace(
    {"h": 2}, {"w": (Unit("h"), Free(3)), "b": (Unit("h"),)}, {"w": (2, 3), "b": (2,)}
)


def drawn(seed: int, rows: int, base: torch.Tensor, scale: float = 1.0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(
        base,
        scale,
        torch.randn(rows, base.shape[0], generator=draw),
        torch.randn(rows, base.shape[1], generator=draw),
    )


def total(update: aggregate.Update) -> dict[str, torch.Tensor]:
    (part,) = update.parts.values()
    return part.total


def test_a_matrix_by_hand():
    base = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    value = LowRank(base, 0.5, torch.tensor([[1.0, 10.0]]), torch.tensor([[1.0, 0.0, 2.0]]))
    assert value.shape == (2, 3) and value.numel() == 6
    assert value.dense().tolist() == [[1.5, 1.0, 3.5], [12.0, 2.5, 23.0]]
    told = lowrank.dense({"w": value, "b": base[0]})
    assert told["b"].tolist() == [1.0, 2.0, 3.0]
    assert told["w"].tolist() == value.dense().tolist()


def test_two_clients_and_what_both_were_sent_by_hand():
    base = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    one = LowRank(base, 1.0, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]]))
    two = LowRank(base, 0.5, torch.tensor([[0.0, 1.0]]), torch.tensor([[4.0, 0.0, 0.0]]))
    update = aggregate.Update()
    aggregate.accumulate(update, SPACE, FULL, {"w": one}, 1.0)
    aggregate.accumulate(update, SPACE, FULL, {"w": two}, 3.0)
    # (1 + 3 * 0.5) of the base, 1 * 2 at the one's place, 3 * 4 at the other's.
    assert total(update)["w"].tolist() == [[2.5, 0.0, 2.0], [12.0, 2.5, 0.0]]
    assert (update.weight, update.clients) == (4.0, 2)


def test_rows_that_lie_together_are_not_copied():
    whole = torch.arange(12.0).view(6, 2)
    one, two, three = whole.split([2, 1, 3])
    assert lowrank._joined([one, two, three]).data_ptr() == whole.data_ptr()
    assert lowrank._joined([one, two, three]).tolist() == whole.tolist()
    assert lowrank._joined([two, three]).tolist() == whole[2:].tolist()
    assert lowrank._joined([two, one]).tolist() == [[4.0, 5.0], [0.0, 1.0], [2.0, 3.0]]
    assert lowrank._joined([one, three]).shape == (5, 2)
    thin = [part[:, :1] for part in (one, two)]
    assert lowrank._joined(thin).tolist() == [[0.0], [2.0], [4.0]]
    assert lowrank._joined(thin[:1]).tolist() == [[0.0], [2.0]]


@pytest.mark.parametrize("out", [None, 0, 2, 4])
def test_sums_of_neighbours_with_one_client_left_out(out, monkeypatch):
    monkeypatch.setattr(lowrank, "_MANY", 0)
    base = torch.randn(2, 3)
    left, right = torch.randn(5, 4, 2), torch.randn(5, 4, 3)
    if out is not None:
        left[out] = right[out] = float("nan")
    held, written = aggregate.Update(), aggregate.Update()
    for client in range(5):
        if client != out:
            value = LowRank(base, 0.5, left[client], right[client])
            aggregate.accumulate(held, SPACE, FULL, {"w": value}, client + 1.0)
            aggregate.accumulate(written, SPACE, FULL, {"w": value.dense()}, client + 1.0)
    torch.testing.assert_close(total(held)["w"], total(written)["w"], rtol=1e-5, atol=1e-5)


@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 4), st.integers(0, 3)), min_size=1),
    st.integers(0, 9),
)
def test_sums_are_those_of_the_matrices(clients, many):
    """Factors or not, in any order, multiplied out often or once."""
    bases = [torch.randn(2, 3), torch.randn(2, 3)]
    held, written = aggregate.Update(), aggregate.Update()
    before, lowrank._MANY = lowrank._MANY, 5 * many
    try:
        for seed, (factors, rows, weight) in enumerate(clients):
            value = drawn(seed, rows, bases[seed % 2], scale=0.9**seed)
            tensors = {"w": value.dense(), "b": torch.full((2,), float(seed))}
            aggregate.accumulate(written, SPACE, FULL, tensors, weight)
            given = {**tensors, "w": value} if factors else tensors
            aggregate.accumulate(held, SPACE, FULL, given, weight)
    finally:
        lowrank._MANY = before
    assert held.weight == written.weight and held.clients == written.clients
    found, wanted = total(held), total(written)
    assert torch.equal(found["b"], wanted["b"])
    torch.testing.assert_close(found["w"], wanted["w"], rtol=1e-5, atol=1e-5)


def test_what_is_sent_on_or_merged_holds_what_is_owed():
    base = torch.randn(2, 3)
    parts = []
    for seed in range(4):
        update = aggregate.Update()
        aggregate.accumulate(update, SPACE, FULL, {"w": drawn(seed, 2, base)}, 1.0)
        parts.append(update)
    wanted = sum(drawn(seed, 2, base).dense().double() for seed in range(4))
    sent = [pickle.loads(pickle.dumps(part)) for part in parts[:2]]
    halves = aggregate.merge(*sent, SPACE), aggregate.merge(*parts[2:], SPACE)
    merged = aggregate.merge(*halves, SPACE)
    torch.testing.assert_close(total(merged)["w"], wanted, rtol=1e-5, atol=1e-5)
    new = aggregate.finish(merged, SPACE, {"w": base})["w"]
    torch.testing.assert_close(new, (wanted / 4).float(), rtol=1e-5, atol=1e-5)


def test_an_update_of_many_maps_is_dense_and_takes_factors():
    space = UnitSpace({"h": 12}, {"w": (Unit("h"), Free(3))}, {"w": (12, 3)})
    base, held, written = torch.randn(12, 3), aggregate.Update(), aggregate.Update()
    for seed in range(12):
        map = IndexMap.prefix({"h": 1 + seed})
        value = drawn(seed, 2, base[: 1 + seed])
        aggregate.accumulate(held, space, map, {"w": value}, 1.0)
        aggregate.accumulate(written, space, map, {"w": value.dense()}, 1.0)
    assert held.dense is not None
    found = aggregate.finish(held, space, {"w": base})["w"]
    wanted = aggregate.finish(written, space, {"w": base})["w"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_sum_beyond_float32_is_made_in_float64():
    base = torch.zeros(2, 3)
    large = LowRank(base, 1.0, torch.full((1, 2), 1e19), torch.full((1, 3), 3e19))
    update = aggregate.Update()
    for _ in range(3):
        aggregate.accumulate(update, SPACE, FULL, {"w": large}, 1.0)
    wanted = torch.full((2, 3), 9e38, dtype=torch.float64)
    torch.testing.assert_close(total(update)["w"], wanted, rtol=1e-5, atol=0.0)


def test_factors_of_another_shape_are_refused():
    update = aggregate.Update()
    with pytest.raises(InputError, match=r"'w' has shape \(2, 4\)"):
        aggregate.accumulate(update, SPACE, FULL, {"w": drawn(0, 1, torch.zeros(2, 4))}, 1.0)
