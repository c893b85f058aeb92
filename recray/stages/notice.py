"""SIGTERM as a notice, not an end: a worker or the driver that gets one has time to write a checkpoint.

A worker gets it when its machine is about to go (a preempted spot instance, a drained node, `ray stop`), the driver
when the run is to end (`ray job stop`, a service manager), as it gets SIGINT by Ctrl-C. What was not asked for, a
`kill -9`, costs what was done since the last checkpoint.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import ray
from ray.train.torch import TorchConfig

from recray.stages.board import Board
from recray.stages.collectives import NodesBackend, NodesTorch
from recray.train.context import Notice

logger = logging.getLogger(__name__)

TOLD_BY = (signal.SIGTERM, signal.SIGINT)

_told = threading.Event()


class _ListeningBackend(NodesBackend):
    """PyTorch's process group on workers that listen for SIGTERM.

    Ray puts its own handler in place as a worker starts, and runs the training function in a thread, which may not set
    one: what a backend runs on its workers runs in their main thread.
    """

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Set up the process group and the handler on every worker."""
        super().on_start(worker_group, backend_config)
        worker_group.execute(_listen)


@dataclass
class ListeningTorch(NodesTorch):
    """What workers' collectives run on; the workers take SIGTERM as a notice."""

    @property
    def backend_cls(self) -> type[_ListeningBackend]:
        """The class that sets workers up."""
        return _ListeningBackend


def _listen() -> None:
    signal.signal(signal.SIGTERM, lambda _number, _frame: _told.set())


class Listener:
    """A rank's ear: its own SIGTERM, and on rank 0 the driver's.

    Args:
        board: Actor handle of the driver's board; None on other ranks, and where no driver listens.
    """

    def __init__(self, board: Any) -> None:
        self._board = board
        self._asked: Any = None
        self._run_ends = False

    def notice(self) -> Notice:
        """Return what was heard so far; never waits."""
        if _told.is_set():
            return Notice.MACHINE
        if self._board is not None and not self._run_ends:
            self._ask()
        return Notice.RUN if self._run_ends else Notice.NONE

    def _ask(self) -> None:
        if self._asked is None:
            self._asked = self._board.told.remote()
        ready, _ = ray.wait([self._asked], timeout=0)
        if ready:
            try:
                self._run_ends = ray.get(self._asked)
            except ray.exceptions.RayError:
                self._board = None  # the driver is gone, and this worker soon will be
            self._asked = None


@contextmanager
def board_for_workers() -> Iterator[Any]:
    """Yield the handle of a board that says so when this process, the driver, gets SIGTERM or SIGINT (Ctrl-C).

    Only a main thread can listen; from another one, as in a trial of a search, nothing is ever said.
    """
    board = ray.remote(num_cpus=0)(Board).remote()

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        logger.warning("told to end: a checkpoint is written first; once more ends it at once")
        board.tell.remote()
        for each in TOLD_BY:
            signal.signal(each, before[each])

    if threading.current_thread() is not threading.main_thread():
        yield board
        return
    before = {each: signal.signal(each, pass_on) for each in TOLD_BY}
    try:
        yield board
    finally:
        for each in TOLD_BY:
            signal.signal(each, before[each])
