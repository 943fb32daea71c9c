"""The rate of ADDS's keep ratios on small samples, fitted to what the penalty alone would do.

The penalty 2 lambda alpha of every step leaves (1 - 2 eta lambda)^steps of alpha = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from subfleet.algorithms.adds import ADDS
from subfleet.config import Experiment
from subfleet.core.program import Stream
from subfleet.core.skew import njsd
from subfleet.datasets.federation import Federation, split_of
from subfleet.registry import build_data

KEPT = 0.4  # what the penalty alone would leave of alpha after a client's steps
PAPER_ROUNDS = 200


def fitted(base: Experiment, *, each: bool) -> tuple[Experiment, float, str]:
    """The cohort and ADDS's rate as these data want them, and in words how that came.

    With `each` the mean over clients of what is left is KEPT, else what is left at the mean
    number of steps and the mean lambda: the two differ where clients' steps do.
    """
    data = build_data(base.data, seed=base.run.seed)
    ids, held = split_of(data, base.run.seed)
    base = base.with_values({"run.cohort": max(1, round(0.3 * len(ids)))})
    sizes, train = data.sizes(ids, "train"), base.train
    # A client's own part of 10 % chooses the architecture, the rest trains.
    own = Stream(skip=ADDS.validation, take=1 - ADDS.validation)
    own = replace(own, batch=train.batch_size, epochs=train.epochs or 1)
    steps = np.array([own.num_steps(size) for size in sizes.tolist()])
    lambdas = njsd(data.label_counts(ids)) + 0.5
    exact = rate_of_each(lambdas, steps) if each else rate_of_mean(lambdas, steps)
    rate = float(f"{exact:.2g}")
    alone = np.array([Stream(take=ADDS.validation).rows(size) for size in sizes.tolist()]) == 1
    parts = [
        _settings(base, data, len(ids), len(held), float(sizes.mean())),
        _rate_text(rate, lambdas, steps, each),
        f"{alone.sum()} of the {len(ids)} clients validate on one row.",
        f"ε falls by {ADDS.epsilon_decay} a round, as in the paper, and ends at "
        f"{_last_epsilon(base.run.rounds)} after these {base.run.rounds} rounds, where the "
        f"paper's {PAPER_ROUNDS} end at {_last_epsilon(PAPER_ROUNDS)}: units are drawn more at "
        "random to the end.",
    ]
    return base, rate, " ".join(parts)


def left(rate: float, lambdas: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """What the penalty alone leaves of each client's alpha, [clients]."""
    return (1 - 2 * rate * lambdas) ** steps


def rate_of_mean(lambdas: np.ndarray, steps: np.ndarray) -> float:
    """The rate that leaves KEPT at the mean number of steps and the mean lambda.

    >>> round(rate_of_mean(np.array([0.5, 1.5]), np.array([1, 3])), 4)
    0.1838
    """
    return float((1 - KEPT ** (1 / steps.mean())) / (2 * lambdas.mean()))


def rate_of_each(lambdas: np.ndarray, steps: np.ndarray) -> float:
    """The rate at which the mean of `left` over clients is KEPT, by bisection.

    At most 1 / (2 max lambda), above which a step would turn somebody's alpha negative.

    >>> lambdas, steps = np.array([0.5, 1.0]), np.array([2, 20])
    >>> round(float(left(rate_of_each(lambdas, steps), lambdas, steps).mean()), 6)
    0.4
    """
    low, high = 0.0, float(1 / (2 * lambdas.max()))
    for _ in range(60):
        middle = (low + high) / 2
        enough = left(middle, lambdas, steps).mean() > KEPT
        low, high = (middle, high) if enough else (low, middle)
    return (low + high) / 2


def _settings(base: Experiment, data: Federation, training: int, held: int, samples: float) -> str:
    train = base.train
    return (
        f"{data.num_clients} clients, of which {training} train ({base.run.cohort} a round) and "
        f"{held} are held out; {samples:.0f} training samples a client; {base.run.rounds} rounds, "
        f"local epochs {train.epochs}, batch {train.batch_size}, SGD {train.lr} with momentum "
        f"{train.momentum}; the model is `{base.model.name}`, {_options(base.model.options)}."
    )


def _rate_text(rate: float, lambdas: np.ndarray, steps: np.ndarray, each: bool) -> str:
    """How the rate was fitted, and how far clients are from it."""
    after = left(rate, lambdas, steps)
    if each:
        how = (
            f"the mean over clients of what the penalty alone would leave of α, "
            f"(1 − 2 η_A λ)^steps, is {KEPT}"
        )
    else:
        how = (
            f"the penalty alone would leave {KEPT} of α, (1 − 2 η_A λ)^steps = {KEPT}, at the "
            f"mean of {steps.mean():.1f} local steps and the mean λ of {lambdas.mean():.2f}"
        )
    low, high = np.quantile(after, [0.1, 0.9])
    return (
        f"ADDS's η_A is {rate}, so that {how}. Clients take {steps.min()} to {steps.max()} local "
        f"steps, which would leave {after.min():.2f} to {after.max():.2f} (mean "
        f"{after.mean():.2f}; eight of ten clients {low:.2f} to {high:.2f}; α itself stops at "
        f"{ADDS.least_ratio})."
    )


def _last_epsilon(rounds: int) -> str:
    return f"{ADDS.epsilon * ADDS.epsilon_decay**rounds:.3g}"


def _options(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items()) or "as it is"
