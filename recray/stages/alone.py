"""A fit of one worker in the very process that asks for it: no group of workers, no feed on Ray.

A group costs a fit ten seconds and more: processes start, and each imports what the one before had imported. Who fits
many times in a row, as a search does, keeps one process and pays once. The loop, its units and its seeds are the same.
"""

import faulthandler
import gc
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from pyarrow import fs as pafs

from recray.config import Resources
from recray.stages.feed import MakeFeed
from recray.stages.fitting import Fit, Fitted, ProcessContext, checkpoints, log_folder
from recray.stages.group import backend
from recray.train.checkpoint import CheckpointStore
from recray.train.log import MetricsLog
from recray.train.units import Unit
from recray.workspace import Workspace

UNITS_AHEAD = 2
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}  # DeepSpeed reads it here
FIT_SECONDS = "fit_seconds"
FRESH_SEED = 67280421310721  # of torch in a process that has seeded nothing

Report = Callable[[Mapping[str, float]], None]


class AloneContext(ProcessContext):
    """The only rank there is, as the loop sees it.

    Args:
        fit: What is run.
        store: Of its checkpoints.
        resources: When a checkpoint is due, and when a process that says nothing is taken for hung.
        report: Gets the metrics of each validation.
        board: Where the driver says that the run shall end; None where none does.
    """

    def __init__(
        self, fit: Fit, store: CheckpointStore, resources: Resources, report: Report, board: Any = None
    ) -> None:
        super().__init__(fit.name, store, resources, board)
        self._steps, self._make_feed, self._report = fit.steps, fit.make_feed, report
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Since the loop was entered: steps, validations and checkpoints; what came before was setting up."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    @property
    def store(self) -> CheckpointStore:
        """Where the run's checkpoints are; the first thing a loop asks for."""
        self._began = self._began or time.monotonic()
        return self._store

    def units(self, first_step: int) -> Iterator[Unit]:
        """Yield the units from `first_step` on, made a little ahead."""
        return units_ahead(self._make_feed, first_step, self._steps)

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand on metrics, and how long it took so far."""
        self._report({**metrics, FIT_SECONDS: self.seconds})


def units_ahead(make_feed: MakeFeed, first_step: int, steps: int) -> Iterator[Unit]:
    """Yield the units of steps first_step .. steps - 1 for one rank, in order, while the next are being made."""
    with ThreadPoolExecutor(1, thread_name_prefix="feed") as loader:
        feed = loader.submit(make_feed, 1).result()
        ahead = range(first_step, min(first_step + UNITS_AHEAD, steps))
        waiting = deque(loader.submit(feed.unit, step, 0) for step in ahead)
        for step in range(first_step, steps):
            unit = waiting.popleft().result()
            if step + UNITS_AHEAD < steps:
                waiting.append(loader.submit(feed.unit, step + UNITS_AHEAD, 0))
            yield unit


def fit_alone(
    fit: Fit, workspace: Workspace, resources: Resources, *, report: Report, board: Any = None
) -> tuple[Fitted, float]:
    """Run `fit.work` here, going on where a run of the same name was; return what it left, and seconds in the loop.

    Args:
        fit: What is run.
        workspace: Where its checkpoints are.
        resources: Threads and times; of workers there is one.
        report: Gets the metrics of each validation and `FIT_SECONDS`, those in the loop so far.
        board: See `AloneContext`.

    Raises:
        RecrayError: what the fit refused, as it is; nothing is wrapped around it here.
    """
    _join_group_of_one(resources)
    if not torch.cuda.is_available():
        torch.set_num_threads(resources.threads_per_worker)
    torch.manual_seed(FRESH_SEED)  # as a worker has it that has done nothing before
    store = checkpoints(workspace, fit.run, resources)
    local = isinstance(workspace.fs, pafs.LocalFileSystem)
    folder = log_folder(workspace, fit.run) if local else tempfile.mkdtemp(prefix="recray-log-")
    context = AloneContext(fit, store, resources, report, board)
    try:
        fit.work(context, MetricsLog(Path(folder)))
        seconds = context.seconds
    finally:
        faulthandler.cancel_dump_traceback_later()
        gc.collect()  # engines hold themselves in circles: the next fit needs the room
        gc.freeze()  # what is left are libraries: looked through again for each fit, they would take half a second
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not local:
        pafs.copy_files(folder, log_folder(workspace, fit.run), destination_filesystem=workspace.fs)
        shutil.rmtree(folder)
    return Fitted(store), seconds


def needs_alone(resources: Resources) -> dict[str, float]:
    """Return what a process that fits alone holds of the cluster: it feeds itself, and on CPUs computes there."""
    if resources.gpus_per_worker > 0:
        return {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    return {"CPU": float(resources.threads_per_worker)}


def processes_at_once(needs: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> int:
    """Return how many processes with such needs fit onto nodes, each whole on one; at least one."""
    return max(1, sum(min(int(node.get(name, 0.0) // need) for name, need in needs.items()) for node in nodes))


def nodes_alive() -> list[Mapping[str, float]]:
    """Return what each node of the cluster has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _join_group_of_one(resources: Resources) -> None:
    """Set up the process group that engines ask for; once in a process, as DeepSpeed keeps hold of it."""
    os.environ.update(ALONE)
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend(resources), store=store, rank=0, world_size=1)
