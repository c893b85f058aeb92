"""A search over margin and number of negatives: Ray Tune around the alignment of one shared SFT model.

Each trial is a driver function that starts its own group of workers; every trial reads the same SFT model, reference
scores, user vectors and joined examples. Judged on validation; the test split is not read.
"""

import logging
from functools import partial
from typing import Any

import ray
import ray.tune
from ray.tune import Result, RunConfig, TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher
from ray.tune.search.optuna import OptunaSearch

from recray.config import Align, Resources, Tune
from recray.stages.alignment import Alignment, alignment, run_alignment, write_examples
from recray.stages.cluster import DATA_CPUS
from recray.stages.feed import FEED_CPUS
from recray.stages.flow import Job
from recray.stages.recommender import refuse_other_reference

logger = logging.getLogger(__name__)

GOAL = "best_ndcg@10"
DRIVER_CPUS = 0.05


def run(job: Job) -> None:
    """Search, then write the table of trials and the best recipe as a configuration file."""
    part: Tune = job.part
    base: Align = job.pipeline.align
    refuse_other_reference(job.workspace)
    name = f"tune-{job.fingerprint}"
    examples = f"{name}-examples"
    job.out.counts["examples"] = write_examples(job.workspace, examples)
    start = alignment(job.workspace, base.model_copy(update={"steps": part.steps}), job.seed, examples)
    results = _search(job, part, start, name).fit()
    trials = sorted((_row(result) for result in results), key=lambda row: -(row[GOAL] or -1.0))
    job.out.write_json("trials.json", trials)
    best = _settings(base, trials[0])
    job.out.write_json("best.json", {"align": best.model_dump(mode="json")})
    job.out.counts["trials"] = len(trials)
    job.out.facts |= {"best": trials[0], "failed": sum(row[GOAL] is None for row in trials)}
    for row in trials:
        job.workspace.remove(".training", f"{name}-{row['trial']}")
        job.workspace.remove(".training", f"{name}-{row['trial']}-log")
    job.workspace.remove(".training", examples)
    job.workspace.remove(".training", name)


def trials_at_once(resources: Resources, cluster: dict[str, float]) -> int:
    """Return how many trials fit into the cluster: workers, feed and driver of each, and one CPU that all data tasks
    share; at least one.

    More would deadlock: trials whose workers hold every CPU wait for data that no CPU is left to read.
    """
    cpus = resources.num_workers * resources.cpus_per_worker + FEED_CPUS + DRIVER_CPUS
    fit = int((cluster.get("CPU", 0.0) - DATA_CPUS) // cpus)
    if resources.gpus_per_worker > 0:
        fit = min(fit, int(cluster.get("GPU", 0.0) // (resources.num_workers * resources.gpus_per_worker)))
    return max(1, fit)


def _search(job: Job, part: Tune, start: Alignment, name: str) -> Tuner:
    trial = ray.tune.with_resources(
        partial(_trial, start=start, resources=job.resources, name=name), {"CPU": DRIVER_CPUS}
    )
    return Tuner(
        trial,
        param_space={
            "margin_base": ray.tune.uniform(*part.margin_base),
            "num_negatives": ray.tune.choice(list(part.num_negatives)),
        },
        tune_config=TuneConfig(
            metric=GOAL,
            mode="max",
            num_samples=part.trials,
            search_alg=_searcher(part, job.seed),
            max_concurrent_trials=trials_at_once(job.resources, ray.cluster_resources()),
        ),
        run_config=RunConfig(
            name=name,
            storage_path=job.workspace.path(".training"),
            storage_filesystem=job.workspace.fs,
            verbose=0,
        ),
    )


def _searcher(part: Tune, seed: int) -> Searcher | SearchAlgorithm:
    if part.search == "optuna":
        return OptunaSearch(seed=seed)
    return BasicVariantGenerator(random_state=seed)


def _trial(point: dict[str, Any], *, start: Alignment, resources: Resources, name: str) -> None:
    """Drive one trial: its workers report to it, and through the callback to Tune."""
    trial = ray.tune.get_context().get_trial_id()
    setting = alignment(start.workspace, _settings(start.part, point), start.seed, start.examples)
    run_alignment(setting, resources, run=f"{name}-{trial}", name=f"tune {trial}", callbacks=[TuneReportCallback()])


def _settings(base: Align, point: dict[str, Any]) -> Align:
    """Return `base` at a point of the search space."""
    objective = base.objective.model_copy(update={"margin_base": float(point["margin_base"])})
    return base.model_copy(update={"objective": objective, "num_negatives": int(point["num_negatives"])})


def _row(result: Result) -> dict[str, Any]:
    """Return a trial as a line of the table; without a score if it failed."""
    metrics = result.metrics or {}
    return {
        "trial": metrics.get("trial_id", ""),
        **{key: result.config[key] for key in ("margin_base", "num_negatives")},
        GOAL: metrics.get(GOAL),
        "seconds": metrics.get("time_total_s"),
        "error": None if result.error is None else str(result.error).splitlines()[0],
    }
