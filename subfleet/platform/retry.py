"""What to do about an error of a host: a pure function, tested without Ray."""

from __future__ import annotations

from enum import Enum

MAX_ATTEMPTS = 5


class Decision(Enum):
    """Run the bundle again on whichever host is free, or give up."""

    RETRY = "retry"
    FAIL = "fail"


def decide(*, host_lost: bool, attempt: int) -> Decision:
    """A lost host is nobody's fault and worth another try; an error of our code is not.

    `attempt` counts the tries of this bundle so far, from 1.

    >>> decide(host_lost=True, attempt=1), decide(host_lost=False, attempt=1)
    (<Decision.RETRY: 'retry'>, <Decision.FAIL: 'fail'>)
    """
    if host_lost and attempt < MAX_ATTEMPTS:
        return Decision.RETRY
    return Decision.FAIL
