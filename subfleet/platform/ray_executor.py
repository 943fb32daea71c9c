"""Bundles on Ray hosts: two at hand for each, and again elsewhere when one is lost."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from textwrap import shorten
from time import monotonic, sleep
from typing import Any, Protocol

import numpy as np
import torch

from subfleet.core.errors import InputError, RunFailed
from subfleet.core.program import Params
from subfleet.datasets.stream import CohortStream
from subfleet.datasets.tables import Upcoming
from subfleet.platform.bundles import Bundle, BundleResult, Merge, TrainBundle
from subfleet.platform.executor import longest_first
from subfleet.platform.merging import HeldSums, by_group
from subfleet.platform.retry import Decision, decide

IN_FLIGHT = 2  # bundles a host has at hand: one runs while the next one waits at its door
ASK_AGAIN_S = 0.5  # between two questions to a host that does not answer
PATIENCE_S = 120.0  # after which a run without a single host that answers has failed
LOOK_S = 2.0  # between two looks at the cluster's nodes

# What Ray hands out is read-only, and nothing here writes into a shared tree.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


class _Host:
    """A host as the executor sees it: what it has at hand, and whether it answers."""

    def __init__(self, actor: Any, joined: bool = False):
        self.actor = actor
        self.joined = joined  # while the run goes on
        self.load = 0
        # Until it answers a question it is taken for down: at the start, and after a loss.
        self.up = False
        self.question: Any = None
        self.ask_at = 0.0
        self.losses = 0

    def lost(self) -> None:
        """Its process is gone; Ray starts another one, which takes seconds."""
        self.losses += 1
        if self.up:
            self.up = False
            self.ask_at = monotonic() + ASK_AGAIN_S

    def ask(self) -> None:
        """Asks whether it is up, unless it has been asked or it is too early."""
        if not self.up and self.question is None and monotonic() >= self.ask_at:
            self.question = self.actor.pid.remote()

    def answered(self, up: bool) -> None:
        """Takes the answer; one that is not up is asked again after a while."""
        self.question = None
        self.up = up
        if not up:
            self.ask_at = monotonic() + ASK_AGAIN_S


class HostActors(Protocol):
    """The `ClientHost` actors of a run; they may come and go with the nodes of a cluster."""

    device: str
    actors: list[Any]

    def look(self) -> tuple[list[Any], list[Any]]:
        """Looks again: actors that were started since, and those lost for good."""
        ...


class RayExecutor:
    """Bundles on `ClientHost` actors: longest first, to whichever host is free.

    A host gets bundles only while it answers. Calls to one whose process died
    fail, at once or after seconds, for as long as Ray restarts it; so the
    bundles it had go to others, and it is asked from time to time, with a call
    that costs nothing, whether it is up again. Hosts of nodes that join get
    bundles as soon as they are up.
    """

    def __init__(
        self,
        hosts: HostActors,
        patience_s: float = PATIENCE_S,
        stream: CohortStream | None = None,
        tell: Callable[[int, int], None] = lambda alive, in_flight: None,
    ):
        """`tell` hears how many hosts answer, and how many bundles they have at hand."""
        self.device = hosts.device
        self._tell = tell
        self.retries = 0
        self.notes: list[str] = []
        self.merges = True
        self._actors = hosts
        self._hosts = [_Host(actor) for actor in hosts.actors]
        self._look_at = monotonic() + LOOK_S
        self._last_up = monotonic()  # when a host was up, as far as is known
        self._patience_s = patience_s
        self._stream = stream
        self._puts: list[tuple[Params, Any]] = []  # trees put last, so that none is put twice
        self._stopping = False
        self._strays: dict[Any, _Host] = {}  # calls whose results nobody waits for any more

    def expect(self, upcoming: Callable[[int], Upcoming], first: int, last: int) -> None:
        """Starts the stream of rows, where there is one.

        Hosts read the first round for themselves, before Ray Data has started its processes.
        """
        if self._stream is not None and first < last:
            self._stream.begin(upcoming, first + 1, last)

    def run(
        self, bundles: Sequence[Bundle], shared: Mapping[int, Params]
    ) -> Iterator[BundleResult]:
        """Every bundle's result as it ends; a lost host's bundles run elsewhere.

        What a merge takes has no sum in its result: it stays where it was made.
        """
        import ray
        from ray.exceptions import ObjectLostError, RayError

        versions = list(shared)
        refs = self._put([shared[version] for version in versions])
        sums: HeldSums[Any] = HeldSums(bundles)
        at_once = [bundle for bundle in bundles if not isinstance(bundle, Merge)]
        ordered = longest_first(at_once)
        waiting = deque(ordered if len(at_once) == len(bundles) else by_group(ordered))
        told: set[int] = set()
        attempts = {bundle.number: 0 for bundle in bundles}
        flying: dict[Any, tuple[Bundle, _Host, Any]] = {}  # the last: where its sum will be
        self._last_up = monotonic()  # patience counts from now, not from the last call
        try:
            while waiting or flying:
                while waiting and (host := self._free()) is not None:
                    bundle = waiting.popleft()
                    attempts[bundle.number] += 1
                    given = self._given(bundle, attempts[bundle.number], versions, refs, sums)
                    if sums.stays(bundle):
                        call, there = host.actor.run_apart.remote(bundle, *given)
                    else:
                        call, there = host.actor.run.remote(bundle, *given), None
                    flying[call] = (bundle, host, there)
                    host.load += 1
                for ref in self._ended(flying):
                    bundle, host, there = flying.pop(ref)
                    host.load -= 1
                    try:
                        result: Any = ray.get(ref)
                    except RayError as error:
                        self._again(bundle, host, error, attempts[bundle.number])
                        if isinstance(bundle, Merge) and isinstance(error, ObjectLostError):
                            waiting.extendleft(sums.lost(bundle))
                        else:
                            waiting.appendleft(bundle)
                    else:
                        sums.hold(bundle, there)
                        waiting.extendleft(sums.ready())
                        if bundle.number not in told:
                            told.add(bundle.number)
                            yield result
        finally:
            # Left early: hosts are still at these.
            self._strays |= {ref: host for ref, (_, host, _) in flying.items()}
            self._tell_hosts()

    def _given(
        self,
        bundle: Bundle,
        attempt: int,
        versions: list[int],
        refs: list[Any],
        sums: HeldSums[Any],
    ) -> tuple[Any, ...]:
        """What a host gets with a bundle: the shared trees and its rows, or the sums to merge."""
        if isinstance(bundle, Merge):
            return [], [], *sums.of(bundle)
        parts, tables = self._rows_of(bundle, attempt)
        return versions, parts, *refs, *tables

    def _rows_of(self, bundle: Bundle, attempt: int) -> tuple[list[str], list[Any]]:
        """The streamed rows of a bundle: tables and the part of each.

        A second attempt reads for itself: what was streamed may be lost with a node.
        """
        if self._stream is None or attempt > 1 or not isinstance(bundle, TrainBundle):
            return [], []
        found = [
            (part, table)
            for part in self._stream.parts(bundle.round)
            for table in self._stream.blocks(bundle.round, bundle.ids, part)
        ]
        return [part for part, _ in found], [table for _, table in found]

    def _free(self) -> _Host | None:
        """The host that answers and has least at hand, if it can take one more bundle.

        Of equal ones that with the fewest losses: its device may be the one that is broken.
        """
        up = [host for host in self._hosts if host.up]
        host = min(up, key=lambda host: (host.load, host.losses), default=None)
        return host if host is not None and host.load < IN_FLIGHT else None

    def _ended(self, flying: Mapping[Any, Any]) -> list[Any]:
        """Waits; the calls that have ended. Meanwhile nodes and silent hosts are looked after."""
        import ray

        if self._stopping:
            raise KeyboardInterrupt
        self._tell_hosts()
        self._look()
        for host in self._hosts:
            host.ask()
        asked = {host.question: host for host in self._hosts if host.question is not None}
        silent = not all(host.up for host in self._hosts)
        calls = [*flying, *self._strays, *asked]
        if not calls:
            sleep(ASK_AGAIN_S)
            self._check_patience()
            return []
        done, _ = ray.wait(calls, num_returns=1, timeout=ASK_AGAIN_S if silent else LOOK_S)
        for ref in done:
            if ref in asked:
                self._answered(asked[ref], ref)
            if (host := self._strays.pop(ref, None)) is not None:
                host.load -= 1
        self._check_patience()
        return [ref for ref in done if ref in flying]

    def _tell_hosts(self) -> None:
        self._tell(sum(host.up for host in self._hosts), sum(host.load for host in self._hosts))

    def _look(self) -> None:
        """Takes in the hosts of nodes that joined; forgets those of nodes that are lost.

        Calls to a lost one end with an error of their own.
        """
        if monotonic() < self._look_at:
            return
        joined, lost = self._actors.look()
        self._look_at = monotonic() + LOOK_S
        self._hosts = [host for host in self._hosts if host.actor not in lost]
        self._hosts += [_Host(actor, joined=True) for actor in joined]
        if lost:
            self.notes.append(f"{len(lost)} hosts were lost with their node")
        if joined:
            self.notes.append(f"{len(joined)} hosts were started on a node that joined")

    def _answered(self, host: _Host, question: Any) -> None:
        """Takes a host's answer. One that joined and cannot work is left out, with a warning."""
        try:
            host.answered(_is_up(question))
        except (InputError, RunFailed) as error:
            if not host.joined:
                raise
            self.notes.append(f"a host on a node that joined is left out: {error}")
            self._hosts.remove(host)

    def _check_patience(self) -> None:
        """RunFailed when no host has answered for too long."""
        if any(host.up for host in self._hosts):
            self._last_up = monotonic()
        if monotonic() - self._last_up < self._patience_s:
            return
        raise RunFailed(
            f"none of the {len(self._hosts)} hosts has answered for {self._patience_s:g} s: their "
            "processes die, or the cluster has no free cores or memory for them; look at "
            "`ray status`, lower run.hosts, or use --local. After a finished round --resume goes "
            "on from the last checkpoint"
        )

    def _again(self, bundle: Bundle, host: _Host, error: Exception, attempt: int) -> None:
        """Counts one more try of the bundle, or raises what ends the run."""
        import ray
        from ray.exceptions import ObjectLostError

        lost = _is_loss(error)
        if broken := isinstance(getattr(error, "cause", None), torch.AcceleratorError):
            # What a broken device holds is lost with its process; Ray starts another one.
            ray.kill(host.actor, no_restart=False)
        if decide(host_lost=lost or broken, attempt=attempt) is Decision.RETRY:
            self.retries += 1
            if not isinstance(error, ObjectLostError):  # which lay elsewhere
                host.lost()
            return
        _raise_own(error)
        what = f"round {bundle.round}: bundle {bundle.number} "
        if broken:
            raise RunFailed(
                f"{what}failed with its device {attempt} times: {brief(error)}; look after the "
                "device, or set run.device. After a finished round --resume goes on from the last "
                "checkpoint"
            ) from error
        if lost:
            raise RunFailed(
                f"{what}was lost with its host {attempt} times; if memory runs out, lower "
                "run.hosts or run.bundle_clients. After a finished round --resume goes on from "
                f"the last checkpoint ({brief(error)})"
            ) from error
        raise RunFailed(
            f"{what}failed on a host: {brief(error)}; run with --local --debug to see where"
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

    def stop(self) -> None:
        """Ends, from another thread, what `run` waits for, as Ctrl-C would."""
        self._stopping = True

    def close(self) -> None:
        """Forgets the trees and the rows; the hosts belong to whoever started them."""
        self._puts, self._strays = [], {}
        if self._stream is not None:
            self._stream.close()


def _is_loss(error: Exception) -> bool:
    """Whether a process, a node or an object is gone, which is not our code's doing."""
    from ray import exceptions

    gone = (
        exceptions.RayActorError,
        exceptions.ActorUnschedulableError,  # its node is lost
        exceptions.ObjectLostError,
        exceptions.NodeDiedError,
        exceptions.OutOfMemoryError,
        exceptions.WorkerCrashedError,
    )
    return isinstance(error, gone)


def _is_up(question: Any) -> bool:
    """The answer of a host that was asked; raises when it can never start."""
    import ray
    from ray.exceptions import RayActorError, RayError

    try:
        ray.get(question)
    except RayError as error:
        if isinstance(error, RayActorError) and error.actor_init_failed:
            raise RunFailed(f"a host cannot start: {brief(error)}") from error
        _raise_own(error)
        if not _is_loss(error):
            raise RunFailed(f"a host cannot be used: {brief(error)}") from error
        return False
    return True


def _raise_own(error: Exception) -> None:
    """Raises the error of ours that a host raised, if that is what it is."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, InputError | RunFailed):
        raise cause


def brief(error: BaseException) -> str:
    r"""An error of Ray in one line: what was raised there, without where.

    >>> brief(ValueError("Traceback\n  File x\nKeyError: 'fc'"))
    "KeyError: 'fc'"
    """
    cause = getattr(error, "cause", None)
    if cause is not None:
        return f"{type(cause).__name__}: {cause}"
    lines = [line for line in str(error).splitlines() if line.strip(" .")]
    return shorten(lines[-1], 200, placeholder=" …") if lines else type(error).__name__


def as_arrays(tree: Params) -> dict[str, np.ndarray]:
    """A tree as NumPy arrays, which Ray hands out without copying."""
    return {name: value.detach().cpu().numpy() for name, value in tree.items()}


def as_tensors(tree: Mapping[str, np.ndarray]) -> Params:
    """The tree again, sharing memory with the object store: read it, never write it."""
    return {name: torch.from_numpy(value) for name, value in tree.items()}
