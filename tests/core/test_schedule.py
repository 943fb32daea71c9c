import math

import pytest

from subfleet.core.errors import InputError
from subfleet.core.program import LocalRule
from subfleet.core.schedule import Schedule


def factors(schedule, rounds):
    return [schedule.factor(round) for round in range(1, rounds + 1)]


def test_a_constant_rate_only_warms_up():
    assert factors(Schedule(), 3) == [1, 1, 1]
    assert factors(Schedule(warmup=3), 5) == [0.25, 0.5, 0.75, 1, 1]


def test_steps_come_after_their_milestones():
    schedule = Schedule("step", milestones=(2, 4), decay=0.1)
    assert factors(schedule, 6) == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    late = Schedule("step", warmup=3, milestones=(2, 4), decay=0.5)
    assert factors(late, 5) == pytest.approx([1 / 4, 2 / 4, 3 / 4, 0.5, 0.25])


def test_an_exponential_falls_each_round_after_the_warm_up():
    assert factors(Schedule("exponential", decay=0.5), 4) == [1, 0.5, 0.25, 0.125]
    assert factors(Schedule("exponential", warmup=1, decay=0.5), 4) == [0.5, 1, 0.5, 0.25]


def test_a_cosine_begins_at_the_whole_rate_and_ends_above_nothing():
    # cos 0, cos 45, cos 90, cos 135 degrees
    half = math.sqrt(0.5)
    expected = [1, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert factors(Schedule("cosine", rounds=4), 4) == pytest.approx(expected)
    warm = Schedule("cosine", rounds=6, warmup=2)
    assert factors(warm, 6) == pytest.approx([1 / 3, 2 / 3, *expected])
    assert warm.factor(9) == pytest.approx(0)


def test_a_warm_up_must_leave_rounds_to_a_cosine():
    with pytest.raises(InputError, match=r"train.warmup = 4 leaves no round of run.rounds = 4"):
        Schedule("cosine", rounds=4, warmup=4)


def test_a_rule_has_the_rate_of_its_round():
    rule = LocalRule(lr=0.2, momentum=0.9, schedule=Schedule("exponential", decay=0.5))
    assert rule.at(3) == LocalRule(lr=0.05, momentum=0.9)
    assert LocalRule(lr=0.2).at(3) == LocalRule(lr=0.2)
