"""A search over settings of `align`: Ray Tune around the alignment of one shared SFT model.

Every trial reads the same SFT model, reference scores, user vectors and joined examples. Judged on validation; the test
split is not read. What is known of a search is kept until it is whole: one that was stopped is run again, and goes on.
"""

import json
import logging
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from recray.config import Align, Tune, point_of_space, search_space
from recray.errors import RecrayError
from recray.ranking.importance import Importance, importance
from recray.report.search import NOTHING_GAINED, Found, gained, render_search
from recray.space import Space
from recray.stages.alignment import WHOLE, write_examples
from recray.stages.alone import FIT_SECONDS
from recray.stages.flow import Job
from recray.stages.notice import board_for_workers
from recray.stages.recommender import refuse_other_reference
from recray.stages.searching import Trials, go_through, refuse_missing_trackers
from recray.train.hparams import write_hparams
from recray.train.proposals import Proposals, RandomPoints, TpePoints
from recray.train.search import DIRECTIONS, FAILED, RANKING, STOPPED, Halving, Search, points_of
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

SHARED = ("sft", "reference", "users")  # stages that trials read and none of them makes again


def run(job: Job) -> None:
    """Search, then write trials, points, the report, and the best recipe as a configuration file.

    Raises:
        ConfigError: if a tracker is asked for that is not installed.
        StopRequestedError: if the search was told to end before it was whole.
        RecrayError: if every trial failed.
    """
    part: Tune = job.part
    refuse_other_reference(job.workspace)
    refuse_missing_trackers(part)
    space, name = search_space(job.pipeline), f"tune-{job.fingerprint}"
    if job.forced:
        _clear(job.workspace, name)
    job.out.counts["examples"] = _examples(job.workspace, name)
    search = _search(job, space, name)
    before = _prints(job.workspace)
    job.out.facts |= _go_through(job, search, space, name)
    _refuse_nothing_found(search)
    _sum_up(job, search, space)
    _count(job, search, before)
    _clear(job.workspace, name)


def _search(job: Job, space: Space, name: str) -> Search:
    """Return the search as far as it is."""
    part, workspace = job.part, job.workspace
    proposals: Proposals = RandomPoints(space, job.seed)
    if part.search == "optuna":
        proposals = TpePoints(space, job.seed, [DIRECTIONS[goal] for goal in part.goals], part.trials)
    folder = (".training", f"{name}-trials")
    kept = [workspace.json(*folder, file) for file in workspace.names(*folder) if not file.startswith(".")]
    search = Search(
        proposals,
        goals=part.goals,
        points=part.trials,
        seeds=part.seeds,
        first_seed=job.seed,
        halving=Halving(part.first_rung, part.reduction, part.steps) if part.stop_early else None,
        write=partial(_keep, workspace, f"{name}-trials"),
        kept=kept,
    )
    logger.info(
        "tune: %d points over %s, %d runs left, %d done before",
        part.trials,
        ", ".join(space),
        search.left,
        search.ended_before,
    )
    return search


def _go_through(job: Job, search: Search, space: Space, name: str) -> dict[str, Any]:
    """Run what is left of the search; return how long it took, and the share of that outside of training."""
    if not search.left:
        return {}
    part, base = job.part, job.pipeline.align
    resources = job.resources
    # What draws negatives anew has work of its own on the cluster, between parts of a fit.
    refreshed = base.refresh_every is not None or "refresh_every" in space
    with board_for_workers() as board:
        trials = Trials(
            job.workspace,
            base.model_copy(update={"steps": part.steps, "seconds": None, "validate_every": part.validate_every}),
            f"{name}-examples",
            name,
            resources,
            job.seed,
            alone=resources.num_workers == 1 and not refreshed,
            board=board,
        )
        ran_before = {number for number, trial in search.trials.items() if trial.state != "running"}
        began = time.monotonic()
        at_once = go_through(search, trials, part)
        seconds = time.monotonic() - began
    fits = [trial.costs.get(FIT_SECONDS, 0.0) for number, trial in search.trials.items() if number not in ran_before]
    side_by_side = min(at_once, len(fits))
    return {
        "at_once": at_once,
        "search_seconds": round(seconds, 1),
        "seconds_of_fits": round(sum(fits), 1),
        "share_outside_fits": round(1 - sum(fits) / (seconds * side_by_side), 3),
    }


def _sum_up(job: Job, search: Search, space: Space) -> None:
    """Write trials, points, recipes, TensorBoard's table and the page."""
    part, base, trials = job.part, job.pipeline.align, [search.trials[number] for number in sorted(search.trials)]
    points = points_of(trials)
    best = points[0]
    job.out.write_json("trials.json", [vars(trial) for trial in trials])
    job.out.write_json("points.json", points)
    job.out.write_json("best.json", _recipe(base, best))
    for point in points:
        if point["on_front"]:
            job.out.write_json(f"front/{point['point']:04d}.json", _recipe(base, point))
    with TemporaryDirectory(prefix="recray-hparams-") as folder:
        write_hparams(Path(folder), trials)
        job.out.write_folder("tensorboard", Path(folder))
    page = Found(
        name=job.pipeline.name,
        points=points,
        ranges={name: found.model_dump(mode="json") for name, found in space.items()},
        explained=_explained(points, space, job.seed),
        steps=part.steps,
        search=part.search,
    )
    job.out.write_bytes("search.html", render_search(page).encode())
    job.out.facts |= {
        "best": {"point": best["point"], "settings": best["settings"], RANKING: best[RANKING]},
        "front": [point["point"] for point in points if point["on_front"]],
    }
    logger.info("tune: best %s %.4f at %s", RANKING, best[RANKING], json.dumps(best["settings"]))
    if not gained(best):
        logger.warning("tune: %s", NOTHING_GAINED)
    logger.info("tune: %s", job.workspace.path("tune", "search.html"))


def _explained(points: list[dict[str, Any]], space: Space, seed: int) -> dict[str, dict[str, Importance]]:
    """Return what each setting explains of each goal, over the points that were judged."""
    judged = [point for point in points if point[RANKING] is not None]
    settings = {name: [point["settings"].get(name) for point in judged] for name in space}
    return {goal: importance(settings, np.array([point[goal] for point in judged]), seed=seed) for goal in DIRECTIONS}


def _recipe(base: Align, point: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration file for `recray run`: the point's settings, and as many steps as `align` has."""
    return {"align": point_of_space(base, point["settings"]).model_dump(mode="json")}


def _count(job: Job, search: Search, before: dict[str, str]) -> None:
    """Count trials by what became of them, and what was made that all could share."""
    states, after = [trial.state for trial in search.trials.values()], _prints(job.workspace)
    job.out.counts |= {
        "points": job.part.trials,
        "trials": len(states),
        "done_before": search.ended_before,
        "stopped_early": states.count(STOPPED),
        "failed": states.count(FAILED),
        "reference_scores_made": _scores_made(job, search),
        **{f"{stage}_made": int(after[stage] != before[stage]) for stage in SHARED},
    }
    job.out.facts["shared"] = after


def _scores_made(job: Job, search: Search) -> int:
    """Return how many reference scores trials made by themselves: none where there is a table of them."""
    if job.workspace.require("reference").facts["source"] == "table":
        return 0
    drawn, base = job.pipeline.negatives.num, job.pipeline.align
    total = 0
    for trial in search.trials.values():
        part = point_of_space(base, trial.settings)
        total += int(trial.costs.get("steps", 0)) * part.global_batch * (1 + (part.num_negatives or drawn))
    return total


def _prints(workspace: Workspace) -> dict[str, str]:
    """Return which output of each shared stage there is, and when it was made."""
    found = {stage: workspace.require(stage) for stage in SHARED}
    return {stage: f"{manifest.fingerprint} of {manifest.finished}" for stage, manifest in found.items()}


def _refuse_nothing_found(search: Search) -> None:
    failed = [trial for trial in search.trials.values() if trial.state == FAILED]
    if len(failed) == len(search.trials):
        raise RecrayError(
            f"all {len(failed)} trials failed, the first of them: {failed[0].error}; what is known of them is kept, "
            "`--force tune` begins anew"
        )


def _examples(workspace: Workspace, name: str) -> int:
    """Join the examples for all trials, unless an earlier start of this search has; return their number."""
    examples = f"{name}-examples"
    if workspace.exists(".training", examples, WHOLE):
        return int(workspace.json(".training", examples, WHOLE)["rows"])
    return write_examples(workspace, examples)


def _keep(workspace: Workspace, folder: str, number: int, trial: dict[str, Any]) -> None:
    """Write down a trial, in place of what was kept of it."""
    workspace.put_json(trial, ".training", folder, f"{number:05d}.json")


def _clear(workspace: Workspace, name: str) -> None:
    """Remove what a search kept for going on."""
    workspace.remove(".training", name)
    workspace.remove_all(f"{name}-", ".training")
