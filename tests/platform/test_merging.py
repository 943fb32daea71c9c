"""Merging on hosts: subtrees of the one tree, each merge once its sums are there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toys import cnn

from subfleet.core import aggregate
from subfleet.core.aggregate import Update
from subfleet.core.budget import width_map
from subfleet.platform.bundles import Bundle, EvalBundle, Merge
from subfleet.platform.merging import GROUP, HeldSums, by_group, merged, merges, pays
from subfleet.platform.reduce import ReductionTree


def tree(leaves: list[str]) -> str:
    reduction: ReductionTree[str] = ReductionTree(len(leaves), "({} {})".format)
    for number, leaf in enumerate(leaves):
        reduction.add(number, leaf)
    return reduction.result()


@pytest.mark.parametrize("count", [*range(1, 80), 511, 512, 513, 520, 577])
def test_merges_on_hosts_make_the_same_tree(count: int) -> None:
    made, left = merges(count, round=1)
    sums = {number: str(number) for number in range(count)}
    for merge in made:
        # A sum that is merged is gone: nothing is taken twice.
        sums[merge.number] = tree([sums.pop(number) for number in merge.of])
    assert sorted(sums) == sorted(left)
    assert len(left) <= GROUP
    assert tree([sums[number] for number in left]) == tree([str(n) for n in range(count)])


def test_few_sums_are_left_to_the_coordinator() -> None:
    assert merges(8, round=1) == ([], list(range(8)))
    assert [len(merges(n, round=1)[1]) for n in (8, 9, 64, 65, 512, 513)] == [8, 2, 8, 2, 8, 2]
    assert [len(merges(n, round=1)[0]) for n in (64, 512)] == [8, 72]


def test_small_sums_are_not_worth_a_call() -> None:
    net = cnn()
    assert not pays([net.init(0)])
    assert pays([{"w": torch.zeros(131_072)}, net.init(0)])
    assert not pays([])


def test_sums_that_have_travelled_merge_to_the_same_bits() -> None:
    """Clients of mixed maps, more of them than an update keeps apart; pickled as Ray does."""
    import pickle

    net = cnn()
    draw = torch.Generator().manual_seed(0)
    partial = []
    for number in range(12):
        update = Update()
        map = width_map(net, 0.3 + 0.06 * number)
        params = net.space.extract(net.init(number), map)
        noisy = {n: v + torch.randn(v.shape, generator=draw) for n, v in params.items()}
        aggregate.accumulate(update, net.space, map, noisy, 1.0 + number)
        partial.append(update)

    def travelled(update: Update) -> Update:
        return pickle.loads(pickle.dumps(update))

    made, left = merges(len(partial), round=1)
    sums = dict(enumerate(partial))
    for merge in made:
        sums[merge.number] = merged([travelled(sums[n]) for n in merge.of], net.space)
    there = merged([travelled(sums[n]) for n in left], net.space)
    here = merged([travelled(update) for update in partial], net.space)
    current = net.init(99)
    one, other = (aggregate.finish(total, net.space, current) for total in (here, there))
    assert all(torch.equal(one[name], other[name]) for name in current)
    assert there.clients == 12


def bundles(count: int) -> list[Bundle]:
    none = np.empty(0, np.int64)
    return [EvalBundle(n, 1, none, {}, "test", predicted=float(n % 5)) for n in range(count)]


def test_bundles_of_a_merge_go_out_together() -> None:
    order = [b.number for b in by_group(sorted(bundles(20), key=lambda b: -b.predicted))]
    groups = [number // GROUP for number in order]
    assert sorted(order) == list(range(20))
    assert groups == sorted(groups, key=groups.index), "a group is whole before the next begins"
    assert order[0] % 5 == 4, "within a group still longest first"


def held(count: int) -> tuple[HeldSums[str], list[Bundle], list[Merge]]:
    ordinary, (made, _) = bundles(count), merges(count, round=1)
    return HeldSums([*ordinary, *made]), ordinary, made


def test_a_merge_is_ready_once_with_its_last_sum() -> None:
    sums, ordinary, made = held(17)
    for bundle in reversed(ordinary[1:]):
        sums.hold(bundle, f"ref {bundle.number}")
    assert sums.ready() == [made[1]]
    sums.hold(ordinary[0], "ref 0")
    assert sums.ready() == [made[0]]
    assert sums.ready() == []
    assert sums.of(made[0]) == [f"ref {n}" for n in range(8)]
    assert not sums.stays(ordinary[16]) and sums.stays(ordinary[15])


def test_what_was_merged_is_let_go() -> None:
    sums, ordinary, made = held(12)
    for bundle in ordinary:
        sums.hold(bundle, "ref")
    for merge in sums.ready():
        sums.hold(merge, "ref")
    with pytest.raises(KeyError):
        sums.of(made[0])


def test_lost_sums_are_made_again_down_to_the_bundles() -> None:
    sums, ordinary, _ = held(128)
    for bundle in ordinary:
        sums.hold(bundle, "ref")
    for merge in sums.ready():
        sums.hold(merge, "ref")
    (top, _) = sums.ready()
    assert top.of == tuple(range(128, 136))
    again = sums.lost(top)
    assert [bundle.number for bundle in again] == list(range(64))
    assert sums.ready() == []
    for bundle in again:
        sums.hold(bundle, "ref")
    first = sums.ready()
    assert [merge.number for merge in first] == list(range(128, 136))
    for merge in first:
        sums.hold(merge, "ref")
    assert sums.ready() == [top]
