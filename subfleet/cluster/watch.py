"""Looking at a run's processes from outside: when rounds end, processor time, peaks of memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POLL_S = 0.01  # between looks at the metrics; a look is a system call
MEMORY_S = 1.0  # between looks at the memory, which read every process: 25 ms
_TICKS = os.sysconf("SC_CLK_TCK")
_ROLES = {"ray::Coordinator": "coordinator", "ray::ClientHost": "hosts"}


@dataclass(frozen=True)
class RoundEnd:
    """The moment in which a round was written down."""

    at_s: float  # of `time.perf_counter`
    coordinator_cpu_s: float  # processor seconds so far of the process that ran it


class Watch(threading.Thread):
    """Watches this process and all below it while a run writes its `metrics.jsonl`.

    `ends` has an entry for each line; `peaks` the bytes by role: the largest resident
    sets of the coordinator and, added up, of the hosts, the pages in use of the object
    store, and "all": what is every process's own, the store's pages, and once what they
    map of files. Without Ray this process is the coordinator and the hosts, too.
    """

    def __init__(
        self,
        metrics: Path,
        *,
        ray: bool,
        joined: bool = False,
        tell: Callable[[int], None] | None = None,
    ) -> None:
        """`tell` hears, in this thread, of how many rounds are done.

        `joined`: Ray was running before; then all its processes on this machine count.
        """
        super().__init__(daemon=True)
        self._joined = joined
        self.metrics, self.ray, self._tell = metrics, ray, tell
        self.ends: list[RoundEnd] = []
        self.peaks: dict[str, int] = {}
        self._coordinator = None if ray else os.getpid()
        self._hosts: dict[int, int] = {}
        self._over = threading.Event()
        self._size = 0

    def run(self) -> None:
        """Looks until `stop`."""
        looked = 0.0
        while not self._over.wait(POLL_S):
            self._look_at_rounds()
            if (now := time.perf_counter()) - looked > MEMORY_S:
                looked = now
                self._look_at_memory()

    def stop(self) -> None:
        """One last look, and the end of the thread."""
        self._over.set()
        self.join()
        self._look_at_rounds()
        self._look_at_memory()

    def _look_at_rounds(self) -> None:
        try:
            size = self.metrics.stat().st_size
        except OSError:
            return
        if size == self._size:
            return
        self._size = size
        now, cpu = time.perf_counter(), self._coordinator_cpu_s()
        lines = self.metrics.read_bytes().count(b"\n")
        self.ends += [RoundEnd(now, cpu)] * (lines - len(self.ends))
        if self._tell is not None:
            self._tell(lines)

    def _coordinator_cpu_s(self) -> float:
        try:
            stat = Path(f"/proc/{self._coordinator}/stat").read_text()
        except OSError:
            return 0.0
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / _TICKS

    def _look_at_memory(self) -> None:
        own = mapped = store = 0
        seen = {role: 0 for role in _ROLES.values()}
        pids = family(os.getpid())
        for pid in pids | rays() if self._joined else pids:
            try:
                title = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                sizes = sizes_of(Path(f"/proc/{pid}/status").read_text())
            except OSError:
                continue  # it ended while we looked
            own += sizes.get("RssAnon", 0)
            mapped = max(mapped, sizes.get("RssFile", 0))
            role = next((r for start, r in _ROLES.items() if title.startswith(start)), None)
            if role == "coordinator":
                self._coordinator = pid
                seen[role] = sizes.get("VmHWM", 0)
            elif role == "hosts":
                self._hosts[pid] = max(self._hosts.get(pid, 0), sizes.get("VmHWM", 0))
            elif "raylet/raylet" in title:
                store += store_bytes(pid)
            elif pid == os.getpid() and not self.ray:
                seen = dict.fromkeys(seen, sizes.get("VmHWM", 0))
        if self.ray:
            seen["hosts"] = sum(self._hosts.values())
        found = {**seen, "object_store": store, "all": own + mapped + store}
        self.peaks = {role: max(size, self.peaks.get(role, 0)) for role, size in found.items()}


def sizes_of(status: str) -> dict[str, int]:
    r"""Bytes by name out of `/proc/PID/status`.

    >>> sizes_of("Name:\tpython\nVmHWM:\t    2048 kB\nThreads:\t1\n")
    {'VmHWM': 2097152}
    """
    lines = (line.split() for line in status.splitlines())
    return {words[0][:-1]: 1024 * int(words[1]) for words in lines if words[-1:] == ["kB"]}


def store_bytes(raylet: int) -> int:
    """Bytes in use of an object store: files in shared memory that only their owner still has."""
    found = {}
    for link in Path(f"/proc/{raylet}/fd").glob("*"):
        try:
            if "/plasma" in os.readlink(link):
                file = link.stat()
                found[file.st_ino] = 512 * file.st_blocks
        except OSError:
            continue
    return sum(found.values())


def family(root: int) -> set[int]:
    """A process and all below it, by id."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def rays() -> set[int]:
    """The processes of Ray on this machine, by id."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") or b"/raylet/raylet" in title or b"gcs_server" in title:
            found.add(int(folder.name))
    return found


def machine_bytes() -> int:
    """The memory of this machine, or of the container that it is, whichever is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return total
    return min(total, limit)
