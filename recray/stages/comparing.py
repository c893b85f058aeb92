"""The runs of a comparison: each fitted, and the test rows ranked with it, in one process that is kept for the next.

As many processes as there is room for work side by side. A run that needs a group of workers, or that draws negatives
again on the way, is fitted by Ray Train, one after another.
"""

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from recray.config import Align, Resources
from recray.errors import StopRequestedError
from recray.ranking.forms import SUMMED
from recray.stages.alignment import Alignment, fit_of, remove_parts, run_alignment
from recray.stages.alone import fit_alone, needs_alone, nodes_alive, processes_at_once
from recray.stages.fitting import Fitted
from recray.stages.notice import board_for_workers
from recray.stages.recommender import write_best
from recray.stages.scoring import (
    ROWS_AT_ONCE,
    OpenedModel,
    OpenScorer,
    RankRows,
    language_scorer,
    rank_on_replicas,
)
from recray.train.loop import WATCHED
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

STOP_WITHIN_S = 60.0


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    number: int
    method: str
    part: Align
    seed: int
    of: str  # the comparison's name
    total: int  # runs of the comparison

    @property
    def name(self) -> str:
        """Name below `.training`."""
        return f"{self.of}-{self.number}"

    @property
    def done(self) -> str:
        """The file below `.training` that is there when the run is done; written last."""
        return f"{self.name}-result.json"

    def __str__(self) -> str:
        return f"compare: {self.method}, seed {self.seed} (run {self.number + 1} of {self.total})"


class Judging(NamedTuple):
    """How test rows are ranked."""

    workspace: Workspace
    test: str  # folder below `.training`
    resources: Resources
    keep: int  # places of a ranking that are kept
    tokens_per_micro_batch: int

    def opener(self, *folder: str) -> OpenScorer:
        """Return what opens a language model where it ranks; all are ranked by the sum, which training watches."""
        opened = OpenedModel(self.workspace, folder, self.tokens_per_micro_batch, self.resources.threads_per_worker)
        return language_scorer(opened, SUMMED)


def go_through(runs: Sequence[tuple[Run, Alignment]], judging: Judging) -> Iterator[Run]:
    """Fit and rank every run that is not done yet; yield each as it is done.

    Raises:
        StopRequestedError: if this process got SIGTERM meanwhile; checkpoints are written.
        RecrayError: what a run refused.
    """
    left = [each for each in runs if not judging.workspace.exists(".training", each[0].done)]
    together = [each for each in left if judging.resources.num_workers > 1 or each[0].part.refresh_every is not None]
    with board_for_workers() as board:
        yield from _in_processes([each for each in left if each not in together], judging, board)
    for run, setting in together:
        logger.info("%s starts", run)
        fitted = run_alignment(setting, judging.resources, run=run.name, name=f"compare {run.method}, seed {run.seed}")
        _finish(run, fitted, judging, rank_on_ray)
        yield run


def _in_processes(runs: Sequence[tuple[Run, Alignment]], judging: Judging, board: Any) -> Iterator[Run]:
    if not runs:
        return
    needs = needs_alone(judging.resources)
    restarts = judging.resources.max_restarts
    runner = ray.remote(
        num_cpus=needs["CPU"], num_gpus=needs.get("GPU", 0), max_restarts=restarts, max_task_retries=restarts
    )(Runner)
    at_once = min(len(runs), processes_at_once(needs, nodes_alive()))
    logger.info("compare: %d runs left, %d side by side", len(runs), at_once)
    everyone = [runner.remote() for _ in range(at_once)]
    idle, waiting = list(everyone), deque(runs)
    busy: dict[Any, Any] = {}  # the runner of each result that is awaited
    try:
        while waiting or busy:
            while waiting and idle:
                actor = idle.pop()
                busy[actor.run.remote(*waiting.popleft(), judging, board)] = actor
            (ready,), _ = ray.wait(list(busy), num_returns=1)
            idle.append(busy.pop(ready))
            yield ray.get(ready)
    except StopRequestedError:  # the others were told as well, and write their checkpoints
        ray.wait(list(busy), num_returns=len(busy), timeout=STOP_WITHIN_S)
        raise
    finally:
        for actor in everyone:
            ray.kill(actor)


class Runner:
    """A process that fits and ranks one run after another."""

    def run(self, run: Run, setting: Alignment, judging: Judging, board: Any) -> Run:
        """Fit a run and rank the test rows with it; started again, it goes on from its checkpoint."""
        logger.info("%s starts", run)
        fit = fit_of(setting, run=run.name, name=f"compare {run.method}, seed {run.seed}")
        fitted, _ = fit_alone(fit, judging.workspace, judging.resources, report=lambda _: None, board=board)
        _finish(run, fitted, judging, _rank_here)
        return run


def rank_on_ray(model: str, open_scorer: OpenScorer, rows: str, judging: Judging, *, accelerated: bool = True) -> None:
    """Rank the test rows with one model on Ray Data, into a folder below `.training`."""
    workspace = judging.workspace
    workspace.remove(".training", rows)
    ranked = rank_on_replicas(
        ray.data.read_parquet(workspace.path(".training", judging.test), filesystem=workspace.fs),
        model,
        open_scorer,
        keep=judging.keep,
        resources=judging.resources,
        accelerated=accelerated,
    )
    ranked.write_parquet(workspace.path(".training", rows), filesystem=workspace.fs)


def _rank_here(model: str, open_scorer: OpenScorer, rows: str, judging: Judging) -> None:
    """Rank the test rows in this process, into a folder below `.training`."""
    rank = RankRows(model, open_scorer, judging.keep)
    test = pq.read_table(judging.workspace.path(".training", judging.test), filesystem=judging.workspace.fs)
    ranked = [rank(test.slice(first, ROWS_AT_ONCE)) for first in range(0, test.num_rows, ROWS_AT_ONCE)]
    judging.workspace.put_table(pa.concat_tables(ranked), ".training", rows, "part-0.parquet")


def _finish(run: Run, fitted: Fitted, judging: Judging, rank: Callable[[str, OpenScorer, str, Judging], None]) -> None:
    """Rank the test rows with a fit's best weights, write what is known of the run, and remove what was for the fit."""
    workspace, model = judging.workspace, f"{run.name}-model"
    with TemporaryDirectory(prefix="recray-model-") as folder:
        whole = Path(folder) / "model"
        write_best(fitted, workspace.folder("sft", "model"), whole, Path(folder) / "adapter", lora=run.part.lora)
        workspace.put_folder(whole, ".training", model)
    rank(run.method, judging.opener(".training", model), f"{run.name}-rows", judging)
    workspace.put_json(_facts(run, fitted), ".training", run.done)
    logger.info(
        "%s done: best validation %s %.4f at step %d", run, WATCHED, fitted.progress.best, fitted.progress.best_step
    )
    for left in (run.name, f"{run.name}-log", model):
        workspace.remove(".training", left)
    remove_parts(workspace, run.name)


def _facts(run: Run, fitted: Fitted) -> dict[str, Any]:
    """Return what a run took and how validation went."""
    progress = fitted.progress
    curve = [
        {"step": line["step"], "seconds": line["seconds"], "value": line[WATCHED]}
        for line in fitted.metrics
        if line["kind"] == "validation"
    ]
    return {
        "method": run.method,
        "seed": run.seed,
        "settings": json.dumps(run.part.objective.model_dump(mode="json")),
        "steps": progress.step,
        "seconds": progress.seconds,
        "best": progress.best,
        "best_step": progress.best_step,
        "skipped": progress.skipped,
        "curve": curve,
    }
