"""One writer at a time in a workspace, on local folders and on object stores.

WORKSPACE/.lock/NUMBER.json    who writes: made once, never changed; the highest number counts
WORKSPACE/.lock/NUMBER.beat    changes every few seconds while the holder lives
WORKSPACE/.lock/NUMBER.over    the holder has ended

Whoever wants to write makes the next number, which one alone can where the file system makes a file only if it is not
there (local folders, NFS). On an object store two may write the same file: both wait, read it again, and the one whose
name it holds goes on. No clocks are compared: a holder on this machine is looked up among its processes, one elsewhere
is watched until it beats or the lease is over.
"""

import getpass
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from pyarrow import fs as pafs

from recray.errors import WorkspaceError
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

FOLDER = ".lock"
BEAT_S = 5.0
LEASE_S = 60.0  # without a beat, after which a holder elsewhere counts as dead
READ_AGAIN_S = 0.2
SETTLE_S = 2.0  # on an object store: between writing and reading again


class Holder(NamedTuple):
    """Who holds a workspace, or held it."""

    number: int
    about: dict[str, Any]  # empty where it could not be read: its writer died, or is at it
    over: bool

    def __str__(self) -> str:
        about = {"pid": "?", "user": "?", "host": "?", "since": "?", **self.about}
        return f"process {about['pid']} of {about['user']} on {about['host']} since {about['since']}"


class WorkspaceLock:
    """Held while it is entered; refuses a workspace that somebody else is writing.

    Args:
        workspace: What is written.
        beat_s: Seconds between signs of life.
        lease_s: Seconds without one after which a holder on another machine counts as dead.

    Raises:
        WorkspaceError: on entering, naming the holder.
    """

    def __init__(self, workspace: Workspace, *, beat_s: float = BEAT_S, lease_s: float = LEASE_S) -> None:
        self._workspace, self._beat_s, self._lease_s = workspace, beat_s, lease_s
        self._number = 0
        self._about = {
            "owner": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "user": _user(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "place": place(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self._ended = threading.Event()
        self._beater = threading.Thread(target=self._beat, name="workspace-lock", daemon=True)

    def __enter__(self) -> Self:
        while True:
            newest = self._newest()
            if newest is not None and not newest.over and not self._is_dead(newest):
                raise WorkspaceError(
                    f"{self._workspace.uri} is being written by {newest}; wait until it has ended, stop it, or use "
                    "another --workspace"
                )
            number = 1 if newest is None else newest.number + 1
            if self._make(number):
                break
        self._number = number
        self._remove_older()
        self._beater.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._beater.join()
        try:
            if self._is_mine():
                self._workspace.write_bytes(b"", FOLDER, f"{self._number:06d}.over")
        except OSError as problem:  # the next one finds the process gone, or waits for the lease
            logger.warning("%s: the lock could not be given back (%s)", self._workspace.uri, problem)

    def check(self) -> None:
        """Do nothing while the workspace is held.

        Raises:
            WorkspaceError: if another process took this one for dead and has taken over.
        """
        if not self._is_mine():
            raise WorkspaceError(
                f"{self._workspace.uri} was taken over by {self._newest()}, as nothing was heard of this process for "
                f"{self._lease_s:g} s; what it was writing is not kept"
            )

    def _is_mine(self) -> bool:
        newest = self._newest()
        return newest is not None and newest.about.get("owner") == self._about["owner"]

    def _newest(self) -> Holder | None:
        """Return who came last; None where nobody was here."""
        names = self._workspace.names(FOLDER)
        numbers = [int(name.partition(".")[0]) for name in names if name.endswith(".json")]
        if not numbers:
            return None
        own = f"{max(numbers):06d}"
        about: dict[str, Any] = {}
        for wait_s in (0.0, READ_AGAIN_S):
            time.sleep(wait_s)
            try:
                about = self._workspace.json(FOLDER, f"{own}.json")
                break
            except (OSError, ValueError):  # gone meanwhile, or being written
                continue
        return Holder(max(numbers), about, f"{own}.over" in names)

    def _is_dead(self, holder: Holder) -> bool:
        """Return whether a holder that has not ended is gone: a process of this machine, or one that does not beat."""
        if holder.about.get("place") == place():
            dead = bool(_started(holder.about["pid"]) != holder.about["started"])
        else:
            logger.info("%s: held by %s; is it alive?", self._workspace.uri, holder)
            dead = self._stays_silent(holder)
        if dead:
            logger.warning("%s: goes on where %s ended", self._workspace.uri, holder)
        return dead

    def _stays_silent(self, holder: Holder) -> bool:
        """Return whether the lease passes without a sign of life."""
        first = self._beat_of(holder)
        until = time.monotonic() + self._lease_s
        while time.monotonic() < until:
            time.sleep(self._beat_s / 2)
            now = self._newest()
            if now is None or now.number != holder.number or now.over:
                return True  # it has ended, or another came: look again
            if self._beat_of(holder) != first:
                return False
        return True

    def _beat_of(self, holder: Holder) -> bytes | None:
        try:
            with self._workspace.fs.open_input_stream(
                self._workspace.path(FOLDER, f"{holder.number:06d}.beat")
            ) as stream:
                return bytes(stream.read())
        except OSError:
            return None

    def _make(self, number: int) -> bool:
        """Return whether this process made the file of `number`, and there is no higher one."""
        name, whole = f"{number:06d}.json", json.dumps(self._about).encode()
        if isinstance(self._workspace.fs, pafs.LocalFileSystem):
            path = Path(self._workspace.path(FOLDER, name))
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with path.open("xb") as file:
                    file.write(whole)
            except FileExistsError:
                return False
        else:
            if self._workspace.exists(FOLDER, name):
                return False
            self._workspace.write_bytes(whole, FOLDER, name)
            time.sleep(SETTLE_S)
        if self._is_mine():
            return True
        newest = self._newest()
        if newest is not None and newest.number > number:
            self._workspace.remove(FOLDER, name)  # it was another's, who had ended meanwhile
        return False

    def _remove_older(self) -> None:
        for name in self._workspace.names(FOLDER):
            if int(name.partition(".")[0]) < self._number:
                try:
                    self._workspace.remove(FOLDER, name)
                except OSError:  # another was quicker
                    logger.debug("%s is gone", name)

    def _beat(self) -> None:
        """Give signs of life until the lock is given back."""
        count = 0
        while not self._ended.wait(self._beat_s):
            count += 1
            try:
                self._workspace.write_bytes(str(count).encode(), FOLDER, f"{self._number:06d}.beat")
            except OSError as problem:
                logger.warning("%s: no sign of life could be written (%s)", self._workspace.uri, problem)


def place() -> str:
    """Return what tells process numbers of one machine, and of one container, from those of all others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {uuid.uuid4().hex}"


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks of the machine; None if there is none. Numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())
