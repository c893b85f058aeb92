"""Ray around the training loop: the group of workers, checkpoints, progress. Shared by `sft`, `align`, `tune`."""

import faulthandler
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from pyarrow import fs as pafs
from ray.train import FailureConfig, LoggingConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution import context as reporting

from recray import errors
from recray.config import Resources
from recray.errors import DivergenceError, MachineLeavingError, RecrayError, StopRequestedError
from recray.stages.cluster import own_error
from recray.stages.feed import UNITS, MakeFeed, OrderedFeed, Sealed, UnitNumbers
from recray.stages.group import backend, scaling
from recray.stages.notice import Listener, ListeningTorch, board_for_workers
from recray.train.checkpoint import CheckpointStore, folder_of
from recray.train.context import Notice, WorkerContext
from recray.train.log import MetricsLog
from recray.train.loop import METRICS, PROGRESS, Progress
from recray.train.units import Unit, unpack_unit
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

PROGRESS_EVERY_S = 15.0
ARM_EVERY_S = 1.0
ENDED = "ended.json"
# Every rank raises these alike, so that none is left waiting for the others when all return.
ALIKE = (DivergenceError, StopRequestedError)


Work = Callable[[WorkerContext, MetricsLog], Progress]


class ProcessContext:
    """What the loop sees of any process that fits: checkpoints, progress, notice, and a watch against hanging.

    Args:
        name: For people.
        store: Of the run's checkpoints.
        resources: When a checkpoint is due, and when a process that says nothing is taken for hung.
        board: Where the driver says that the run shall end; None where none does, or another rank looks there.
    """

    rank = 0

    def __init__(self, name: str, store: CheckpointStore, resources: Resources, board: Any) -> None:
        self._name, self._store, self._resources = name, store, resources
        self._listener = Listener(board)
        self._shown = time.monotonic()
        self._armed = float("-inf")
        self._arm()

    @property
    def store(self) -> CheckpointStore:
        """Where the run's checkpoints are."""
        return self._store

    @property
    def checkpoint_every_s(self) -> float:
        """Seconds after which a checkpoint is due."""
        return self._resources.checkpoint_every_s

    def progress(self, step: int, steps: int, text: str) -> None:
        """Put off the end of a hung process, and log where rank 0 is, every few seconds."""
        self._arm()
        if self.rank == 0 and time.monotonic() - self._shown > PROGRESS_EVERY_S:
            self._shown = time.monotonic()
            logger.info("%s: step %d of at most %d (%.0f %%), %s", self._name, step, steps, 100 * step / steps, text)

    def notice(self) -> Notice:
        """Return what this process has been told."""
        return self._listener.notice()

    def _arm(self) -> None:
        """End this process, with the traceback of every thread in its log, unless it is heard of again in time.

        The watch is a thread without Python in it: it sees a process that hangs in a collective or holds the lock.
        """
        if time.monotonic() - self._armed > ARM_EVERY_S:
            self._armed = time.monotonic()
            faulthandler.dump_traceback_later(self._resources.hang_after_s, exit=True, file=2)


class RayContext(ProcessContext):
    """A rank of a Ray Train group, as the loop sees it; rank 0 looks at the board."""

    def __init__(self, name: str, store: CheckpointStore, resources: Resources, board: Any) -> None:
        self.rank = int(ray.train.get_context().get_world_rank())
        super().__init__(name, store, resources, board if self.rank == 0 else None)

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
            Sealed(_worker),  # what only passes it on need not import it
            train_loop_config={"fit": Sealed(fit), "workspace": workspace, "resources": resources, "board": board},
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
            dataset_config=OrderedFeed(Sealed(fit.make_feed), fit.steps, store),
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
    fit: Fit = config["fit"].open()
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
