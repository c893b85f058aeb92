"""A search as plain bookkeeping: which run comes next, which ends early, what came out. It can be stopped anywhere.

A *point* is a value of each setting; a *trial* is one run of it, with one seed. A trial is written down when it is
handed out, whenever it is validated and when it ends, and a search that starts from what is written goes on with the
trials that have not ended: a trial that has ended is never handed out again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from recray.ranking.pareto import front
from recray.space import Point
from recray.train.proposals import Proposals

RANKING, POPULARITY = "ndcg@10", "popularity@10"  # on validation rows
DIRECTIONS = {RANKING: "maximize", POPULARITY: "minimize"}
START = "start"
RUNNING, DONE, STOPPED, FAILED = "running", "done", "stopped", "failed"

Look = Mapping[str, float]  # one validation: `step` and a value a goal


@dataclass
class Trial:
    """One run of a point: what is written down of it."""

    number: int
    point: int
    settings: Point
    seed: int
    state: str = RUNNING
    curve: list[dict[str, float]] = field(default_factory=list)  # by step
    costs: dict[str, float] = field(default_factory=dict)  # seconds and steps
    error: str | None = None

    @property
    def best(self) -> dict[str, float] | None:
        """The validation with the best ranking, the first of equal ones; None before any."""
        return max(self.curve, key=lambda look: look[RANKING]) if self.curve else None

    def look(self, look: Look) -> None:
        """Take note of a validation; one of the same step is replaced, as it was made again after a stop."""
        kept = [each for each in self.curve if each["step"] != look["step"]]
        self.curve = sorted([*kept, dict(look)], key=lambda each: each["step"])


class Halving:
    """Early stopping by successive halving without waiting (ASHA): at a rung, one in `reduction` goes on.

    A run goes on if fewer than max(1, n // reduction) of the n that have reached the rung, it included, are better:
    the first always does, and the best always does.

    Args:
        first: Step of the first rung; each next one is `reduction` times the one before.
        reduction: At least 2.
        steps: Of a whole run: no rung there.

    Source: Li et al. 2018, 1810.05934, the stopping variant.
    """

    def __init__(self, first: int, reduction: int, steps: int) -> None:
        self._reduction = reduction
        self.rungs: list[int] = []
        while first < steps:
            self.rungs.append(first)
            first *= reduction
        self._reached: dict[int, dict[int, float]] = {rung: {} for rung in self.rungs}

    def goes_on(self, number: int, curve: Sequence[Look]) -> bool:
        """Take note of how far a run is, and return whether it is worth going on with."""
        good = True
        for rung in self.rungs:
            reached = self._reached[rung]
            if number in reached or not curve or curve[-1]["step"] < rung:
                continue
            own = max(look[RANKING] for look in [look for look in curve if look["step"] <= rung] or curve[:1])
            reached[number] = own
            better = sum(value > own for value in reached.values())
            good = good and better < max(1, len(reached) // self._reduction)
        return good


class Search:
    """What is tried next, what is known, and what has ended.

    Args:
        proposals: Where points come from.
        goals: Names of `DIRECTIONS` that proposals are told of, in their order.
        points: How many are tried.
        seeds: Runs of each: `first_seed` and those after it.
        first_seed: Of the first run of a point.
        halving: Ends runs early; None: nobody does.
        write: Keeps a trial, by its number, in place of what was kept of it.
        kept: What was written before.
    """

    def __init__(
        self,
        proposals: Proposals,
        *,
        goals: Sequence[str],
        points: int,
        seeds: int,
        first_seed: int,
        halving: Halving | None,
        write: Callable[[int, dict[str, Any]], None],
        kept: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self._proposals, self._goals, self._halving, self._write = proposals, goals, halving, write
        self._points, self._seeds, self._first_seed = points, seeds, first_seed
        self._settings: list[Point] = []
        self.trials: dict[int, Trial] = {}
        self._out: set[int] = set()  # handed out by this process
        self._go_on(sorted((Trial(**each) for each in kept), key=lambda trial: trial.number))
        self.ended_before = sum(trial.state != RUNNING for trial in self.trials.values())

    @property
    def left(self) -> int:
        """How many trials have not ended."""
        return self._points * self._seeds - sum(trial.state != RUNNING for trial in self.trials.values())

    def next(self) -> Trial | None:
        """Hand out a trial: one that was interrupted, else the next seed or a new point; None if there is none left."""
        for number in range(self._points * self._seeds):
            known = self.trials.get(number)
            if number in self._out or (known is not None and known.state != RUNNING):
                continue
            trial = known or self._new(number)
            self._out.add(number)
            self._keep(trial)
            return trial
        return None

    def looked(self, number: int, look: Look, costs: Mapping[str, float]) -> bool:
        """Take note of a validation and what the trial took so far, and return whether it goes on."""
        trial = self.trials[number]
        if trial.state != RUNNING:
            return False
        trial.look(look)
        trial.costs = dict(costs)
        good = self._halving is None or self._halving.goes_on(number, trial.curve)
        if not good:
            self._end(trial, STOPPED)
        else:
            self._keep(trial)
        return good

    def done(self, number: int, curve: Sequence[Look], costs: Mapping[str, float]) -> None:
        """Take note that a trial has ended as planned, with all its validations."""
        trial = self.trials[number]
        trial.costs = dict(costs)
        for look in curve:
            trial.look(look)
        self._end(trial, DONE)

    def failed(self, number: int, error: str) -> None:
        """Take note that a trial came to nothing."""
        trial = self.trials[number]
        trial.error = error
        self._end(trial, FAILED)

    def _new(self, number: int) -> Trial:
        point, place = divmod(number, self._seeds)
        if point == len(self._settings):
            self._settings.append(self._proposals.ask(point))
        self.trials[number] = Trial(number, point, self._settings[point], self._first_seed + place)
        return self.trials[number]

    def _end(self, trial: Trial, state: str) -> None:
        if trial.state != RUNNING:
            return
        trial.state = state
        self._keep(trial)
        self._tell(trial.point)

    def _tell(self, point: int) -> None:
        """Tell how a point went once all its trials have ended."""
        own = [trial for trial in self.trials.values() if trial.point == point]
        if len(own) == self._seeds and all(trial.state != RUNNING for trial in own):
            found = mean_of(own)
            self._proposals.tell(point, None if found is None else [found[goal] for goal in self._goals])

    def _keep(self, trial: Trial) -> None:
        self._write(trial.number, asdict(trial))

    def _go_on(self, kept: Sequence[Trial]) -> None:
        for trial in kept:
            self.trials[trial.number] = trial
            if trial.point == len(self._settings):
                self._settings.append(trial.settings)
                self._proposals.seen(trial.point, trial.settings)
            if self._halving is not None:
                self._halving.goes_on(trial.number, trial.curve)
        for point in range(len(self._settings)):
            self._tell(point)


def mean_of(trials: Iterable[Trial]) -> dict[str, float] | None:
    """Return the mean over trials of each goal at their best validations, failed ones left out; None without any."""
    best = [trial.best for trial in trials if trial.state != FAILED]
    found = [look for look in best if look is not None]
    return {goal: float(np.mean([look[goal] for look in found])) for goal in DIRECTIONS} if found else None


def points_of(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Return a line a point, the best first: means over seeds, what became of its trials, whether it is on the front.

    `start` is the ranking before the first step, None where that was not looked at.
    `whole` points are those whose trials all ran to their end. They come first, and among them alone is the front
    looked for: what was ended early was judged after fewer steps. Where no point is whole, all that are judged count.
    """
    of: dict[int, list[Trial]] = {}
    for trial in trials:
        of.setdefault(trial.point, []).append(trial)
    lines = [_line(point, own) for point, own in sorted(of.items())]
    judged = [line for line in lines if line[RANKING] is not None]
    counting = [line for line in judged if line["whole"]] or judged
    if counting:
        values = np.array([[line[RANKING], -line[POPULARITY]] for line in counting])
        for line, on in zip(counting, front(values).tolist(), strict=True):
            line["on_front"] = on
    places = {line["point"] for line in counting}
    return sorted(lines, key=lambda line: (line["point"] not in places, line[RANKING] is None, -(line[RANKING] or 0.0)))


def _line(point: int, own: Sequence[Trial]) -> dict[str, Any]:
    found = mean_of(own)
    ranking = [look[RANKING] for trial in own if trial.state != FAILED and (look := trial.best) is not None]
    states = [trial.state for trial in own]
    before = [look[RANKING] for trial in own for look in trial.curve if look["step"] == 0]
    return {
        "point": point,
        "settings": dict(own[0].settings),
        START: float(np.mean(before)) if before else None,
        RANKING: None if found is None else found[RANKING],
        POPULARITY: None if found is None else found[POPULARITY],
        "between_seeds": float(np.std(ranking, ddof=1)) if len(ranking) > 1 else None,
        "runs": len(own),
        "stopped": states.count(STOPPED),
        "failed": states.count(FAILED),
        "whole": states.count(DONE) == len(own),
        "on_front": False,
        "seconds": sum(trial.costs.get("seconds", 0.0) for trial in own),
        "errors": [trial.error for trial in own if trial.error is not None],
    }
