"""Which point of a space a search tries next."""

import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from recray.space import Point, Range, Space

REDRAWS = 100  # to find a point that was not tried yet, where a space has few
SEEDS_APART = 100_003  # of points' samplers, so that neighbouring seeds of a search share none


@runtime_checkable
class Proposals(Protocol):
    """Proposes points, by number from 0, and learns how they went."""

    def ask(self, number: int) -> Point:
        """Return the point of this number: the same if the same is known of all before it."""

    def seen(self, number: int, point: Point) -> None:
        """Take note of a point that was proposed before, by an earlier process."""

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Take note of how a point went, a value a goal; None if it failed."""


class RandomPoints:
    """Uniform draws, each from (seed, number), without one that was drawn before if there are others.

    Args:
        space: What is drawn from.
        seed: Of all draws.
    """

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._seed = space, seed
        self._tried: list[Point] = []

    def ask(self, number: int) -> Point:
        point: Point = {}
        for attempt in range(REDRAWS):
            rng = np.random.default_rng([self._seed, number, attempt])
            point = {name: found.at(float(rng.random())) for name, found in self._space.items()}
            if point not in self._tried:
                break
        self._tried.append(point)
        return point

    def seen(self, number: int, point: Point) -> None:  # noqa: ARG002 - that it was tried is all that counts
        self._tried.append(point)

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        """Learn nothing: draws do not depend on results."""


class TpePoints:
    """Optuna's tree-structured Parzen estimator, for one goal or several.

    The sampler is made anew for each point, seeded by its number: what is proposed depends on the points and results
    that are known, not on how often the process was started.

    Args:
        space: What is searched.
        seed: Of all proposals.
        directions: "maximize" or "minimize" for each goal.
        points: How many there will be; the first third are drawn at random, ten at most.
    """

    def __init__(self, space: Space, seed: int, directions: Sequence[str], points: int) -> None:
        import optuna  # takes a second, which a random search need not wait

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna: Any = optuna
        self._distributions = {name: self._distribution(found) for name, found in space.items()}
        self._seed, self._startup = seed, min(10, max(2, math.ceil(points / 3)))
        self._study = optuna.create_study(directions=list(directions))
        self._numbers: dict[int, int] = {}  # Optuna's own, of each point

    def ask(self, number: int) -> Point:
        self._study.sampler = self._optuna.samplers.TPESampler(
            seed=self._seed * SEEDS_APART + number, n_startup_trials=self._startup, constant_liar=True
        )
        trial = self._study.ask(self._distributions)
        self._numbers[number] = trial.number
        return dict(trial.params)

    def seen(self, number: int, point: Point) -> None:
        running = self._optuna.trial.TrialState.RUNNING
        self._numbers[number] = len(self._study.get_trials(deepcopy=False))
        self._study.add_trial(
            self._optuna.trial.create_trial(state=running, params=dict(point), distributions=self._distributions)
        )

    def tell(self, number: int, values: Sequence[float] | None) -> None:
        failed = self._optuna.trial.TrialState.FAIL if values is None else None
        self._study.tell(self._numbers[number], None if values is None else list(values), state=failed)

    def _distribution(self, found: Range) -> Any:
        kinds = self._optuna.distributions
        if found.choice is not None:
            return kinds.CategoricalDistribution(found.choice)
        if found.int is not None:
            return kinds.IntDistribution(*found.int)
        low, high = found.loguniform or found.uniform or (0.0, 0.0)
        return kinds.FloatDistribution(low, high, log=found.loguniform is not None)
