"""What processes hold is added up for those of the run alone."""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from recray.memory import GIB, MemoryWatch, Peak, RunProcesses

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")

MIB = 2**20
# Holds so many MiB of its own, says so, and waits.
HOLD = "import sys; kept = bytearray(int(sys.argv[1]) << 20); print('held', flush=True); sys.stdin.readline()"
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process that holds memory, with an environment of its own; all end with the test."""
    started = []

    def run(mib: int, *further: str, program: str = sys.executable, **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [program, "-S", "-c", HOLD, str(mib), *further],
            executable=sys.executable,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_workers_of_the_job_are_found_and_others_are_not(start: Start) -> None:
    raylet = start(1, "--session-name=session_mine", program="/somewhere/raylet")
    other = start(1, "--session-name=session_other", program="/somewhere/raylet")
    environment = {"RAY_JOB_ID": "01", "RAY_RAYLET_PID": str(raylet.pid)}
    start(40, **environment)
    start(60, **environment)
    start(30, **{**environment, "RAY_JOB_ID": "02"})
    start(30, **{**environment, "RAY_RAYLET_PID": str(other.pid)})  # jobs of two clusters have the same names
    processes = RunProcesses(None, "session_mine", "01")
    for _ in range(3):
        held = sorted(each / MIB for each in processes.held())
    assert [int(each // 20) for each in held] == [2, 3]  # 40 and 60, and what Python takes itself
    assert RunProcesses(None, None, None).held() == []


def test_a_process_that_was_seen_before_it_was_itself_is_asked_again() -> None:
    asked: list[int] = []

    class Late(RunProcesses):
        def _belongs(self, pid: int) -> bool:
            asked.append(pid)
            return pid == os.getpid() and asked.count(pid) > 1

    processes = Late(None, "session", "01")
    assert processes.held() == []
    assert len(processes.held()) == 1
    assert len(processes.held()) == 1
    assert asked.count(os.getpid()) == 2  # then it is known


def test_the_driver_counts_once_with_what_it_holds_alone() -> None:
    (before,) = RunProcesses(os.getpid(), None, None).held()
    # Of its own, not from a heap that may have as much to spare.
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as private:
        for start in range(0, 64 * MIB, mmap.PAGESIZE):
            private[start] = 1
        (after,) = RunProcesses(os.getpid(), None, None).held()
    assert 60 * MIB < after - before < 80 * MIB


def test_shared_pages_do_not_count() -> None:
    """As those of Ray's object store, which every worker that reads them has."""
    (before,) = RunProcesses(os.getpid(), None, None).held()
    with mmap.mmap(-1, 64 * MIB) as shared:
        for start in range(0, 64 * MIB, mmap.PAGESIZE):
            shared[start] = 1
        (after,) = RunProcesses(os.getpid(), None, None).held()
    assert after - before < 20 * MIB


class Counted(RunProcesses):
    """Tells what it is told to."""

    def __init__(self, *looks: list[int]) -> None:
        super().__init__(None, None, None)
        self.looks = list(looks)

    def held(self) -> list[int]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def test_the_peak_is_that_of_one_moment() -> None:
    told: list[Peak] = []
    watch = MemoryWatch(Counted([GIB, 3 * GIB], [5 * GIB], [], [2 * GIB] * 3, []), every_s=0.001, told=told.append)
    while len(told) < 6:
        time.sleep(0.001)
    watch.stop()
    assert watch.peak() == Peak(6.0, 5.0)
    assert told[0] == Peak(4.0, 3.0)


def test_a_short_stage_is_looked_at_as_well() -> None:
    watch = MemoryWatch(Counted([GIB], [2 * GIB]), every_s=1e6)
    watch.stop()
    assert watch.peak().together_gib == 2.0
    nothing = MemoryWatch(Counted([]))
    nothing.stop()
    assert nothing.peak() == Peak(0.0, 0.0)
