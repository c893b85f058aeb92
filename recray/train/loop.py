"""The training loop: eats units in order, validates, keeps the best weights, and can be interrupted anywhere."""

import json
import logging
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch

from recray.distributed.collectives import sum_over_ranks
from recray.errors import (
    CheckpointError,
    DivergenceError,
    MachineLeavingError,
    RecrayError,
    StopRequestedError,
)
from recray.train.checkpoint import Saved, folder_of
from recray.train.checkpoint_writer import CheckpointWriter
from recray.train.collapse import collapse
from recray.train.context import Notice, WorkerContext
from recray.train.engine import Engine
from recray.train.log import MetricsLog
from recray.train.step import MarginCentre, StepResult, learning_rate_at
from recray.train.units import Unit

logger = logging.getLogger(__name__)

STATE, PROGRESS, METRICS = "state", "progress.json", "metrics.jsonl"
WATCHED = "ndcg@10"
NAMED_ROWS = 20

TakeStep = Callable[[Engine, Unit, float], StepResult]


class Plan(NamedTuple):
    """How long to train, how fast, and when to look up."""

    steps: int
    validate_every: int  # steps
    patience: int | None  # validations without a better one before it stops; None: never
    learning_rate: float
    warmup_fraction: float
    final_fraction: float
    clock_limit_s: float | None = None  # stop at the next validation after so many seconds of steps
    most_skipped: int = 10  # steps with a loss or gradient that is not finite; one more ends the run
    until: int | None = None  # stop at this step, a validated one, to go on with other units later; None: at `steps`

    @property
    def end(self) -> int:
        """The step that is the last for now."""
        return self.steps if self.until is None else min(self.until, self.steps)


@dataclass
class Progress:
    """Where a run stands: what a checkpoint holds beside weights and optimiser."""

    step: int = 0
    validated: int = -1  # the last step at which validation was run
    best: float = float("-inf")
    best_step: int = 0
    stale: int = 0  # validations since the best
    seconds: float = 0.0  # of steps; validation, start-up and waiting for data not counted
    centre: float | None = None  # of the batch margin
    skipped: int = 0  # steps whose loss or gradient was not finite


def fit(
    engine: Engine,
    context: WorkerContext,
    plan: Plan,
    take_step: TakeStep,
    validate: Callable[[int], dict[str, float]],
    log: MetricsLog,
    centre: MarginCentre,
) -> Progress:
    """Train to the plan's end or until validation stops getting better; return where it ended.

    It goes on from the newest whole checkpoint of the context's store, and leaves one there when it ends. The start
    counts: step 0 is validated, so that training which only does harm leaves the weights it was given. Checkpoints are
    written after each validation, when one is due by the clock, and when a rank has notice that it will be ended.

    Raises:
        MachineLeavingError, StopRequestedError: on every rank, after such a notice; the checkpoint is written by then.
        DivergenceError: on every rank, if too many steps had a loss or gradient that was not finite; names the rows.
        CheckpointError: if the last checkpoint can't be written.
    """
    run = _Run(engine, context, plan, take_step, validate, log, centre)
    try:
        return run.to_the_end()
    finally:
        run.writer.leave()


class _Run:
    """One rank's part of a run."""

    def __init__(
        self,
        engine: Engine,
        context: WorkerContext,
        plan: Plan,
        take_step: TakeStep,
        validate: Callable[[int], dict[str, float]],
        log: MetricsLog,
        centre: MarginCentre,
    ) -> None:
        self.engine, self.context, self.plan, self.log = engine, context, plan, log
        self.take_step, self.validate, self.centre = take_step, validate, centre
        self.progress = Progress()
        self.writer = self.resume()
        self.checkpointed = time.monotonic()

    def resume(self) -> CheckpointWriter:
        """Go to where the newest whole checkpoint was; the same one on every rank."""
        store, saved = self.context.store, self.newest()
        if saved is not None:
            with store.opened(saved) as folder:
                own = folder / folder_of(saved.number)
                self.engine.load(own, STATE, saved_by=saved.world_size)
                self.progress = Progress(**json.loads((own / PROGRESS).read_text()))
                lines = (own / METRICS).read_text().splitlines()
            self.centre.value = self.progress.centre
            if self.context.rank == 0:
                self.log.restore([json.loads(line) for line in lines])
                logger.info("goes on from the checkpoint of step %d", saved.step)
        elif self.context.rank == 0 and self.log.lines():
            self.log.restore([])  # of a run that was ended before its first checkpoint
        return CheckpointWriter(store, self.engine.device, saved)

    def newest(self) -> Saved | None:
        """Return the newest whole checkpoint as rank 0 sees it; what is newer or half-written is removed."""
        store, saved = self.context.store, None
        if self.context.rank == 0:
            saved = store.newest()
            store.clean(saved)
        own = torch.tensor([0 if saved is None else saved.number], device=self.engine.device)
        number = int(sum_over_ranks(own).item())
        return store.manifest(number) if number else None

    def to_the_end(self) -> Progress:
        """Train, validate and write checkpoints until the plan says so."""
        progress, plan = self.progress, self.plan
        units: Iterator[Unit] | None = None
        while True:
            if progress.validated != progress.step and (
                progress.step % plan.validate_every == 0 or progress.step == plan.end
            ):
                self.look_up()
            if progress.validated == progress.step and self.is_over():
                break
            units = units or self.context.units(progress.step)
            self.train_until(min(plan.end, (progress.step // plan.validate_every + 1) * plan.validate_every), units)
        self.settle_the_last()
        self.log.close()
        return progress

    def train_until(self, last: int, units: Iterator[Unit]) -> None:
        """Take steps up to the next validation, and look out for what comes between."""
        self.engine.module.train()
        while self.progress.step < last:
            self.one_step(units)
            machine, run, due = self.signals()
            if machine or run:
                self.write()
                kept = self.writer.settle()
                state = f"the checkpoint of step {self.progress.step} {'is' if kept else 'could NOT be'} written"
                if run:
                    raise StopRequestedError(f"stopped as asked: {state}; run again to go on from there")
                raise MachineLeavingError(f"a machine goes away: {state}, the others go on from there")
            if due and self.progress.step < last:
                self.write()

    def one_step(self, units: Iterator[Unit]) -> None:
        """Take one step and log it."""
        progress, plan, context = self.progress, self.plan, self.context
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
        result = self.take_step(self.engine, unit, rate)
        ended = time.perf_counter()
        progress.step += 1
        progress.seconds += ended - fed
        if result.skipped:
            self.count_skipped(result)
        timing = {
            "learning_rate": rate,
            "tokens_per_s": result.tokens / (ended - started),
            "data_wait_share": (fed - started) / (ended - started),
        }
        if context.rank == 0:
            self.log.write("train", progress.step, result.metrics | timing, rows=digest(unit.rows))
        context.progress(progress.step, plan.steps, f"loss {result.metrics['loss']:.4f}")

    def count_skipped(self, result: StepResult) -> None:
        """Say which rows cost a step, and stop when that has happened too often."""
        progress, most = self.progress, self.plan.most_skipped
        progress.skipped += 1
        rows = ", ".join(str(row) for row in result.bad_rows[:NAMED_ROWS])
        more = f" and {len(result.bad_rows) - NAMED_ROWS} more" if len(result.bad_rows) > NAMED_ROWS else ""
        if self.context.rank == 0:
            logger.warning("step %d is skipped: loss or gradient not finite, rows %s%s", progress.step, rows, more)
        if progress.skipped > most:
            raise DivergenceError(
                f"loss or gradient were not finite in {progress.skipped} steps, {most} are allowed "
                f"(optimiser.most_skipped); in the last, step {progress.step}, because of rows {rows}{more}: look at "
                f"them in the stage's input tables, or lower optimiser.learning_rate"
            )

    def signals(self) -> tuple[bool, bool, bool]:
        """Return whether a machine goes away, the run shall end, a checkpoint is due; the same on every rank."""
        notice = self.context.notice()
        late = time.monotonic() - self.checkpointed >= self.context.checkpoint_every_s
        own = [notice is Notice.MACHINE, notice is Notice.RUN, late and self.context.rank == 0]
        flags = sum_over_ranks(torch.tensor(own, dtype=torch.float32, device=self.engine.device)).tolist()
        return flags[0] > 0, flags[1] > 0, flags[2] > 0

    def look_up(self) -> None:
        """Validate, keep the best weights, report, and write a checkpoint."""
        progress = self.progress
        metrics = self.validate(progress.step)
        self.context.progress(progress.step, self.plan.steps, "validated")
        progress.validated = progress.step
        if metrics[WATCHED] > progress.best:
            progress.best, progress.best_step, progress.stale = metrics[WATCHED], progress.step, 0
            self.writer.keep_best(self.engine.whole_weights())
            state = "the best so far"
        else:
            progress.stale += 1
            state = f"best {progress.best:.4f} at step {progress.best_step}"
        if self.context.rank == 0:
            self.log.write("validation", progress.step, {**metrics, "seconds": progress.seconds})
            logger.info("step %d: %s %.4f, %s", progress.step, WATCHED, metrics[WATCHED], state)
            collapsed = collapse(self.log.lines(), WATCHED)
            if collapsed is not None:
                logger.warning("step %d: %s", progress.step, collapsed)
        self.context.report({**metrics, f"best_{WATCHED}": progress.best, "step": float(progress.step)})
        self.write()

    def write(self) -> None:
        """Begin a checkpoint of now."""
        self.progress.centre = self.centre.value
        lines = [json.dumps(line) for line in self.log.lines()] if self.context.rank == 0 else []
        texts = {PROGRESS: json.dumps(asdict(self.progress)), METRICS: "\n".join(lines)}
        self.writer.write(self.progress.step, lambda folder: self.engine.save(folder, STATE), texts)
        self.checkpointed = time.monotonic()

    def settle_the_last(self) -> None:
        """See that the run's end is kept: what comes after reads it."""
        if self.writer.step is None or self.writer.settle():
            return  # nothing was left to do, or all is well
        self.write()
        if not self.writer.settle():
            raise CheckpointError(
                f"the last checkpoint, of step {self.progress.step}, could not be written to {self.context.store.root} "
                f"({self.writer.failure}); make room there and run again: it goes on from the one before"
            )

    def is_over(self) -> bool:
        """Return whether the plan has been followed to its end."""
        progress, plan = self.progress, self.plan
        late = plan.clock_limit_s is not None and progress.seconds >= plan.clock_limit_s
        stale = plan.patience is not None and progress.stale >= plan.patience
        return late or stale or progress.step >= plan.end


def digest(rows: list[int]) -> str:
    """Return 8 hex digits of the rows of a step, in order: with them, two traces of a run can be compared."""
    return f"{zlib.crc32(np.array(rows, dtype=np.int64).tobytes()):08x}"
