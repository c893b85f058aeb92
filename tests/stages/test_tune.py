"""A search on a real local Ray: killed half-way and run again, exact, and not ended by trials that fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from recray.config import Pipeline, override
from recray.errors import WorkspaceError
from recray.stages.flow import run_stages
from recray.train.search import DONE, FAILED, RANKING, STOPPED
from recray.workspace import Workspace

NONE: frozenset[str] = frozenset()
POINTS = 5
DRIVER = """
import sys
import ray
from recray.config import validated
from recray.stages.cluster import log_lines
from recray.stages.flow import run_stages
from recray.workspace import Workspace
import json
log_lines()
ray.init(address=sys.argv[1], log_to_driver=True)
run_stages(validated(json.loads(sys.argv[2])), Workspace(sys.argv[3]), ("tune",), force=frozenset())
"""

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def searched(ray_cluster: None, prepared: Workspace, tiny_pipeline: Pipeline) -> Workspace:  # noqa: ARG001
    """The prepared workspace with what a search reads."""
    run_stages(tiny_pipeline, prepared, ("sft", "reference"), force=NONE)
    return prepared


@pytest.fixture(scope="module")
def pipeline(tiny_pipeline: Pipeline) -> Pipeline:
    """Five points, one after the other."""
    settings = [
        f"tune.trials={POINTS}",
        "tune.steps=6",
        "tune.validate_every=3",
        "tune.at_once=1",
        "tune.search=random",
    ]
    return override(tiny_pipeline, settings=settings)


def ended(workspace: Workspace) -> dict[int, dict[str, Any]]:
    """What is written down of trials that have ended, in a search that has not."""
    found = {}
    for folder in workspace.names(".training"):
        if folder.startswith("tune-") and folder.endswith("-trials"):
            for file in workspace.names(".training", folder):
                trial = workspace.json(".training", folder, file) if not file.startswith(".") else {}
                if trial.get("state", "running") != "running":
                    found[trial["number"]] = trial
    return found


def test_a_search_whose_driver_is_killed_goes_on_and_repeats_nothing(searched: Workspace, pipeline: Pipeline) -> None:
    with pytest.raises(WorkspaceError, match="no `tune` with these settings, .*without --resume one is begun"):
        run_stages(pipeline, searched, ("tune",), force=NONE, resume=True)
    address = ray.get_runtime_context().gcs_address
    before = searched.require("reference").finished
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, address, pipeline.model_dump_json(), searched.uri],
        env={**os.environ, "RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 120
    while len(ended(searched)) < 2 and driver.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    driver.kill()
    output = driver.communicate()[0]
    first = ended(searched)
    assert 2 <= len(first) < POINTS, output[-3000:]
    run_stages(pipeline, searched, ("tune",), force=NONE, resume=True)

    trials = {trial["number"]: trial for trial in searched.json("tune", "trials.json")}
    assert sorted(trials) == list(range(POINTS))
    assert all(trial["state"] == DONE for trial in trials.values())
    assert all(len(trial["curve"]) == 3 for trial in trials.values())  # steps 0, 3 and 6, each once
    assert {number: trials[number] for number in first} == first  # to the last digit of their seconds
    manifest = searched.require("tune")
    assert manifest.counts["done_before"] == len(first)
    shared = ("reference_scores_made", "sft_made", "reference_made", "users_made", "failed")
    assert {manifest.counts[name] for name in shared} == {0}
    assert searched.require("reference").finished == before
    assert 0 < manifest.facts["share_outside_fits"] < 1
    points = searched.json("tune", "points.json")
    assert points[0][RANKING] == max(trial["curve"][n][RANKING] for trial in trials.values() for n in range(3))
    assert any(point["on_front"] for point in points)
    assert f"Best of {POINTS} points" in Path(searched.path("tune", "search.html")).read_text()
    assert len(searched.names("tune", "tensorboard")) == POINTS
    assert not [name for name in searched.names(".training") if name.startswith("tune-")]


def test_a_trial_in_one_process_is_align_to_the_last_bit(
    searched: Workspace, pipeline: Pipeline, tmp_path: Path
) -> None:
    run_stages(pipeline, searched, ("tune",), force=NONE)  # that of the test before, where it has run
    # Not the first of its process: what trials before it left behind must not be seen.
    trial = searched.json("tune", "trials.json")[-1]
    settings = [f"align.{name}={json.dumps(value)}" for name, value in trial["settings"].items()]
    same = override(pipeline, settings=[*settings, "align.steps=6", "align.validate_every=3"])
    run_stages(same, searched, ("align",), force=NONE)
    lines = [json.loads(line) for line in Path(searched.path("align", "metrics.jsonl")).read_text().splitlines()]
    curve = [{name: line[name] for name in trial["curve"][0]} for line in lines if line["kind"] == "validation"]
    assert curve == trial["curve"]
    file = tmp_path / "best.json"
    file.write_text(json.dumps(searched.json("tune", "best.json")))
    best, chosen = searched.json("tune", "points.json")[0], override(pipeline, file=str(file)).align
    assert chosen.num_negatives == best["settings"]["num_negatives"]
    assert chosen.objective.margin_base == best["settings"]["objective.margin_base"]
    assert chosen.steps == pipeline.align.steps


def test_trials_that_fail_or_fall_behind_end_alone(searched: Workspace, tiny_pipeline: Pipeline) -> None:
    space = {"optimiser.learning_rate": {"choice": [1e-3, 1e30, 1e-30]}}
    settings = [
        *("tune.trials=3", "tune.search=random", "tune.steps=6", "tune.validate_every=2", "tune.at_once=1"),
        *("tune.stop_early=true", "tune.first_rung=2", "tune.reduction=2", "align.optimiser.most_skipped=0"),
    ]
    bare = tiny_pipeline.model_copy(update={"tune": tiny_pipeline.tune.model_copy(update={"space": None})})
    run_stages(override(bare, settings=[f"tune.space={json.dumps(space)}", *settings]), searched, ("tune",), force=NONE)
    trials = {trial["settings"]["optimiser.learning_rate"]: trial for trial in searched.json("tune", "trials.json")}
    assert trials[1e30]["state"] == FAILED
    assert "not finite" in trials[1e30]["error"]
    assert {trials[1e-3]["state"], trials[1e-30]["state"]} <= {DONE, STOPPED}
    assert searched.require("tune").counts["failed"] == 1
