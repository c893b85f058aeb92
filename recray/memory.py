"""How much memory the processes of a run hold on this machine, by /proc; elsewhere than on Linux nothing is known.

What counts is what a process holds for itself (RssAnon). Shared pages are left out, as each process that maps them
would count them again: Ray's object store, whose size is a setting of Ray's own, and the files of libraries.
"""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

EVERY_S = 0.5
SIGHTINGS = 2  # after which a process that is not of the run is not asked again: it may have been seen while it began
GIB = 2**30


class Peak(NamedTuple):
    """The most that was seen at one moment."""

    together_gib: float  # all processes
    largest_gib: float  # one process


class RunProcesses:
    """A driver and the Ray workers of its job on this machine, with the processes that these start.

    Args:
        driver: The driver's process, None where it runs elsewhere.
        session: Ray's name of the cluster, None without Ray.
        job: Ray's name of the job.
    """

    def __init__(self, driver: int | None, session: str | None, job: str | None) -> None:
        self._driver, self._session, self._job = driver, session, job
        self._raylets: set[str] = set()
        self._known: dict[int, bool] = {}
        self._seen: dict[int, int] = {}

    def held(self) -> list[int]:
        """Return the bytes that each process holds for itself."""
        present = set(_numbers())
        for forgotten in (self._known, self._seen):
            for pid in forgotten.keys() - present:
                del forgotten[pid]
        return [_anonymous(pid) for pid in present if pid == self._driver or self._is_of_the_run(pid)]

    def _is_of_the_run(self, pid: int) -> bool:
        if self._session is None:
            return False
        if pid not in self._known:
            found = self._belongs(pid)
            self._seen[pid] = self._seen.get(pid, 0) + 1
            if found or self._seen[pid] >= SIGHTINGS:
                self._known[pid] = found
            return found
        return self._known[pid]

    def _belongs(self, pid: int) -> bool:
        """Return whether Ray started a process for this job: its workers are told so by their environment."""
        try:
            program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            if program.endswith("/raylet") and any(str(self._session) in each for each in arguments):
                self._raylets.add(str(pid))
                return False
            entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # gone, or another user's
            return False
        own = dict(entry.partition("=")[::2] for entry in entries)
        return own.get("RAY_JOB_ID") == self._job and own.get("RAY_RAYLET_PID") in self._raylets


class MemoryWatch:
    """Looks at a run's processes every now and then, in a thread, until it is stopped.

    Args:
        processes: Of the run, on this machine.
        every_s: Between two looks; what comes and goes in between is not seen.
        told: Called after every look, in that thread, with the most that was seen so far.
    """

    def __init__(
        self, processes: RunProcesses, *, every_s: float = EVERY_S, told: Callable[[Peak], None] | None = None
    ) -> None:
        self._processes, self._every_s, self._told = processes, every_s, told
        self._together = self._largest = 0
        self._ended = threading.Event()
        self._look()  # at once: what is watched may be over before a thread has begun
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)
        self._thread.start()

    def peak(self) -> Peak:
        """Return the most that was seen so far; zeros where nothing can be seen."""
        return Peak(self._together / GIB, self._largest / GIB)

    def stop(self) -> None:
        """Look once more, and end."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(self._every_s)
            self._look()

    def _look(self) -> None:
        held = self._processes.held()
        self._together = max(self._together, sum(held))
        self._largest = max(self._largest, 0, *held)
        if self._told is not None:
            self._told(self.peak())


def _numbers() -> Iterator[int]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    yield from (int(name) for name in names if name.isdigit())


def _anonymous(pid: int) -> int:
    """Return bytes; 0 for a process that is gone."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as lines:
            return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)
    except (OSError, ValueError):
        return 0
