"""The loop without Ray: the best weights, patience, the clock, the stamp of units, and interruption."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recray.errors import RecrayError
from recray.train.engine import Engine, PlainEngine
from recray.train.log import MetricsLog
from recray.train.loop import BEST, Plan, Progress, fit
from recray.train.step import MarginCentre, StepResult
from recray.train.units import Unit


class Surroundings:
    """A group of one that keeps its last checkpoint in a folder, and may be killed at a step."""

    rank = 0

    def __init__(self, folder: Path, *, killed_at: int | None = None, shift: int = 0) -> None:
        self._folder, self._killed_at, self._shift = folder, killed_at, shift
        self.reports: list[dict[str, float]] = []

    def resume_folder(self) -> Path | None:
        return self._folder if (self._folder / "progress.json").exists() else None

    def units(self, first_step: int) -> Iterator[Unit]:
        step = first_step
        while True:
            if step == self._killed_at:
                raise KeyboardInterrupt
            yield Unit(step + self._shift, 0, [], {}, [step])
            step += 1

    def report(self, metrics: Mapping[str, float], folder: Path) -> None:
        self.reports.append(dict(metrics))
        self._folder.mkdir(exist_ok=True)
        for file in folder.iterdir():
            (self._folder / file.name).write_bytes(file.read_bytes())

    def progress(self, step: int, steps: int, text: str) -> None:
        pass


def descend(engine: Engine, unit: Unit, rate: float) -> StepResult:
    """One step of a quadratic with a minimum that depends on the step: order and optimiser state matter."""
    target = float(unit.rows[0])
    loss = sum((p - target).square().sum() for p in engine.module.parameters())
    assert isinstance(loss, Tensor)
    engine.backward(loss, last=True)
    engine.step(rate)
    return StepResult({"loss": loss.item()}, 1)


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
    progress = fit(engine, context, plan, descend, lambda: {"ndcg@10": next(waiting)}, log, centre)
    return progress, engine, log


def plan_of(**settings: Any) -> Plan:
    given = {"steps": 12, "validate_every": 3, "patience": None, "learning_rate": 0.1}
    return Plan(**(given | {"warmup_fraction": 0.1, "final_fraction": 0.1} | settings))


def test_the_best_weights_are_kept_and_the_last_are_trained_on(tmp_path: Path) -> None:
    progress, engine, log = run(tmp_path, [0.1, 0.3, 0.5, 0.2, 0.4], plan_of())
    assert (progress.step, progress.best_step, progress.best) == (12, 6, 0.5)
    best = load_file(tmp_path / "checkpoint" / BEST)
    now = engine.whole_weights()
    assert not torch.equal(best["weight"], now["weight"])
    assert [line["step"] for line in log.lines() if line["kind"] == "validation"] == [0, 3, 6, 9, 12]


def test_training_that_only_harms_leaves_the_weights_it_was_given(tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = nn.Linear(2, 2).state_dict()
    progress, _, _ = run(tmp_path, [0.9, 0.1, 0.1, 0.1, 0.1], plan_of())
    best = load_file(tmp_path / "checkpoint" / BEST)
    assert progress.best_step == 0
    assert torch.equal(best["weight"], start["weight"])


def test_patience_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    progress, _, _ = run(tmp_path, [0.1, 0.5, 0.4, 0.5, 0.9], plan_of(patience=2))
    assert (progress.step, progress.best_step) == (9, 3)


def test_the_clock_ends_a_run_at_a_validation(tmp_path: Path) -> None:
    progress, _, _ = run(tmp_path, [0.1] * 9, plan_of(clock_limit_s=1e-9))
    assert progress.step == 3


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
        return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "data_wait_share")} for line in lines]

    assert without_times(log_again.lines()) == without_times(log.lines())
    best = [load_file(path / "checkpoint" / BEST)["weight"] for path in (tmp_path / "whole", folder)]
    assert torch.equal(*best)


def test_a_unit_of_another_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecrayError, match="was fed the unit of rank 0, step 1"):
        run(tmp_path, [0.1] * 9, plan_of(), surroundings=Surroundings(tmp_path / "checkpoint", shift=1))
