"""A worker: reads the clients' rows and runs bundles on one device. No Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from time import perf_counter

from subfleet.core.program import Params
from subfleet.datasets.federation import Federation
from subfleet.platform.bundles import Bundle, BundleResult, TrainBundle
from subfleet.platform.engine import Engine, Work, parts_needed


class Worker:
    """An engine beside a federation: what a host, or the caller's own process, runs."""

    def __init__(self, work: Work, federation: Federation, device: str):
        self.federation = federation
        self.engine = Engine(work, device)

    def run(self, bundle: Bundle, shared: Mapping[int, Params]) -> BundleResult:
        """Runs one bundle; the same bundle gives the same bits, here or elsewhere."""
        started = perf_counter()
        algorithm = self.engine.work.algorithm
        if isinstance(bundle, TrainBundle):
            parts = parts_needed(algorithm.phase(bundle.round).program, bundle.local_test)
        else:
            adapts = algorithm.evaluation.adapts
            parts = {bundle.part} | ({"train"} if adapts else set())
        blocks = {part: self.federation.block(bundle.ids, part) for part in sorted(parts)}
        read = perf_counter() - started
        if isinstance(bundle, TrainBundle):
            result = self.engine.train(bundle, blocks, shared)
        else:
            result = self.engine.evaluate(bundle, blocks, shared)
        return replace(result, seconds=result.seconds | {"read": read})
