"""Methods of alignment side by side: one run a (method, seed), all from one SFT model, judged on the same test rows.

Every run reads the same SFT model, reference scores, user vectors and joined examples; validation watches it and picks
its weights, and the test rows are ranked once, with those. What a run left is kept until all are done, so a comparison
that was interrupted goes on with the run that it was at.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from recray.config import Compare, variants
from recray.data.examples import sample_of
from recray.errors import DataError
from recray.ranking.baselines import Cooccurrence, Popularity, item_popularity
from recray.ranking.metrics import headline
from recray.ranking.rows import refuse_faulty
from recray.ranking.seeds import over_seeds
from recray.ranking.summary import Ranked, Settings
from recray.report.comparison import START, Comparison, render_comparison
from recray.report.tables import differences_table, results_table
from recray.stages.alignment import alignment, write_examples
from recray.stages.comparing import Judging, Run, go_through, rank_on_ray
from recray.stages.flow import Job
from recray.stages.recommender import refuse_other_reference
from recray.stages.scoring import counting_scorer, read_ranked, training_of
from recray.train.loop import WATCHED
from recray.workspace import Workspace

logger = logging.getLogger(__name__)


def run(job: Job) -> None:
    """Fit and rank what is not done yet, then write table, curves and page.

    Raises:
        ConfigError: if a method asks for more negatives than were drawn.
        DataError: if there are no test rows, or one is faulty.
    """
    workspace = job.workspace
    refuse_other_reference(workspace)
    test = sample_of(workspace.table("sequences", "test"), job.part.rows, job.seed)
    if test.num_rows == 0:
        raise DataError("sequences/test has no rows, so there is nothing to compare on; see sequences.test_fraction")
    training = training_of(workspace)
    refuse_faulty(test, training.num_items, "sequences/test")
    name = f"compare-{job.fingerprint}"
    runs = _planned(job, name)
    examples = f"{name}-examples"
    workspace.put_table(test, ".training", f"{name}-test", "part-0.parquet")
    write_examples(workspace, examples)  # again, though a run before may have: it may have been stopped in between
    # All before any of them starts: a setting that can't be run is refused now.
    settings = [alignment(workspace, each.part, each.seed, examples, watch_seed=job.seed) for each in runs]
    chosen = job.pipeline.evaluate
    judging = Judging(workspace, f"{name}-test", job.resources, chosen.keep_ranked, chosen.tokens_per_micro_batch)
    before = sum(workspace.exists(".training", each.done) for each in runs)
    logger.info("compare: %d runs, %d of them done before", len(runs), before)
    for number, _ in enumerate(go_through(list(zip(runs, settings, strict=True)), judging), before + 1):
        logger.info("compare: %d of %d runs are done", number, len(runs))
    counts = item_popularity(training.items, training.num_items)
    ranked: dict[str, list[Ranked]] = {}
    for model, opener in (
        ("popularity", counting_scorer(Popularity(counts))),
        ("cooccurrence", counting_scorer(Cooccurrence.of(*training))),
        (START, judging.opener("sft", "model")),
    ):
        rank_on_ray(model, opener, f"{name}-{model}-rows", judging, accelerated=model == START)
        ranked[model] = [_read(workspace, f"{name}-{model}-rows", model, test)]
    for each in runs:
        ranked.setdefault(each.method, []).append(_read(workspace, f"{each.name}-rows", each.method, test))
    _sum_up(job, ranked, [workspace.json(".training", each.done) for each in runs], test, counts)
    workspace.remove_all(f"{name}-", ".training")


def _planned(job: Job, name: str) -> list[Run]:
    """Return all runs: seed by seed, so that a comparison cut short has as many of each method."""
    part: Compare = job.part
    methods = variants(job.pipeline)
    planned = [(method, seed) for seed in range(job.seed, job.seed + part.seeds) for method in methods]
    return [
        Run(number, _title(method), methods[method], seed, name, len(planned))
        for number, (method, seed) in enumerate(planned)
    ]


def _title(method: str) -> str:
    """Return what a method is called: `sft` is more of what the start already had."""
    return f"more {method}" if method.split()[0] == "sft" else method


def _read(workspace: Workspace, rows: str, model: str, test: pa.Table) -> Ranked:
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
