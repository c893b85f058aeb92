"""The training loop: eats units in order, validates, keeps the best weights, and can be interrupted."""

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save_file

from recray.errors import RecrayError
from recray.train.context import WorkerContext
from recray.train.engine import Engine
from recray.train.log import MetricsLog
from recray.train.step import MarginCentre, StepResult, learning_rate_at
from recray.train.units import Unit

logger = logging.getLogger(__name__)

STATE = "state"
BEST = "best.safetensors"
WATCHED = "ndcg@10"


class Plan(NamedTuple):
    """How long to train, how fast, and when to look up."""

    steps: int
    validate_every: int  # steps
    patience: int | None  # validations without a better one before it stops; None: never
    learning_rate: float
    warmup_fraction: float
    final_fraction: float
    clock_limit_s: float | None = None  # stop at the next validation after so many seconds of steps


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside weights and optimiser."""

    step: int = 0
    best: float = float("-inf")
    best_step: int = 0
    stale: int = 0  # validations since the best
    seconds: float = 0.0  # of steps; validation, start-up and waiting for data not counted
    centre: float | None = None  # of the batch margin


def fit(
    engine: Engine,
    context: WorkerContext,
    plan: Plan,
    take_step: Callable[[Engine, Unit, float], StepResult],
    validate: Callable[[], dict[str, float]],
    log: MetricsLog,
    centre: MarginCentre,
) -> Progress:
    """Train to the plan's end or until validation stops getting better; return where it ended.

    The start counts: step 0 is validated, so that training which only does harm leaves the weights it was given. Each
    validation reports a checkpoint that holds the state of every rank and the best weights so far.
    """
    progress = _resume(engine, context, log, centre)
    if progress.step == 0:
        _look_up(engine, context, progress, validate, log, centre)
    units = context.units(progress.step)
    while progress.step < plan.steps and not _is_over(progress, plan):
        _train_until(
            min(plan.steps, progress.step + plan.validate_every),
            engine,
            context,
            plan,
            take_step,
            log,
            units,
            progress,
        )
        _look_up(engine, context, progress, validate, log, centre)
    log.close()
    return progress


def _train_until(
    last: int,
    engine: Engine,
    context: WorkerContext,
    plan: Plan,
    take_step: Callable[[Engine, Unit, float], StepResult],
    log: MetricsLog,
    units: Iterator[Unit],
    progress: Progress,
) -> None:
    engine.module.train()
    while progress.step < last:
        started = time.perf_counter()
        unit = next(units)
        fed = time.perf_counter()
        if (unit.step, unit.rank) != (progress.step, context.rank):
            raise RecrayError(
                f"rank {context.rank} at step {progress.step} was fed the unit of rank {unit.rank}, step {unit.step}; "
                f"the feed is out of order"
            )
        rate = learning_rate_at(
            progress.step,
            plan.steps,
            peak=plan.learning_rate,
            warmup_fraction=plan.warmup_fraction,
            final_fraction=plan.final_fraction,
        )
        result = take_step(engine, unit, rate)
        ended = time.perf_counter()
        progress.step += 1
        progress.seconds += ended - fed
        timing = {
            "learning_rate": rate,
            "tokens_per_s": result.tokens / (ended - started),
            "data_wait_share": (fed - started) / (ended - started),
        }
        if context.rank == 0:
            log.write("train", progress.step, result.metrics | timing)
        context.progress(progress.step, plan.steps, f"loss {result.metrics['loss']:.4f}")


def _look_up(
    engine: Engine,
    context: WorkerContext,
    progress: Progress,
    validate: Callable[[], dict[str, float]],
    log: MetricsLog,
    centre: MarginCentre,
) -> None:
    """Validate, keep the best weights, and report a checkpoint."""
    metrics = validate()
    better = metrics[WATCHED] > progress.best
    if better:
        progress.best, progress.best_step, progress.stale = metrics[WATCHED], progress.step, 0
    else:
        progress.stale += 1
    progress.centre = centre.value
    if context.rank == 0:
        log.write("validation", progress.step, metrics)
        state = "the best so far" if better else f"best {progress.best:.4f} at step {progress.best_step}"
        logger.info("step %d: %s %.4f, %s", progress.step, WATCHED, metrics[WATCHED], state)
    with tempfile.TemporaryDirectory(prefix="recray-checkpoint-") as name:
        folder = Path(name)
        _write_checkpoint(folder, engine, context, progress, log, better=better)
        context.report({**metrics, f"best_{WATCHED}": progress.best, "step": float(progress.step)}, folder)


def _write_checkpoint(
    folder: Path, engine: Engine, context: WorkerContext, progress: Progress, log: MetricsLog, *, better: bool
) -> None:
    engine.save(folder, STATE)
    weights = engine.whole_weights() if better else None
    if context.rank != 0:
        return
    if weights is not None:
        _best_file(log).parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, _best_file(log))
    (folder / BEST).write_bytes(_best_file(log).read_bytes())
    (folder / "progress.json").write_text(json.dumps(asdict(progress)))
    (folder / "metrics.json").write_text(json.dumps(log.lines()))


def _resume(engine: Engine, context: WorkerContext, log: MetricsLog, centre: MarginCentre) -> Progress:
    folder = context.resume_folder()
    if folder is None:
        return Progress()
    engine.load(folder, STATE)
    progress = Progress(**json.loads((folder / "progress.json").read_text()))
    centre.value = progress.centre
    if context.rank == 0:
        log.restore(json.loads((folder / "metrics.json").read_text()))
        _best_file(log).write_bytes((folder / BEST).read_bytes())
        logger.info("resumed at step %d", progress.step)
    return progress


def _is_over(progress: Progress, plan: Plan) -> bool:
    late = plan.clock_limit_s is not None and progress.seconds >= plan.clock_limit_s
    return late or (plan.patience is not None and progress.stale >= plan.patience)


def _best_file(log: MetricsLog) -> Path:
    return log.folder / BEST
