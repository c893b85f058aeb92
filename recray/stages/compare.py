"""Methods of alignment side by side: one run a (method, seed), all from one SFT model, judged on the same test rows.

Every run reads the same SFT model, reference scores, user vectors and joined examples; validation watches it and picks
its weights, and the test rows are ranked once, with those. What a run left is kept until all are done, so a comparison
that was interrupted goes on with the run that it was at.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from rich.console import Console

from recray.config import Align, Compare, variants
from recray.errors import DataError
from recray.ranking.baselines import Cooccurrence, Popularity, item_popularity
from recray.ranking.forms import SUMMED
from recray.ranking.metrics import headline
from recray.ranking.rows import refuse_faulty
from recray.ranking.seeds import over_seeds
from recray.ranking.summary import Ranked, Settings
from recray.report.comparison import START, Comparison, render_comparison
from recray.report.tables import differences_table, results_table
from recray.stages.alignment import Alignment, alignment, remove_parts, run_alignment, write_examples
from recray.stages.fitting import Fitted
from recray.stages.flow import Job
from recray.stages.recommender import refuse_other_reference, write_best
from recray.stages.scoring import (
    OpenedModel,
    OpenScorer,
    counting_scorer,
    language_scorer,
    rank_on_replicas,
    read_ranked,
    training_of,
)
from recray.train.loop import WATCHED

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    """One run of the comparison."""

    number: int
    method: str
    part: Align
    seed: int
    of: str  # the comparison's name

    @property
    def name(self) -> str:
        """Name below `.training`."""
        return f"{self.of}-{self.number}"


def run(job: Job) -> None:
    """Fit and rank what is not done yet, then write table, curves and page.

    Raises:
        ConfigError: if a method asks for more negatives than were drawn.
        DataError: if there are no test rows, or one is faulty.
    """
    workspace = job.workspace
    refuse_other_reference(workspace)
    test = workspace.table("sequences", "test").sort_by("row")
    if test.num_rows == 0:
        raise DataError("sequences/test has no rows, so there is nothing to compare on; see sequences.test_fraction")
    training = training_of(workspace)
    refuse_faulty(test, training.num_items, "sequences/test")
    name = f"compare-{job.fingerprint}"
    runs = _planned(job, name)
    examples = f"{name}-examples"
    write_examples(workspace, examples)  # again, though a run before may have: it may have been stopped in between
    # All before any of them starts: a setting that can't be run is refused now.
    settings = [alignment(workspace, each.part, each.seed, examples, watch_seed=job.seed) for each in runs]
    results = [_result(job, *each, test, len(runs)) for each in zip(runs, settings, strict=True)]
    counts = item_popularity(training.items, training.num_items)
    ranked: dict[str, list[Ranked]] = {}
    for model, opener in (
        ("popularity", counting_scorer(Popularity(counts))),
        ("cooccurrence", counting_scorer(Cooccurrence.of(*training))),
        (START, _opener(job, ("sft", "model"))),
    ):
        ranked[model] = [_rank(job, model, opener, f"{name}-{model}-rows", test)]
    for each in runs:
        rows = workspace.path(".training", f"{each.name}-rows")
        ranked.setdefault(each.method, []).append(read_ranked(workspace.fs, rows, each.method, test))
    _sum_up(job, ranked, results, test, counts)
    workspace.remove_all(f"{name}-", ".training")


def _planned(job: Job, name: str) -> list[_Run]:
    """Return all runs: seed by seed, so that a comparison cut short has as many of each method."""
    part: Compare = job.part
    methods = variants(job.pipeline)
    planned = [(method, seed) for seed in range(job.seed, job.seed + part.seeds) for method in methods]
    return [_Run(number, _title(method), methods[method], seed, name) for number, (method, seed) in enumerate(planned)]


def _title(method: str) -> str:
    """Return what a method is called: `sft` is more of what the start already had."""
    return f"more {method}" if method.split()[0] == "sft" else method


def _result(job: Job, each: _Run, setting: Alignment, test: pa.Table, of: int) -> dict[str, Any]:
    """Fit and rank one run unless that is done, and return what is known of it."""
    workspace, done = job.workspace, f"{each.name}-result.json"
    if workspace.exists(".training", done):
        logger.info("compare: %s, seed %d: done before (run %d of %d)", each.method, each.seed, each.number + 1, of)
        found: dict[str, Any] = workspace.json(".training", done)
        return found
    logger.info("compare: %s, seed %d: run %d of %d", each.method, each.seed, each.number + 1, of)
    fitted = run_alignment(setting, job.resources, run=each.name, name=f"compare {each.method}, seed {each.seed}")
    model = f"{each.name}-model"
    with TemporaryDirectory(prefix="recray-model-") as folder:
        whole = Path(folder) / "model"
        write_best(fitted, workspace.folder("sft", "model"), whole, Path(folder) / "adapter", lora=each.part.lora)
        workspace.put_folder(whole, ".training", model)
    _rank(job, each.method, _opener(job, (".training", model)), f"{each.name}-rows", test)
    result = _facts(each, fitted)
    workspace.write_json(result, ".training", done)  # the last: with it the run is done
    for left in (each.name, f"{each.name}-log", model):
        workspace.remove(".training", left)
    remove_parts(workspace, each.name)
    return result


def _facts(each: _Run, fitted: Fitted) -> dict[str, Any]:
    """Return what a run took and how validation went."""
    progress = fitted.progress
    curve = [
        {"step": line["step"], "seconds": line["seconds"], "value": line[WATCHED]}
        for line in fitted.metrics
        if line["kind"] == "validation"
    ]
    return {
        "method": each.method,
        "seed": each.seed,
        "settings": json.dumps(each.part.objective.model_dump(mode="json")),
        "steps": progress.step,
        "seconds": progress.seconds,
        "best": progress.best,
        "best_step": progress.best_step,
        "skipped": progress.skipped,
        "curve": curve,
    }


def _opener(job: Job, folder: tuple[str, ...]) -> OpenScorer:
    """Return what opens a language model where its replicas run; all are ranked by the sum, which training watches."""
    tokens, threads = job.pipeline.evaluate.tokens_per_micro_batch, job.resources.threads_per_worker
    return language_scorer(OpenedModel(job.workspace, folder, tokens, threads), SUMMED)


def _rank(job: Job, model: str, open_scorer: OpenScorer, rows: str, test: pa.Table) -> Ranked:
    """Rank the test rows with one model, keep what came out below `.training`, and return it."""
    workspace = job.workspace
    workspace.remove(".training", rows)
    ranked = rank_on_replicas(
        ray.data.read_parquet(workspace.path("sequences", "test"), filesystem=workspace.fs),
        model,
        open_scorer,
        keep=job.pipeline.evaluate.keep_ranked,
        resources=job.resources,
        accelerated=model not in ("popularity", "cooccurrence"),
    )
    ranked.write_parquet(workspace.path(".training", rows), filesystem=workspace.fs)
    return read_ranked(workspace.fs, workspace.path(".training", rows), model, test)


def _sum_up(
    job: Job,
    ranked: Mapping[str, list[Ranked]],
    results: list[dict[str, Any]],
    test: pa.Table,
    counts: np.ndarray,
) -> None:
    """Write and show the table, the paired tests and the page."""
    judging = job.pipeline.evaluate
    settings = Settings(judging.ks, judging.bootstrap_samples, judging.confidence, job.seed)
    users = test["user_id"].to_numpy(zero_copy_only=False).astype(str)
    found = over_seeds(dict(ranked), START, users, counts, settings, headline(judging.ks))
    job.out.write_json("runs.json", results)
    job.out.write_json("metrics.json", found.models)
    job.out.write_json("differences.json", found.pairs)
    page = Comparison(job.pipeline.name, found.models, found.pairs, results, WATCHED, judging.confidence)
    job.out.write_bytes("comparison.html", render_comparison(page).encode())
    job.out.counts |= {"runs": len(results), "rows": test.num_rows}
    console = Console()
    console.print(results_table(found.models, confidence=judging.confidence))
    console.print(differences_table(found.pairs, confidence=judging.confidence))
    logger.info("compare: %s", job.workspace.path("compare", "comparison.html"))
