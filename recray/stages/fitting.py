"""Ray around the training loop: the group of workers, the ordered feed, checkpoints. Shared by `sft`, `align`, `tune`.

The feed is Ray Data executing a pure plan. One block holds one unit (the share of one rank in one step), blocks keep
their order, and a streaming split of equal blocks over W readers hands block b to reader b mod W: so rank r gets its
units in order of steps, whatever the data tasks' timing. The loop checks the stamp of each.
"""

import faulthandler
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.train
import torch
from pyarrow import fs as pafs
from ray.data import ActorPoolStrategy, DataIterator, Dataset, Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.train import DataConfig, FailureConfig, LoggingConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution import context as reporting

from recray import errors
from recray.config import Resources
from recray.errors import DivergenceError, MachineLeavingError, RecrayError, StopRequestedError
from recray.stages.cluster import own_error
from recray.stages.group import backend, scaling
from recray.stages.notice import Listener, ListeningTorch, board_for_workers
from recray.train.checkpoint import CheckpointStore, folder_of
from recray.train.context import Notice
from recray.train.log import MetricsLog
from recray.train.loop import METRICS, PROGRESS, Progress
from recray.train.units import Unit, pack_unit, unpack_unit
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

FEED_CPUS = 0.25
UNITS_A_TASK = 16
NUMBER_CPUS = 0.1
PROGRESS_EVERY_S = 15.0
ARM_EVERY_S = 1.0
UNITS, ENDED = "units", "ended.json"
# Every rank raises these alike, so that none is left waiting for the others when all return.
ALIKE = (DivergenceError, StopRequestedError)


class Feed(Protocol):
    """Makes units; see recray.train.feeding."""

    def unit(self, step: int, rank: int) -> Unit:
        """Return the unit of one rank in one step."""


MakeFeed = Callable[[int], Feed]  # from the number of ranks
Work = Callable[["RayContext", MetricsLog], Progress]


class LoadUnit:
    """Ray Data actor: from the number of a unit to the unit itself; nothing for numbers from `steps` on."""

    def __init__(self, make_feed: MakeFeed, world_size: int, first_step: int, steps: int) -> None:
        torch.set_num_threads(1)
        self._feed, self._world_size = make_feed(world_size), world_size
        self._first_step, self._steps = first_step, steps

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        (number,) = batch["id"].tolist()
        step, rank = divmod(number, self._world_size)
        step += self._first_step
        units = [pack_unit(self._feed.unit(step, rank))] if step < self._steps else []
        return pa.table({"unit": pa.array(units, pa.binary())})


class UnitNumbers(Datasource):  # type: ignore[misc]  # ray.data is untyped
    """The numbers from 0 to `count`, and on until all tasks have as many; one a block.

    A task makes several blocks, as every task costs memory and time of the process that deals blocks out, before the
    first step already (5,000 units: 13 s until the first with one a task, 6 s with sixteen).

    As `ray.data.range`, but for how little of a CPU its tasks ask: on a small cluster whose CPUs the trainers hold, a
    task that asks for a whole one would never start, and trainers and feed would wait for each other for ever.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = -(-count // UNITS_A_TASK) * UNITS_A_TASK

    def estimate_inmemory_data_size(self) -> int:
        """Return bytes."""
        return 8 * self.count

    def get_read_tasks(
        self,
        parallelism: int,  # noqa: ARG002 - one block a number, whatever the cluster
        per_task_row_limit: int | None = None,  # noqa: ARG002
        data_context: Any = None,  # noqa: ARG002
    ) -> list[ReadTask]:
        """Return tasks of `UNITS_A_TASK` numbers, which Ray cuts into blocks of one."""
        some = BlockMetadata(num_rows=UNITS_A_TASK, size_bytes=8 * UNITS_A_TASK, exec_stats=None)
        return [ReadTask(partial(_numbers, first), some) for first in range(0, self.count, UNITS_A_TASK)]


def _numbers(first: int) -> list[pa.Table]:
    return [pa.table({"id": pa.array(range(first, first + UNITS_A_TASK), pa.int64())})]


def unit_dataset(make_feed: MakeFeed, world_size: int, *, first_step: int, steps: int) -> Dataset:
    """Return the units of steps first_step .. steps - 1, one a block, ordered by (step, rank)."""
    numbered = UnitNumbers(max(1, (steps - first_step) * world_size))
    # One task at a time: tasks that ask for next to nothing would otherwise start a process each, by the dozen.
    numbers = ray.data.read_datasource(
        numbered, num_cpus=NUMBER_CPUS, concurrency=1, override_num_blocks=numbered.count
    )
    dataset = numbers.map_batches(
        LoadUnit,
        batch_size=1,
        batch_format="numpy",
        compute=ActorPoolStrategy(size=1),
        num_cpus=FEED_CPUS,
        fn_constructor_args=(make_feed, world_size, first_step, steps),
    )
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    return dataset


class OrderedFeed(DataConfig):  # type: ignore[misc]  # ray.train is untyped
    """Gives every rank its own units in order, for whatever number of ranks the group (re)starts with."""

    def __init__(self, make_feed: MakeFeed, steps: int, store: CheckpointStore) -> None:
        super().__init__()
        self._make_feed, self._steps, self._store = make_feed, steps, store

    def configure(
        self,
        datasets: dict[str, Dataset],  # noqa: ARG002 - units follow from the plan, not from a data set
        world_size: int,
        worker_handles: Any,  # noqa: ARG002
        worker_node_ids: Any,  # noqa: ARG002
        **_: Any,
    ) -> list[dict[str, DataIterator]]:
        """Return one iterator a rank, from the step of the newest checkpoint on."""
        newest = self._store.newest(tell=False)  # while ranks may be writing their first one
        first = 0 if newest is None else newest.step
        units = unit_dataset(self._make_feed, world_size, first_step=first, steps=self._steps)
        return [{UNITS: iterator} for iterator in units.streaming_split(world_size, equal=False)]


class RayContext:
    """A rank of a Ray Train group, as the loop sees it.

    Args:
        name: For people.
        store: Of the run's checkpoints.
        resources: When a checkpoint is due, and when a rank that says nothing is taken for hung.
        board: Where the driver says that the run shall end.
    """

    def __init__(self, name: str, store: CheckpointStore, resources: Resources, board: Any) -> None:
        self._context = ray.train.get_context()
        self._name, self._store, self._resources = name, store, resources
        self._listener = Listener(board if self.rank == 0 else None)
        self._shown = time.monotonic()
        self._armed = float("-inf")
        self._arm()

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return int(self._context.get_world_rank())

    @property
    def store(self) -> CheckpointStore:
        """Where the run's checkpoints are."""
        return self._store

    @property
    def checkpoint_every_s(self) -> float:
        """Seconds after which a checkpoint is due."""
        return self._resources.checkpoint_every_s

    def units(self, first_step: int) -> Iterator[Unit]:
        """Yield this rank's units from `first_step` on."""
        shard = ray.train.get_dataset_shard(UNITS)
        for batch in shard.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=2):
            unit = unpack_unit(batch["unit"][0].as_py())
            if unit.step >= first_step:
                yield unit

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand metrics to Ray Train."""
        ray.train.report(dict(metrics))

    def progress(self, step: int, steps: int, text: str) -> None:
        """Put off the end of a hung process, and log where rank 0 is, every few seconds."""
        self._arm()
        if self.rank == 0 and time.monotonic() - self._shown > PROGRESS_EVERY_S:
            self._shown = time.monotonic()
            logger.info("%s: step %d of at most %d (%.0f %%), %s", self._name, step, steps, 100 * step / steps, text)

    def notice(self) -> Notice:
        """Return what this rank has been told."""
        return self._listener.notice()

    def _arm(self) -> None:
        """End this process, with the traceback of every thread in its log, unless it is heard of again in time.

        The watch is a thread without Python in it: it sees a process that hangs in a collective or holds the lock.
        """
        if time.monotonic() - self._armed > ARM_EVERY_S:
            self._armed = time.monotonic()
            faulthandler.dump_traceback_later(self._resources.hang_after_s, exit=True, file=2)


@dataclass(frozen=True)
class Fit:
    """One training run on Ray."""

    name: str  # for people
    run: str  # names its checkpoints: a run of the same name goes on where it was
    steps: int
    make_feed: MakeFeed
    work: Work  # what each rank does


class Fitted:
    """What a run left: its best weights and everything it logged."""

    def __init__(self, store: CheckpointStore) -> None:
        saved = store.newest()
        if saved is None or saved.best is None:
            raise RuntimeError(f"{store.root} holds no checkpoint although the fit has ended")
        own = folder_of(saved.number)
        self._store, self._saved = store, saved
        self.progress = Progress(**json.loads(store.read(f"{own}/{PROGRESS}")))
        self.metrics: list[dict[str, Any]] = [
            json.loads(line) for line in store.read(f"{own}/{METRICS}").decode().splitlines()
        ]

    @contextmanager
    def weights(self) -> Iterator[Path]:
        """Yield the file of the best weights, as safetensors."""
        assert self._saved.best is not None
        with self._store.opened(self._saved, self._saved.best) as folder:
            yield folder / self._saved.best


def run_fit(fit: Fit, workspace: Workspace, resources: Resources, *, callbacks: list[Any] | None = None) -> Fitted:
    """Run `fit.work` on every worker, going on where a run of the same name was; raise the first worker's own error.

    Raises:
        DivergenceError: if too many steps had a loss or gradient that was not finite.
        StopRequestedError: if this process got SIGTERM meanwhile; the checkpoint is written.
        RecrayError: what a worker or its feed refused.
    """
    store = checkpoints(workspace, fit.run, resources)
    workspace.remove(".training", fit.run, ENDED)
    with board_for_workers() as board:
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"fit": fit, "workspace": workspace, "resources": resources, "board": board},
            scaling_config=scaling(resources),
            torch_config=ListeningTorch(backend=backend(resources)),
            run_config=RunConfig(
                name=fit.run,
                storage_path=workspace.path(".training"),
                storage_filesystem=workspace.fs,
                failure_config=FailureConfig(max_failures=resources.max_restarts),
                logging_config=LoggingConfig(log_level="ERROR"),
                callbacks=callbacks,
            ),
            datasets={UNITS: ray.data.read_datasource(UnitNumbers(1))},  # a place to put the feed
            dataset_config=OrderedFeed(fit.make_feed, fit.steps, store),
        )
        trainer.fit()
    if workspace.exists(".training", fit.run, ENDED):
        ended = workspace.json(".training", fit.run, ENDED)
        workspace.remove(".training", fit.run, ENDED)
        raise getattr(errors, ended["error"])(ended["message"])
    return Fitted(store)


def checkpoints(workspace: Workspace, run: str, resources: Resources) -> CheckpointStore:
    """Return the store of a run's checkpoints."""
    root = workspace.path(".training", run, "checkpoints")
    return CheckpointStore(workspace.fs, root, keep=resources.keep_checkpoints)


def log_folder(workspace: Workspace, run: str) -> str:
    """Return where a run's metrics and TensorBoard events are gathered, below the workspace."""
    return workspace.path(".training", f"{run}-log")


def _worker(config: dict[str, Any]) -> None:
    """Run on every rank: the loop, with a log of its own on rank 0.

    What recray itself refuses would be refused again by every new group: it is noted for the driver, and a group that
    finds the note ends at once.
    """
    fit: Fit = config["fit"]
    workspace: Workspace = config["workspace"]
    resources: Resources = config["resources"]
    if workspace.exists(".training", fit.run, ENDED):
        return
    if not torch.cuda.is_available():
        torch.set_num_threads(resources.threads_per_worker)
    # A logger that Ray 2.60 names after its file, so that no setting of Ray's silences it; a line a report and rank.
    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)
    context = RayContext(fit.name, checkpoints(workspace, fit.run, resources), resources, config["board"])
    local = isinstance(workspace.fs, pafs.LocalFileSystem)
    folder = log_folder(workspace, fit.run) if local else tempfile.mkdtemp(prefix="recray-log-")
    own = Path(folder) if context.rank == 0 else Path(tempfile.mkdtemp(prefix="recray-log-"))
    try:
        fit.work(context, MetricsLog(own))
    except Exception as error:
        refused = own_error(error)
        if refused is None or isinstance(refused, MachineLeavingError) or type(refused) is RecrayError:
            raise
        ended = {"error": type(refused).__name__, "message": str(refused)}
        workspace.write_json(ended, ".training", fit.run, ENDED)
        if not isinstance(refused, ALIKE):
            raise
    finally:
        faulthandler.cancel_dump_traceback_later()
    if context.rank == 0 and not local:
        target = log_folder(workspace, fit.run)
        pafs.copy_files(folder, target, destination_filesystem=workspace.fs)
        shutil.rmtree(folder)
