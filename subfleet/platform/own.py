"""A client's own network: its part of the server's model, with what it keeps laid over it.

Stated once, so that the network that a run measures is the one that `export --client` writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from subfleet.core.algorithm import Algorithm, Evaluation
from subfleet.core.errors import InputError
from subfleet.core.program import Params
from subfleet.core.scaling import Scaling
from subfleet.core.units import IndexMap
from subfleet.platform import evaluation
from subfleet.platform.bundles import EvalBundle
from subfleet.platform.chunks import Rows
from subfleet.platform.resident import Resident

Source = Literal["none", "own", "server", "calibrated"]
"""Where BatchNorm's running statistics come from; "none" where the network has none."""


def own_tensors(
    algorithm: Algorithm, cut: Params, map: IndexMap, kept: Mapping[str, Any] | None
) -> Params:
    """The tensors of a client's network that are its own; none where they do not fit its map.

    `cut` is the server's model on the map, `kept` the client's kept row, None where it has none.
    """
    row = None if kept is None else {name: torch.as_tensor(leaf) for name, leaf in kept.items()}
    params = algorithm.client_params(cut, row)
    shapes = algorithm.setting.net.space.slice_shapes(map)
    own = {n: v for n, v in params.items() if n in shapes and v is not cut.get(n)}
    fits = all(tuple(tensor.shape) == shapes[name] for name, tensor in own.items())
    return own if fits else {}


def statistics_from(resident: Resident, cut: Params, own: Params, how: Evaluation) -> Source:
    """Where the statistics of a network come from, the server's model being `cut` to it."""
    statistics = resident.fresh.keys()
    if not statistics:
        return "none"
    if statistics <= own.keys():
        return "own"
    if not how.calibrate and statistics <= (cut | own).keys():
        return "server"
    return "calibrated"


def run(
    algorithm: Algorithm,
    resident: Resident,
    bundle: EvalBundle,
    positions: Sequence[int],
    model: Params,
    blocks: Mapping[str, Rows],
    scale: Scaling,
) -> list[tuple[float, float, int]]:
    """Tests the own networks of some clients of a bundle, which have one map.

    Of each: correct answers, summed loss, samples. Raises `InputError` where nothing gives
    one of a network's tensors.
    """
    how, map = algorithm.evaluation, bundle.own[positions[0]].map
    cut = algorithm.setting.net.space.extract(model, map)
    scores = []
    for k in positions:
        own = own_tensors(algorithm, cut, map, bundle.own[k].kept)
        params = cut | own
        calibrates = how.calibrate and statistics_from(resident, cut, own, how) == "calibrated"
        if calibrates:
            params |= resident.fresh
        if missing := sorted(resident.params.keys() - params.keys()):
            raise InputError(
                f"client {bundle.ids[k]}'s own network lacks {missing[0]!r}: neither the server's "
                "model nor client_params gives it; return it from client_params, or let "
                "evaluation say `calibrate` where only BatchNorm's statistics are missing"
            )
        resident.load(params)
        if calibrates:
            evaluation.calibrate(resident, evaluation.rows_of(blocks["train"], k)[0], how, scale)
        rows = evaluation.rows_of(blocks[bundle.part], k)
        scores.append(evaluation.score(resident, resident.params, *rows, scale))
    return scores
