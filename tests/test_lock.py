"""Two writers: one holds the workspace, the other is told who does; the dead give way, and nobody else."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from pyarrow import fs as pafs

from recray import lock as locks
from recray.errors import WorkspaceError
from recray.lock import FOLDER, WorkspaceLock
from recray.workspace import Workspace

# Holds the workspace until it is told to end; says what it was told then.
HOLD = """
import sys
from recray import lock as locks
from recray.errors import WorkspaceError
from recray.lock import WorkspaceLock
from recray.workspace import Workspace
if len(sys.argv) > 2:
    locks.place = lambda: sys.argv[2]
with WorkspaceLock(Workspace(sys.argv[1]), beat_s=0.05) as lock:
    print("held", flush=True)
    sys.stdin.readline()
    try:
        lock.check()
    except WorkspaceError as error:
        print(error, flush=True)
"""
# Adds one to a number in a file, each time under the lock, as no file system would let many do at once.
COUNT = """
import sys, time
from pathlib import Path
from recray.errors import WorkspaceError
from recray.lock import WorkspaceLock
from recray.workspace import Workspace
workspace, done = Workspace(sys.argv[1]), 0
number = Path(sys.argv[1], "number")
while done < 5:
    try:
        with WorkspaceLock(workspace):
            found = int(number.read_text())
            time.sleep(0.002)
            number.write_text(str(found + 1))
            done += 1
    except WorkspaceError:
        time.sleep(0.001)
"""


def start(program: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def holder(workspace: Workspace) -> Iterator["subprocess.Popen[str]"]:
    """Another process of this machine that holds the workspace."""
    yield from _holding(workspace.uri)


@pytest.fixture
def holder_elsewhere(workspace: Workspace) -> Iterator["subprocess.Popen[str]"]:
    """A process that says it is on another machine."""
    yield from _holding(workspace.uri, "another machine")


def _holding(*arguments: str) -> Iterator["subprocess.Popen[str]"]:
    process = start(HOLD, *arguments)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_told_who_the_first_is(workspace: Workspace, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(WorkspaceError, match=rf"being written by process {holder.pid} of \w+ on .* since 20"):
        WorkspaceLock(workspace).__enter__()
    holder.communicate("end\n")
    with WorkspaceLock(workspace) as mine:
        mine.check()


@pytest.mark.usefixtures("holder")
def test_who_looked_too_early_does_not_write_over_the_first(workspace: Workspace) -> None:
    assert not WorkspaceLock(workspace)._make(1)


def test_a_killed_writer_gives_way_at_once(workspace: Workspace, holder: "subprocess.Popen[str]") -> None:
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked how it ended
    with WorkspaceLock(workspace, lease_s=1e9) as mine:
        mine.check()


def test_a_process_with_the_number_of_a_dead_one_is_another(workspace: Workspace) -> None:
    about = {"owner": "x", "pid": os.getpid(), "started": "1", "place": locks.place()}
    workspace.write_json(about, FOLDER, "000007.json")
    with WorkspaceLock(workspace, lease_s=1e9):
        assert [name for name in workspace.names(FOLDER) if name.endswith(".json")] == ["000008.json"]


def test_a_writer_elsewhere_is_alive_while_it_beats(
    workspace: Workspace, holder_elsewhere: "subprocess.Popen[str]"
) -> None:
    with pytest.raises(WorkspaceError, match=f"process {holder_elsewhere.pid}"):
        WorkspaceLock(workspace, beat_s=0.05, lease_s=1e9).__enter__()


def test_a_writer_that_was_taken_for_dead_keeps_nothing(
    workspace: Workspace, holder_elsewhere: "subprocess.Popen[str]"
) -> None:
    holder_elsewhere.send_signal(signal.SIGSTOP)
    with WorkspaceLock(workspace, beat_s=0.05, lease_s=0.5) as mine:
        holder_elsewhere.send_signal(signal.SIGCONT)
        told, _ = holder_elsewhere.communicate("go on\n")
        assert f"taken over by process {os.getpid()}" in told
        mine.check()  # the other gave nothing back that is not its own


def test_a_lock_whose_maker_died_before_it_was_written_waits_for_the_lease(workspace: Workspace) -> None:
    workspace.write_bytes(b"", FOLDER, "000001.json")
    with WorkspaceLock(workspace, beat_s=0.02, lease_s=0.1) as mine:
        mine.check()


def test_many_writers_take_turns(workspace: Workspace) -> None:
    workspace.write_bytes(b"0", "number")
    processes = [start(COUNT, workspace.uri) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    for process in processes:
        process.communicate()
    assert Path(workspace.path("number")).read_text() == "15"
    assert sorted(name.partition(".")[2] for name in workspace.names(FOLDER)) == ["json", "over"]


def test_on_an_object_store_one_of_two_goes_on(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are replaced, not refused: both find none, and both write theirs."""
    monkeypatch.setattr(locks, "SETTLE_S", 0.3)
    workspace.fs = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("file", auto_mkdir=True)))
    both, ended, told = threading.Barrier(2), threading.Event(), []
    exists = workspace.exists

    def looked_for(*parts: str) -> bool:
        found = exists(*parts)
        if both.wait():
            time.sleep(0.1)  # the second writes when the first could have read its own
        return found

    monkeypatch.setattr(workspace, "exists", looked_for)

    def write() -> None:
        try:
            with WorkspaceLock(workspace):
                told.append("held")
                ended.wait(10)
        except WorkspaceError as error:
            told.append(str(error))
            ended.set()

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    told.remove("held")
    assert [f"written by process {os.getpid()}" in each for each in told] == [True]
