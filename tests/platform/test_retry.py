import pytest

from subfleet.platform.retry import MAX_ATTEMPTS, Decision, decide


@pytest.mark.parametrize("attempt", range(1, MAX_ATTEMPTS))
def test_a_lost_host_is_worth_another_try(attempt):
    assert decide(host_lost=True, attempt=attempt) is Decision.RETRY


def test_not_for_ever():
    assert decide(host_lost=True, attempt=MAX_ATTEMPTS) is Decision.FAIL
    assert decide(host_lost=True, attempt=MAX_ATTEMPTS + 1) is Decision.FAIL


@pytest.mark.parametrize("attempt", [1, 2, MAX_ATTEMPTS])
def test_an_error_of_our_code_would_only_come_again(attempt):
    assert decide(host_lost=False, attempt=attempt) is Decision.FAIL
