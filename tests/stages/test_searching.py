"""What a search asks of a cluster, and the feed of a fit that is alone; without Ray."""

import numpy as np
import pytest

from recray.config import Align, Resources, Tune
from recray.errors import ConfigError, DataError
from recray.lm.layout import stream_layout
from recray.space import Range
from recray.stages.alone import processes_at_once, units_ahead
from recray.stages.searching import (
    Driver,
    Trials,
    lacking,
    refuse_missing_trackers,
    trials_at_once,
)
from recray.train.proposals import RandomPoints
from recray.train.search import DONE, FAILED, POPULARITY, RANKING, RUNNING, STOPPED, Halving, Search
from recray.train.units import MicroBatch, Unit
from recray.workspace import Workspace


def trials(resources: Resources, *, alone: bool) -> Trials:
    return Trials(Workspace("/nowhere"), Align(), "examples", "tune", resources, 0, alone=alone, board=None)


def test_what_a_trial_needs_is_what_it_holds() -> None:
    small = Resources(num_workers=2, cpus_per_worker=0.5, threads_per_worker=4)
    assert trials(small, alone=False).needs == {"CPU": pytest.approx(1.3)}  # workers, feed and driver
    assert trials(small, alone=True).needs == {"CPU": 4.0}  # it computes there, with four threads
    fast = small.model_copy(update={"gpus_per_worker": 1.0})
    assert trials(fast, alone=False).needs["GPU"] == 2.0
    assert trials(fast, alone=True).needs == {"CPU": 0.5, "GPU": 1.0}  # one process, one GPU


def test_trials_leave_a_cpu_to_the_data() -> None:
    needs = trials(Resources(), alone=False).needs  # 0.5 + 0.25 + 0.05
    assert trials_at_once(needs, {"CPU": 2.0}) == 1
    assert trials_at_once(needs, {"CPU": 9.1}) == 10
    assert trials_at_once({**needs, "GPU": 1.0}, {"CPU": 64.0, "GPU": 3.0}) == 3
    assert trials_at_once({**needs, "GPU": 1.0}, {"CPU": 64.0}) == 1  # it waits, and says for what


def test_a_trial_of_one_process_lies_whole_on_a_node() -> None:
    assert processes_at_once({"CPU": 2.0}, [{"CPU": 3.0}, {"CPU": 4.0}]) == 3
    assert processes_at_once({"CPU": 1.0, "GPU": 1.0}, [{"CPU": 16.0}, {"CPU": 16.0, "GPU": 2.0}]) == 2
    assert processes_at_once({"CPU": 8.0}, [{"CPU": 4.0}]) == 1


def test_what_a_waiting_trial_lacks_is_named() -> None:
    needs = {"CPU": 1.0, "GPU": 2.0}
    assert lacking(needs, {"CPU": 4.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 2.0}) == []
    assert lacking(needs, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}) == ["2 GPU are needed, 1 of 2 are free"]
    assert lacking(needs, {"CPU": 0.5}, {"CPU": 8.0}) == [
        "1 CPU is needed, 0.5 of 8 are free",
        "2 GPU are needed, 0 of 0 are free",
    ]


def test_a_tracker_that_is_not_installed_is_refused() -> None:
    with pytest.raises(ConfigError, match="asks for wandb, which is not installed here; run `pip install wandb`"):
        refuse_missing_trackers(Tune(trackers=("wandb",)))
    refuse_missing_trackers(Tune())


class Stamps:
    """A feed whose units say who they are for."""

    def __init__(self, world_size: int) -> None:
        assert world_size == 1

    def unit(self, step: int, rank: int) -> Unit:
        if step == 7:
            raise DataError("row 7 is faulty")
        layout = stream_layout(np.arange(2), np.array([2]))
        return Unit(step, rank, [MicroBatch(np.array([0]), layout)], {}, [step])


def test_units_come_in_order_and_none_beyond_the_last() -> None:
    assert [(unit.step, unit.rank) for unit in units_ahead(Stamps, 2, 7)] == [(step, 0) for step in range(2, 7)]
    assert list(units_ahead(Stamps, 4, 4)) == []
    first = units_ahead(Stamps, 0, 100)
    next(first)
    first.close()  # type: ignore[attr-defined]  # what is being made is waited for, and no thread is left


def test_what_the_feed_refuses_comes_out_where_it_is_read() -> None:
    with pytest.raises(DataError, match="row 7"):
        list(units_ahead(Stamps, 5, 9))


def driver(at_once: int, *, alone: bool = True) -> Driver:
    space = {"num_negatives": Range(choice=(1, 2, 3, 4))}
    search = Search(
        RandomPoints(space, 0),
        goals=[RANKING],
        points=4,
        seeds=1,
        first_seed=0,
        halving=Halving(10, 2, 40),
        write=lambda _number, _trial: None,
    )
    return Driver(search, trials(Resources(), alone=alone), at_once)


def look(step: int, ranking: float) -> dict[str, float]:
    return {"step": float(step), RANKING: ranking, POPULARITY: 1.0, "seconds": 5.0, "fit_seconds": 3.0}


def test_no_more_trials_are_handed_out_than_there_is_room_for() -> None:
    found = driver(2)
    handed = [found.next() for _ in range(3)]
    assert [each and each["number"] for each in handed] == [0, 1, None]
    found.running.discard(0)  # as Tune says when its process is free
    again = found.next()
    assert again is not None
    assert again["number"] == 2


def test_what_trials_report_is_taken_note_of() -> None:
    found = driver(4)
    for _ in range(4):
        found.next()
    assert found.heard(0, look(10, 0.5))
    assert not found.heard(1, look(10, 0.4))  # behind at the rung
    curve = [{"step": 0.0, RANKING: 0.2, POPULARITY: 1.0}, {"step": 40.0, RANKING: 0.6, POPULARITY: 1.0}]
    done = {"ended": "as planned", "curve": curve, "took/seconds": 9.0, "took/fit_seconds": 7.0}
    assert found.heard(0, done)
    assert found.heard(0, done)  # Tune shows the last one twice
    assert found.heard(2, {"ended": "refused", "error": "row 7 is faulty"})
    states = [(trial.state, trial.error) for trial in found.search.trials.values()]
    assert states == [(DONE, None), (STOPPED, None), (FAILED, "row 7 is faulty"), (RUNNING, None)]
    assert found.search.trials[0].costs == {"seconds": 9.0, "fit_seconds": 7.0}
    assert found.search.trials[1].costs == {"seconds": 5.0, "fit_seconds": 3.0}


def test_a_search_that_is_told_to_end_hands_out_nothing_and_keeps_what_is_under_way() -> None:
    found = driver(4)
    found.next()
    assert found.heard(0, {"ended": "told"})
    assert found.next() is None
    assert found.search.trials[0].state == RUNNING  # to go on with
    groups = driver(4, alone=False)
    groups.next()
    groups.told = True
    assert not groups.heard(0, look(10, 0.9))  # its workers do not hear of it by themselves
    assert groups.search.trials[0].state == RUNNING
