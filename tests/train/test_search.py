"""A search without Ray: what is proposed, what ends early, and that a stop anywhere costs nothing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from recray.space import Point, Range
from recray.train.proposals import Proposals, RandomPoints, TpePoints
from recray.train.search import DONE, FAILED, POPULARITY, RANKING, RUNNING, STOPPED, Halving, Search, Trial, points_of

SPACE = {"margin": Range(uniform=(0.0, 2.0)), "number": Range(choice=(1, 3, 7)), "rate": Range(loguniform=(1e-5, 1e-2))}
ONE, TWO = ["maximize"], ["maximize", "minimize"]


def proposals(kind: str, points: int = 12, seed: int = 5) -> Proposals:
    return RandomPoints(SPACE, seed) if kind == "random" else TpePoints(SPACE, seed, ONE, points)


def quality(point: Point) -> float:
    return 1.0 - (float(point["margin"]) - 1.2) ** 2


class Kept(dict[int, dict[str, Any]]):
    """What a search has written down."""

    def write(self, number: int, trial: dict[str, Any]) -> None:
        self[number] = trial


def search_of(kept: Kept, kind: str = "optuna", *, seeds: int = 1, halving: Halving | None = None) -> Search:
    return Search(
        proposals(kind),
        goals=[RANKING],
        points=12,
        seeds=seeds,
        first_seed=3,
        halving=halving,
        write=kept.write,
        kept=list(kept.values()),
    )


def look(step: int, ranking: float, popularity: float = 1.0) -> dict[str, float]:
    return {"step": float(step), RANKING: ranking, POPULARITY: popularity}


def run_on(search: Search, trials: int) -> list[int]:
    """Run so many trials, one after the other; return their numbers."""
    ran = []
    for _ in range(trials):
        trial = search.next()
        assert trial is not None
        ran.append(trial.number)
        search.done(trial.number, [look(0, 0.0), look(20, quality(trial.settings))], {"seconds": 1.0})
    return ran


@pytest.mark.parametrize("kind", ["random", "optuna"])
@pytest.mark.parametrize("stopped_after", [1, 5, 11])
def test_a_search_that_was_stopped_goes_on_as_one_that_was_not(kind: str, stopped_after: int) -> None:
    whole = search_of(Kept(), kind)
    assert run_on(whole, 12) == list(range(12))
    assert whole.next() is None
    kept = Kept()
    first = search_of(kept, kind)
    run_on(first, stopped_after)
    out = first.next()  # is under way as the driver dies
    assert out is not None
    again = search_of(kept, kind)
    assert again.left == 12 - stopped_after
    assert again.ended_before == stopped_after
    assert run_on(again, 12 - stopped_after) == list(range(stopped_after, 12))  # what was done is not done again
    assert again.next() is None
    assert [again.trials[n].settings for n in range(12)] == [whole.trials[n].settings for n in range(12)]
    assert again.left == 0


def test_trials_side_by_side_are_handed_out_once_and_those_of_a_dead_driver_first() -> None:
    kept = Kept()
    first = search_of(kept, seeds=2)
    handed = [first.next() for _ in range(5)]
    assert [(t.number, t.point, t.seed) for t in handed if t] == [(0, 0, 3), (1, 0, 4), (2, 1, 3), (3, 1, 4), (4, 2, 3)]
    assert handed[0].settings == handed[1].settings  # type: ignore[union-attr]
    first.done(3, [look(0, 0.5)], {})
    again = search_of(kept, seeds=2)
    assert [trial.number for trial in (again.next() for _ in range(5)) if trial] == [0, 1, 2, 4, 5]
    assert again.trials[2].settings == handed[2].settings  # type: ignore[union-attr]


def test_a_random_draw_depends_on_its_number_alone() -> None:
    drawn = RandomPoints(SPACE, 3)
    assert [drawn.ask(number) for number in range(4)] == [RandomPoints(SPACE, 3).ask(number) for number in range(4)]
    assert RandomPoints(SPACE, 4).ask(0) != RandomPoints(SPACE, 3).ask(0)


def test_random_draws_repeat_no_point_while_there_are_others() -> None:
    drawn = RandomPoints({"a": Range(choice=(1, 2)), "b": Range(choice=("x", "y", "z"))}, 0)
    points = [tuple(drawn.ask(number).items()) for number in range(6)]
    assert len(set(points)) == 6
    assert drawn.ask(6) is not None  # there is none left; one comes again


def test_tpe_finds_better_points_than_chance_does() -> None:
    found = {}
    for kind in ("random", "optuna"):
        best = []
        for seed in range(5):
            asked = proposals(kind, 40, seed)
            values = []
            for number in range(40):
                point = asked.ask(number)
                values.append(quality(point))
                asked.tell(number, [values[-1]])
            best.append(np.mean(values[20:]))
        found[kind] = np.mean(best)
    assert found["optuna"] > found["random"] + 0.1


def test_tpe_takes_two_goals_and_points_that_failed() -> None:
    asked = TpePoints(SPACE, 0, TWO, 6)
    for number in range(6):
        point = asked.ask(number)
        assert 0 <= float(point["margin"]) <= 2
        asked.tell(number, None if number == 2 else [quality(point), float(point["margin"])])


def test_a_point_is_told_once_all_its_runs_have_ended_as_the_mean_of_those_that_did_not_fail() -> None:
    told: list[tuple[int, Any]] = []

    class Listening(RandomPoints):
        def tell(self, number: int, values: Any) -> None:
            told.append((number, values))

    search = Search(
        Listening(SPACE, 0),
        goals=[RANKING, POPULARITY],
        points=2,
        seeds=2,
        first_seed=0,
        halving=None,
        write=Kept().write,
    )
    for _ in range(4):
        search.next()
    search.done(0, [look(0, 0.2, 9.0), look(20, 0.4, 7.0), look(40, 0.3, 5.0)], {})
    assert told == []
    search.done(1, [look(0, 0.6, 3.0)], {})
    assert told == [(0, [pytest.approx(0.5), pytest.approx(5.0)])]
    search.failed(2, "out of memory")
    search.failed(3, "out of memory")
    assert told[1] == (1, None)
    assert [search.trials[n].state for n in range(4)] == [DONE, DONE, FAILED, FAILED]


def test_halving_lets_the_best_third_of_a_rung_go_on() -> None:
    halving = Halving(10, 3, 90)
    assert halving.rungs == [10, 30]
    went_on = [
        halving.goes_on(n, [look(0, 0.0), look(10, value)]) for n, value in enumerate([0.5, 0.4, 0.6, 0.55, 0.1])
    ]
    # The first always, a better one always; of four and five still only one, of six two.
    assert went_on == [True, False, True, False, False]
    assert halving.goes_on(5, [look(0, 0.0), look(10, 0.58)])
    assert halving.goes_on(2, [look(0, 0.0), look(10, 0.6), look(20, 0.1)])  # between rungs nobody is asked
    assert halving.goes_on(2, [look(0, 0.0), look(10, 0.6), look(30, 0.1)])  # its best counts, and it is the first here
    assert not halving.goes_on(5, [look(0, 0.0), look(10, 0.58), look(30, 0.59)])


def test_what_ended_early_is_known_after_a_stop() -> None:
    kept = Kept()
    first = search_of(kept, halving=Halving(10, 3, 90))
    for _ in range(3):
        first.next()
    assert first.looked(0, look(10, 0.5), {})
    assert not first.looked(1, look(10, 0.4), {"seconds": 2.0})
    assert not first.looked(1, look(20, 0.9), {})  # it has ended, whatever comes in late
    again = search_of(kept, halving=Halving(10, 3, 90))
    assert again.trials[1].state == STOPPED
    assert again.trials[1].curve == [look(10, 0.4)]
    assert again.trials[1].costs == {"seconds": 2.0}
    assert again.trials[0].state == again.trials[2].state == RUNNING
    again.next()
    assert not again.looked(2, look(10, 0.45), {})  # behind one that an earlier process saw
    assert again.looked(0, look(10, 0.5), {})  # made again after the stop: nothing new
    assert again.trials[0].curve == [look(10, 0.5)]


def trial(number: int, point: int, state: str, *looks: Mapping[str, float]) -> Trial:
    return Trial(number, point, {"margin": 0.1 * point}, number, state, [dict(each) for each in looks])


def test_points_by_what_came_out_and_the_front_among_whole_ones() -> None:
    lines = points_of(
        [
            trial(0, 0, DONE, look(0, 0.2), look(20, 0.40, 50.0)),
            trial(1, 0, DONE, look(0, 0.2), look(20, 0.44, 30.0)),
            trial(2, 1, DONE, look(20, 0.30, 10.0)),
            trial(3, 1, DONE, look(20, 0.30, 10.0)),
            trial(4, 2, DONE, look(20, 0.35, 45.0)),
            trial(5, 2, DONE, look(20, 0.35, 45.0)),
            trial(6, 3, DONE, look(20, 0.60, 5.0)),
            trial(7, 3, STOPPED, look(20, 0.60, 5.0)),  # would be best of all, but was judged after fewer steps
            trial(8, 4, FAILED),
            trial(9, 4, FAILED),
        ]
    )
    assert [line["point"] for line in lines] == [0, 2, 1, 3, 4]
    best = lines[0]
    assert (best[RANKING], best[POPULARITY]) == (pytest.approx(0.42), pytest.approx(40.0))
    assert best["between_seeds"] == pytest.approx(np.std([0.40, 0.44], ddof=1))
    assert [line["point"] for line in lines if line["on_front"]] == [0, 1]
    assert [line["whole"] for line in lines] == [True, True, True, False, False]
    assert lines[-1][RANKING] is None
    assert [line["start"] for line in lines] == [pytest.approx(0.2), None, None, None, None]


def test_where_no_point_is_whole_what_ended_early_counts() -> None:
    lines = points_of([trial(0, 0, STOPPED, look(20, 0.1, 2.0)), trial(1, 1, STOPPED, look(20, 0.3, 2.0))])
    assert [(line["point"], line["on_front"]) for line in lines] == [(1, True), (0, False)]
