"""The loop without Ray: the best weights, patience, the clock, the stamp of units, and interruption."""

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.fs import LocalFileSystem
from safetensors.torch import load_file
from torch import Tensor, nn

from recray.errors import DivergenceError, MachineLeavingError, RecrayError, StopRequestedError
from recray.train.checkpoint import CheckpointStore
from recray.train.context import Notice
from recray.train.engine import Engine, PlainEngine
from recray.train.log import MetricsLog
from recray.train.loop import Plan, Progress, digest, fit
from recray.train.step import MarginCentre, StepResult
from recray.train.units import Unit


class Surroundings:
    """A group of one with its checkpoints in a folder, which may be killed at a step, or told to end."""

    rank = 0

    def __init__(
        self,
        folder: Path,
        *,
        killed_at: int | None = None,
        told_at: tuple[int, Notice] = (-1, Notice.NONE),
        shift: int = 0,
        checkpoint_every_s: float = 1e9,
    ) -> None:
        self.store = CheckpointStore(LocalFileSystem(), str(folder))
        self.checkpoint_every_s = checkpoint_every_s
        self._killed_at, self._told_at, self._shift = killed_at, told_at, shift
        self.reports: list[dict[str, float]] = []
        self.taken: list[int] = []

    def units(self, first_step: int) -> Iterator[Unit]:
        step = first_step
        while True:
            if step == self._killed_at:
                raise KeyboardInterrupt
            self.taken.append(step)
            yield Unit(step + self._shift, 0, [], {}, [step])
            step += 1

    def report(self, metrics: Mapping[str, float]) -> None:
        self.reports.append(dict(metrics))

    def progress(self, step: int, steps: int, text: str) -> None:
        pass

    def notice(self) -> Notice:
        step, told = self._told_at
        return told if self.taken[-1] + 1 == step else Notice.NONE


POISONED: set[int] = set()


def descend(centre: MarginCentre, engine: Engine, unit: Unit, rate: float) -> StepResult:
    """One step of a quadratic whose minimum depends on all steps so far: order, optimiser and centre matter."""
    target = centre.update(float(unit.rows[0]))
    loss = sum((p - target).square().sum() for p in engine.module.parameters())
    assert isinstance(loss, Tensor)
    engine.backward(loss * (math.nan if unit.rows[0] in POISONED else 1.0), last=True)
    norm = engine.step(rate)
    bad = () if math.isfinite(norm) else (unit.rows[0],)
    return StepResult({"loss": loss.item()}, 1, bool(bad), bad)


def best_weights(folder: Path) -> dict[str, Tensor]:
    """What the newest checkpoint below a folder says the best weights are."""
    store = CheckpointStore(LocalFileSystem(), str(folder / "checkpoint"))
    saved = store.newest()
    assert saved is not None
    assert saved.best is not None
    return load_file(folder / "checkpoint" / saved.best)


def run(
    folder: Path, scores: list[float], plan: Plan, *, surroundings: Surroundings | None = None
) -> tuple[Progress, PlainEngine, MetricsLog]:
    torch.manual_seed(0)
    engine = PlainEngine(nn.Linear(2, 2), weight_decay=0.1, clip_norm=1.0)
    log = MetricsLog(folder / "log")
    context = surroundings or Surroundings(folder / "checkpoint")
    seen = len([line for line in log.lines() if line["kind"] == "validation"])
    waiting = iter(scores[seen:])
    centre = MarginCentre()
    progress = fit(engine, context, plan, partial(descend, centre), lambda _: {"ndcg@10": next(waiting)}, log, centre)
    return progress, engine, log


def plan_of(**settings: Any) -> Plan:
    given = {"steps": 12, "validate_every": 3, "patience": None, "learning_rate": 0.1}
    return Plan(**(given | {"warmup_fraction": 0.1, "final_fraction": 0.1} | settings))


def test_the_best_weights_are_kept_and_the_last_are_trained_on(tmp_path: Path) -> None:
    progress, engine, log = run(tmp_path, [0.1, 0.3, 0.5, 0.2, 0.4], plan_of())
    assert (progress.step, progress.best_step, progress.best) == (12, 6, 0.5)
    best = best_weights(tmp_path)
    now = engine.whole_weights()
    assert not torch.equal(best["weight"], now["weight"])
    assert [line["step"] for line in log.lines() if line["kind"] == "validation"] == [0, 3, 6, 9, 12]


def test_training_that_only_harms_leaves_the_weights_it_was_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = nn.Linear(2, 2).state_dict()
    progress, _, _ = run(tmp_path, [0.9, 0.1, 0.1, 0.1, 0.1], plan_of())
    best = best_weights(tmp_path)
    assert progress.best_step == 0
    assert torch.equal(best["weight"], start["weight"])


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    progress, _, _ = run(tmp_path, [0.1, 0.5, 0.4, 0.5, 0.9], plan_of(patience=2))
    assert (progress.step, progress.best_step) == (9, 3)


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_its_log_again(tmp_path: Path) -> None:
    left = MetricsLog(tmp_path / "log")
    left.write("validation", 0, {"ndcg@10": 0.9})
    log = MetricsLog(tmp_path / "log")
    engine = PlainEngine(nn.Linear(2, 2), weight_decay=0.0, clip_norm=1.0)
    scores, context = iter([0.1, 0.2]), Surroundings(tmp_path / "checkpoint")
    centre = MarginCentre()
    fit(engine, context, plan_of(steps=3), partial(descend, centre), lambda _: {"ndcg@10": next(scores)}, log, centre)
    told = [(line["step"], line["ndcg@10"]) for line in log.lines() if line["kind"] == "validation"]
    assert told == [(0, 0.1), (3, 0.2)]


def test_the_clock_ends_a_run_at_a_validation(tmp_path: Path) -> None:
    progress, _, _ = run(tmp_path, [0.1] * 9, plan_of(clock_limit_s=1e-9))
    assert progress.step == 3


TIMES = ("seconds", "tokens_per_s", "data_wait_share")


def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    scores = [0.1, 0.3, 0.5, 0.2, 0.4]
    whole, engine, log = run(tmp_path / "whole", scores, plan_of())
    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run(folder, scores, plan_of(), surroundings=Surroundings(folder / "checkpoint", killed_at=8))
    again, resumed, log_again = run(folder, scores, plan_of())
    assert (again.step, again.best_step, again.best) == (whole.step, whole.best_step, whole.best)
    for name, tensor in engine.whole_weights().items():
        assert torch.equal(tensor, resumed.whole_weights()[name])

    def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]

    assert without_times(log_again.lines()) == without_times(log.lines())
    assert torch.equal(*(best_weights(path)["weight"] for path in (tmp_path / "whole", folder)))


def test_a_run_in_parts_is_the_run_in_one_go(tmp_path: Path) -> None:
    scores = [0.1, 0.3, 0.5, 0.2, 0.4]
    whole, engine, log = run(tmp_path / "whole", scores, plan_of())
    ends = []
    for until in (6, 9, 12, 15):  # the rate's schedule is that of all steps; past the end nothing is left to do
        progress, parted, log_parted = run(tmp_path / "parts", scores, plan_of(until=until))
        ends.append(progress.step)
    assert ends == [6, 9, 12, 12]
    assert (progress.best, progress.best_step) == (whole.best, whole.best_step)
    assert torch.equal(engine.whole_weights()["weight"], parted.whole_weights()["weight"])
    assert [line["step"] for line in log_parted.lines()] == [line["step"] for line in log.lines()]


@pytest.mark.parametrize("stops", [[1], [4], [8, 11], [2, 3, 5, 7]])
def test_each_row_is_read_once_however_often_a_run_is_killed(tmp_path: Path, stops: list[int]) -> None:
    scores = [0.1, 0.3, 0.5, 0.2, 0.4]
    _, engine, log = run(tmp_path / "whole", scores, plan_of())
    folder = tmp_path / "cut"
    for step in stops:
        killed = Surroundings(folder / "checkpoint", killed_at=step, checkpoint_every_s=0.0)
        with pytest.raises(KeyboardInterrupt):
            run(folder, scores, plan_of(), surroundings=killed)
    last = Surroundings(folder / "checkpoint")
    _, resumed, log_again = run(folder, scores, plan_of(), surroundings=last)
    assert last.taken[0] >= stops[-1] - 2  # the checkpoint of a step or two before was whole
    digests = [[line["rows"] for line in each.lines() if line["kind"] == "train"] for each in (log, log_again)]
    assert [line["step"] for line in log_again.lines() if line["kind"] == "validation"] == [0, 3, 6, 9, 12]
    assert digests[0] == digests[1] == [digest([step]) for step in range(12)]
    assert torch.equal(engine.whole_weights()["weight"], resumed.whole_weights()["weight"])


@pytest.mark.parametrize(("notice", "error"), [(Notice.MACHINE, MachineLeavingError), (Notice.RUN, StopRequestedError)])
def test_with_notice_nothing_that_was_done_is_lost(tmp_path: Path, notice: Notice, error: type[RecrayError]) -> None:
    scores = [0.1, 0.3, 0.5, 0.2, 0.4]
    told = Surroundings(tmp_path / "checkpoint", told_at=(5, notice))
    with pytest.raises(error, match="the checkpoint of step 5 is written"):
        run(tmp_path, scores, plan_of(), surroundings=told)
    after = Surroundings(tmp_path / "checkpoint")
    progress, _, _ = run(tmp_path, scores, plan_of(), surroundings=after)
    assert after.taken[0] == 5
    assert progress.step == 12


def test_notice_at_a_validation_step_leaves_the_validation_to_the_next_run(tmp_path: Path) -> None:
    told = Surroundings(tmp_path / "checkpoint", told_at=(6, Notice.RUN))
    scores = [0.1, 0.3, 0.5, 0.2, 0.4]
    with pytest.raises(StopRequestedError):
        run(tmp_path, scores, plan_of(), surroundings=told)
    progress, _, log = run(tmp_path, scores, plan_of())
    assert [line["step"] for line in log.lines() if line["kind"] == "validation"] == [0, 3, 6, 9, 12]
    assert progress.best_step == 6


def test_steps_that_are_not_finite_are_skipped_counted_and_in_the_end_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(globals(), "POISONED", {4, 7})
    progress, engine, _ = run(tmp_path / "few", [0.1] * 5, plan_of())
    assert progress.skipped == 2
    assert all(weight.isfinite().all() for weight in engine.whole_weights().values())
    assert "step 5 is skipped: loss or gradient not finite, rows 4" in caplog.text
    with pytest.raises(DivergenceError, match="not finite in 2 steps, 1 are allowed.*step 8, because of rows 7"):
        run(tmp_path / "strict", [0.1] * 5, plan_of(most_skipped=1))


def test_a_unit_of_another_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecrayError, match="was fed the unit of rank 0, step 1"):
        run(tmp_path, [0.1] * 9, plan_of(), surroundings=Surroundings(tmp_path / "checkpoint", shift=1))
