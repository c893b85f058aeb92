"""One global batch has one loss and one gradient, however it is cut; what is sent for it, and what stops it.

Each world size is one group of processes that takes all of its cuts, under every engine.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CUTS = {1: ("1x24", "1x4x6"), 2: ("2x12", "2x4x3"), 3: ("3x8", "ragged")}  # workers x rows x passes
ALL_CUTS = [cut for cuts in CUTS.values() for cut in cuts]
OBJECTIVES = ("napo", "sdpo", "dpo", "stream")  # stream: supervised fine-tuning
PLAIN_ONLY = ("batch", "normalised", "rodpo", "dynamicpo", "item")  # under the plain engine in float64
DEEPSPEED = ("z0", "z1", "z2", "z3")
NAIVE = {
    "n1:napo:1x4x6": "f32:napo:1x24",  # no boundary of accumulation, ZeRO 1
    "n1:napo:2x4x3": "f32:napo:1x24",
    "n2:napo:1x4x6": "f32:napo:1x24",
    "n2:napo:2x4x3": "f32:napo:1x24",
    "f64:detached:1x24": "f64:napo:1x24",  # no gradient through what is shared
    "naive:micro:2x4x3": "f64:all:1x24",  # only what one micro-batch holds is shared
    "naive:count:ragged": "f64:all:1x24",  # a mean of means over unequal micro-batches
}
POISONED = [*(f"poison:{engine}:2x4x3" for engine in ("f64", *DEEPSPEED)), "poison:f64:2x12", "poison:z3:2x12"]
SPOILT = [f"spoilt_stream:{engine}:2x4x3" for engine in ("f64", *DEEPSPEED)]
SENT = {"bytes:napo:2x12": [], "bytes:batch:2x4x3": [16], "bytes:napo:3x8": [], "bytes:napo:ragged": []}
ONE = [f"{engine}:{objective}:1x24" for engine in ("f64", "f32") for objective in (*OBJECTIVES, "all", "batch")]
TRAINED = [f"train:{engine}:{cut}" for engine in ("f32", *DEEPSPEED) for cut in ("2x12", "2x4x3")]
USERS, CANDIDATES, METRICS = 24, 4, 10


def tasks_of(world: int) -> list[str]:
    """What the group of this size is to do."""
    cuts = CUTS[world]
    every = [f"{engine}:{name}:{cut}" for engine in ("f64", *DEEPSPEED) for name in OBJECTIVES for cut in cuts]
    every += [f"f64:{name}:{cut}" for name in PLAIN_ONLY for cut in cuts]
    more = [
        *NAIVE,
        *SENT,
        *TRAINED,
        "train:f32:1x24",
        "train:f32:1x4x6",
        *POISONED,
        *SPOILT,
        *(ONE if world == 1 else ()),
    ]
    return list(dict.fromkeys([*every, *(task for task in more if task.endswith(cuts))]))


@pytest.fixture(scope="module")
def results(folder: Path, run_group: Callable[[str, int, list[str]], None]) -> Callable[[str], dict[str, Any]]:
    """Runs all groups; returns what reads a task's file."""
    for world in CUTS:
        run_group("grid_worker.py", world, tasks_of(world))

    def read(stem: str) -> dict[str, Any]:
        with np.load(folder / f"{stem.replace(':', '-')}.npz") as arrays:
            return dict(arrays)

    return read


def gradient_error(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Relative to the global norm."""
    return float(np.linalg.norm(ours["gradient"] - theirs["gradient"]) / np.linalg.norm(theirs["gradient"]))


@pytest.mark.parametrize("cut", ALL_CUTS)
@pytest.mark.parametrize("objective", [*OBJECTIVES, *PLAIN_ONLY])
def test_in_float64_every_cut_is_the_same_step(results: Any, objective: str, cut: str) -> None:
    ours, one = results(f"f64:{objective}:{cut}"), results(f"f64:{objective}:1x24")
    assert ours["gradient"].dtype == np.float64
    np.testing.assert_allclose(ours["metrics"], one["metrics"], rtol=1e-10, atol=1e-12)
    if objective != "stream":
        np.testing.assert_allclose(ours["scores"], one["scores"], rtol=1e-10)
    assert gradient_error(ours, one) < 1e-10


@pytest.mark.parametrize("cut", ALL_CUTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("engine", DEEPSPEED)
def test_under_deepspeed_every_cut_is_the_same_step(results: Any, engine: str, objective: str, cut: str) -> None:
    ours, one = results(f"{engine}:{objective}:{cut}"), results(f"f32:{objective}:1x24")
    np.testing.assert_allclose(ours["metrics"], one["metrics"], rtol=1e-5, atol=1e-6)
    if objective != "stream":
        np.testing.assert_allclose(ours["scores"], one["scores"], rtol=0, atol=1e-5)
    assert gradient_error(ours, one) < 1e-5


@pytest.mark.parametrize("task", TRAINED)
def test_two_ranks_end_with_the_weights_of_one(results: Any, task: str) -> None:
    two, one = results(task), results("train:f32:1x24" if task.endswith("2x12") else "train:f32:1x4x6")
    np.testing.assert_allclose(two["metrics"], one["metrics"], rtol=2e-4, atol=2e-5)
    np.testing.assert_array_equal(two["before"], one["before"])
    moved, apart = np.linalg.norm(one["after"] - one["before"]), np.linalg.norm(two["after"] - one["after"])
    assert moved > 0.1
    assert apart < 1e-3 * moved


@pytest.mark.parametrize("form", NAIVE)
def test_what_is_often_written_is_another_gradient(results: Any, form: str) -> None:
    assert gradient_error(results(form), results(NAIVE[form])) > 0.1


@pytest.mark.parametrize("task", SENT)
def test_scores_and_their_gradients_are_all_that_travels(results: Any, task: str) -> None:
    table = 8 * USERS * CANDIDATES
    assert results(task)["sizes"].tolist() == [table, *SENT[task], table + 8 * METRICS]


@pytest.mark.parametrize("task", POISONED)
def test_one_bad_row_skips_the_step_of_all_ranks_and_is_named(results: Any, task: str) -> None:
    found = [results(f"{task}-{rank}") for rank in range(2)]
    rows = found[0]["rows"]
    for each in found:
        assert each["reference_skipped"]
        assert each["reference_rows"].tolist() == [rows[found[0]["place"]]]
        # Neither a margin that all share nor a gradient that overflowed points at a row.
        for what in ("margin", "gradient"):
            assert each[f"{what}_skipped"]
            assert each[f"{what}_rows"].tolist() == sorted(set(rows.tolist()))
        np.testing.assert_array_equal(each["before"], each["after"])
        assert each["centre"] == 0.25
        assert not each["good_skipped"]
        assert not each["good_rows"].size
        one = results("f64:napo:1x24" if "f64" in task else "f32:napo:1x24")
        assert gradient_error({"gradient": each["good_gradient"]}, one) < 1e-5


@pytest.mark.parametrize("task", SPOILT)
def test_one_bad_stream_skips_the_step_of_all_ranks_and_is_named(results: Any, task: str) -> None:
    for rank in range(2):
        found = results(f"{task}-{rank}")
        assert found["stream_skipped"]
        assert found["stream_rows"].tolist() == [found["row"]]
        np.testing.assert_array_equal(found["before"], found["after"])
