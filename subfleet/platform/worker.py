"""A worker: reads the clients' rows and runs bundles on one device. No Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter

import numpy as np
import pyarrow as pa

from subfleet.core.aggregate import Update
from subfleet.core.program import Params
from subfleet.datasets.federation import Block, Federation
from subfleet.datasets.tables import to_block
from subfleet.platform.bundles import BundleResult, EvalBundle, Merge, TrainBundle, Trial
from subfleet.platform.engine import Engine, Work, parts_needed
from subfleet.platform.merging import merged


class Worker:
    """An engine beside a federation: what a host, or the caller's own process, runs."""

    def __init__(self, work: Work, federation: Federation, device: str):
        self.federation = federation
        self.engine = Engine(work, device)

    def run(
        self,
        bundle: TrainBundle | EvalBundle | Trial,
        shared: Mapping[int, Params],
        tables: Mapping[str, Sequence[pa.Table]] | None = None,
    ) -> BundleResult:
        """Runs one bundle; the same bundle gives the same bits, here or elsewhere.

        `tables` hold the rows of its clients by part; what is not there is read here.
        """
        started = perf_counter()
        algorithm = self.engine.work.algorithm
        if isinstance(bundle, TrainBundle | Trial):
            local_test = isinstance(bundle, TrainBundle) and bundle.local_test
            parts = parts_needed(algorithm.phase(bundle.round).program, local_test)
        else:
            adapts = algorithm.evaluation.adapts
            parts = {bundle.part} | ({"train"} if adapts else set())
        came = tables or {}
        blocks = {part: self._block(bundle.ids, part, came.get(part)) for part in sorted(parts)}
        read = perf_counter() - started
        if isinstance(bundle, TrainBundle):
            result = self.engine.train(bundle, blocks, shared)
        elif isinstance(bundle, Trial):
            result = self.engine.trial(bundle, blocks, shared)
        else:
            result = self.engine.evaluate(bundle, blocks, shared)
        return replace(result, seconds=result.seconds | {"read": read})

    def merge(self, merge: Merge, sums: Sequence[Update]) -> BundleResult:
        """Adds up the sums of neighbours, which come in order."""
        started = perf_counter()
        update = merged(sums, self.engine.work.net.space)
        return BundleResult(merge.number, {}, {"merge": perf_counter() - started}, update)

    def _block(self, ids: np.ndarray, part: str, tables: Sequence[pa.Table] | None) -> Block:
        if tables:
            return to_block(tables, ids, self.federation.input_shape)
        return self.federation.block(ids, part)
