"""Executors: where bundles run. In the caller's process, or on Ray hosts."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Protocol

import numpy as np
import torch

from subfleet.core.algorithm import Params
from subfleet.core.errors import InputError, RunFailed
from subfleet.datasets.federation import Federation
from subfleet.platform.bundles import Bundle, BundleResult
from subfleet.platform.engine import Work
from subfleet.platform.retry import Decision, decide
from subfleet.platform.worker import Worker

IN_FLIGHT = 2  # bundles a host has at hand: one runs while the next one waits at its door

# What Ray hands out is read-only, and nothing here writes into a shared tree.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class Executor(Protocol):
    """Runs bundles and yields their results as they come, in any order."""

    retries: int  # bundles that had to be run again, so far

    @property
    def device(self) -> str:
        """Where clients train: "cpu" or "cuda"."""
        ...

    def run(
        self, bundles: Sequence[Bundle], shared: Mapping[int, Params]
    ) -> Iterator[BundleResult]:
        """Every bundle's result, once."""
        ...

    def close(self) -> None:
        """Lets the hosts go."""
        ...


def longest_first(bundles: Sequence[Bundle]) -> list[Bundle]:
    """The order of dispatch: longest predicted first, ties by number."""
    return sorted(bundles, key=lambda bundle: (-bundle.predicted, bundle.number))


class InlineExecutor:
    """Bundles in the caller's own process, by one worker or by several threads."""

    def __init__(self, work: Work, federation: Federation, device: str = "cpu", workers: int = 1):
        self.device = device
        self.retries = 0
        self._workers = [Worker(work, federation, device) for _ in range(workers)]
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None

    def run(
        self, bundles: Sequence[Bundle], shared: Mapping[int, Params]
    ) -> Iterator[BundleResult]:
        """Every bundle's result; by one worker in dispatch order, else as they end."""
        order = longest_first(bundles)
        if self._pool is None:
            yield from (self._workers[0].run(bundle, shared) for bundle in order)
            return
        # A worker's buffers serve one bundle at a time: each thread takes one, then gives it back.
        free = deque(self._workers)

        def one(bundle: Bundle) -> BundleResult:
            worker = free.pop()
            try:
                return worker.run(bundle, shared)
            finally:
                free.append(worker)

        for done in as_completed([self._pool.submit(one, bundle) for bundle in order]):
            yield done.result()

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class RayExecutor:
    """Bundles on `ClientHost` actors: longest first, to whichever host is free."""

    def __init__(self, hosts: Sequence[Any], device: str = "cpu"):
        self.device = device
        self.retries = 0
        self._hosts = list(hosts)
        self._puts: list[tuple[Params, Any]] = []  # trees put last, so that none is put twice

    def run(
        self, bundles: Sequence[Bundle], shared: Mapping[int, Params]
    ) -> Iterator[BundleResult]:
        """Every bundle's result as it ends; a lost host's bundles run elsewhere."""
        import ray
        from ray.exceptions import RayError

        versions = list(shared)
        refs = self._put([shared[version] for version in versions])
        waiting = deque(longest_first(bundles))
        attempts = {bundle.number: 0 for bundle in bundles}
        flying: dict[Any, tuple[Bundle, int]] = {}
        load = [0] * len(self._hosts)
        while waiting or flying:
            while waiting and min(load) < IN_FLIGHT:
                host = load.index(min(load))
                bundle = waiting.popleft()
                attempts[bundle.number] += 1
                flying[self._hosts[host].run.remote(bundle, versions, *refs)] = (bundle, host)
                load[host] += 1
            done, _ = ray.wait(list(flying), num_returns=1)
            for ref in done:
                bundle, host = flying.pop(ref)
                load[host] -= 1
                try:
                    yield ray.get(ref)
                except RayError as error:
                    self._again(bundle, error, attempts[bundle.number], waiting)

    def _again(self, bundle: Bundle, error: Exception, attempt: int, waiting: deque) -> None:
        from ray.exceptions import ObjectLostError, RayActorError

        lost = isinstance(error, RayActorError | ObjectLostError)
        if decide(host_lost=lost, attempt=attempt) is Decision.RETRY:
            self.retries += 1
            waiting.appendleft(bundle)
            return
        cause = getattr(error, "cause", None)
        if isinstance(cause, InputError | RunFailed):
            raise cause
        raise RunFailed(
            f"round {bundle.round}: bundle {bundle.number} failed on a host after {attempt} "
            f"tries: {str(error).strip().splitlines()[-1]}; run with --local --debug to see where"
        ) from error

    def _put(self, trees: list[Params]) -> list[Any]:
        """References of the trees in the object store; the same tree is put once."""
        import ray

        held = self._puts
        refs = []
        for tree in trees:
            ref = next((ref for known, ref in held if known is tree), None)
            refs.append(ray.put(as_arrays(tree)) if ref is None else ref)
        self._puts = list(zip(trees, refs, strict=True))
        return refs

    def close(self) -> None:
        """Forgets the trees; the hosts belong to whoever started them."""
        self._puts = []


def as_arrays(tree: Params) -> dict[str, np.ndarray]:
    """A tree as NumPy arrays, which Ray hands out without copying."""
    return {name: value.detach().cpu().numpy() for name, value in tree.items()}


def as_tensors(tree: Mapping[str, np.ndarray]) -> Params:
    """The tree again, sharing memory with the object store: read it, never write it."""
    return {name: torch.from_numpy(value) for name, value in tree.items()}
