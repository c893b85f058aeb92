"""Every model ranks the same candidates of the same test rows; numbers come with intervals and baselines."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray
from numpy.typing import NDArray

from recray.config import Evaluate
from recray.data.examples import sample_of
from recray.errors import DataError
from recray.ranking.baselines import Cooccurrence, Popularity, item_popularity
from recray.ranking.forms import Form, best_form, forms_of
from recray.ranking.genres import Genres
from recray.ranking.metrics import headline
from recray.ranking.rows import (
    DotProducts,
    batch_of,
    flat_lists,
    lists,
    refuse_faulty,
    target_ranks,
)
from recray.ranking.slices import COLD, slices
from recray.ranking.summary import (
    Ranked,
    Settings,
    band_hit_rates,
    exposure,
    genre_exposure,
    paired_tests,
    sliced,
    summaries,
)
from recray.ranking.validity import validity, written_rows
from recray.stages.flow import Job
from recray.stages.scoring import (
    ROWS_AT_ONCE,
    OpenedModel,
    OpenScorer,
    Training,
    counting_scorer,
    in_forms,
    language_scorer,
    rank_on_replicas,
    read_ranked,
    replicas,
    training_of,
)

logger = logging.getLogger(__name__)


class Model(NamedTuple):
    """A model to evaluate: how a process far away gets to score with it."""

    name: str
    opener: Callable[[Job, Training], OpenScorer]
    needs_accelerator: bool = False


def run(job: Job) -> None:
    """Rank `sequences/test` with every model of `MODELS`, and sum up.

    Raises:
        DataError: if there are no test rows, one is faulty, or a model did not rank each of them once.
        ModelError: if a model can't be loaded or scores NaN.
    """
    training = training_of(job.workspace)
    test = job.workspace.table("sequences", "test").sort_by("row")
    if test.num_rows == 0:
        raise DataError("sequences/test has no rows, so there is nothing to evaluate; see sequences.test_fraction")
    refuse_faulty(test, training.num_items, "sequences/test")
    seconds = {}
    for model in MODELS:
        started = time.monotonic()
        _rank(job, model, training)
        seconds[model.name] = round(time.monotonic() - started, 1)
        logger.info("evaluate: %s ranked %s rows in %.1f s", model.name, f"{test.num_rows:,}", seconds[model.name])
    ranked = {model.name: read_ranked(job.workspace.fs, job.out.path("rows"), model.name, test) for model in MODELS}
    job.out.counts["rows"] = test.num_rows * len(MODELS)
    job.out.facts["seconds"] = seconds
    _write_freely(job, test)
    _sum_up(job, ranked, test, item_popularity(training.items, training.num_items))


def _popularity(job: Job, training: Training) -> OpenScorer:  # noqa: ARG001  every opener is called alike
    counts = item_popularity(training.items, training.num_items)
    return counting_scorer(Popularity(counts))


def _cooccurrence(job: Job, training: Training) -> OpenScorer:  # noqa: ARG001
    return counting_scorer(Cooccurrence.of(*training))


def _sasrec(job: Job, training: Training) -> OpenScorer:  # noqa: ARG001
    vectors = DotProducts.of(job.workspace.table("users", "test"), job.workspace.table("users", "items"))
    return partial(ray.get, ray.put(vectors))


def _language_model(stage: str) -> Callable[[Job, Training], OpenScorer]:
    def opener(job: Job, training: Training) -> OpenScorer:  # noqa: ARG001
        return language_scorer(_opened(job, stage), _chosen_form(job, stage))

    return opener


MODELS = (
    Model("popularity", _popularity),
    Model("cooccurrence", _cooccurrence),
    Model("sasrec", _sasrec),
    Model("sft", _language_model("sft"), needs_accelerator=True),
    Model("aligned", _language_model("align"), needs_accelerator=True),
)
WRITERS = {"sft": "sft", "aligned": "align"}  # models that can write, and the stages that made them

# What the run is judged by: the first minus the second, on the same rows. Every learned model against each baseline.
PAIRS = (
    ("aligned", "sft"),
    ("aligned", "sasrec"),
    ("aligned", "popularity"),
    ("aligned", "cooccurrence"),
    ("sft", "popularity"),
    ("sft", "cooccurrence"),
    ("sasrec", "popularity"),
    ("sasrec", "cooccurrence"),
)


class RankForms:
    """A replica of one language model that ranks validation rows in several forms of its score."""

    def __init__(self, opened: OpenedModel, forms: list[Form]) -> None:
        self._scorer, self._forms = opened(), forms

    def __call__(self, table: pa.Table) -> dict[str, NDArray[np.int64]]:
        """Return the rank of each row's target, a column a form."""
        histories, candidates = lists(table["history"]), lists(table["candidates"])
        targets = table["target"].to_numpy().astype(np.int64)
        scores = in_forms(self._scorer, self._forms, histories, candidates)
        return {
            str(form): target_ranks(own, candidates, targets) for form, own in zip(self._forms, scores, strict=True)
        }


def _opened(job: Job, stage: str) -> OpenedModel:
    folder = (stage, "model")
    return OpenedModel(job.workspace, folder, job.part.tokens_per_micro_batch, job.resources.threads_per_worker)


def _chosen_form(job: Job, stage: str) -> Form:
    """Return the form of the score that a language model's candidates are ranked by, chosen on validation rows."""
    part: Evaluate = job.part
    forms = forms_of(part.score, part.prior_weights)
    if len(forms) == 1:
        return forms[0]
    rows = job.workspace.table("sequences", "validation", columns=["row", "history", "target", "candidates"])
    rows = sample_of(rows, part.validation_rows, job.seed)
    k = headline(part.ks)
    ranked = ray.data.from_arrow(rows).map_batches(
        RankForms,
        fn_constructor_args=(_opened(job, stage), forms),
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        **replicas(job.resources, accelerated=True),
    )
    columns = ranked.to_pandas()
    best, found = best_form(forms, columns[[str(form) for form in forms]].to_numpy(dtype=np.int64), k)
    logger.info(
        "evaluate: %s is ranked by its %s log-probability, best on %d validation rows", stage, best, len(columns)
    )
    job.out.facts.setdefault("score", {})[stage] = {"chosen": str(best), f"validation ndcg@{k}": found}
    return best


class WriteRows:
    """A replica of one language model that writes the next item of evaluation rows freely."""

    def __init__(self, model: str, opened: OpenedModel) -> None:
        self._model = model
        self._write = opened.writer()

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the rows of `schema.WRITTEN_ROWS` for rows of `schema.EVALUATION`."""
        batch = batch_of(table)
        written = self._write(batch.histories, batch.candidates)
        return written_rows(table, **written._asdict(), model=self._model)


def _write_freely(job: Job, test: pa.Table) -> None:
    """Write what language models make of a sample of the test rows when nothing holds them to the candidates."""
    part: Evaluate = job.part
    if not part.generate_rows:
        return
    rows = sample_of(test, part.generate_rows, job.seed)
    settings = Settings(part.ks, part.bootstrap_samples, part.confidence, job.seed)
    models = []
    for model, stage in WRITERS.items():
        started = time.monotonic()
        written = _written(job, model, stage, rows)
        found = validity(written, settings=settings)
        template = job.workspace.json(stage, "model", "recray_prompt.json")["template"]
        seconds = round(time.monotonic() - started, 1)
        models.append({"model": model, "template": template, "seconds": seconds, **found})
        logger.info("evaluate: %s wrote %d items freely in %.1f s", model, rows.num_rows, seconds)
    job.out.counts["written"] = rows.num_rows * len(models)
    job.out.facts["written freely"] = {
        each["model"]: {name: each[name] for name in ("valid_ratio", "hr@1", "hr@1 of valid")} for each in models
    }
    job.out.write_json("generation.json", {"rows": rows.num_rows, "of": test.num_rows, "models": models})


def _written(job: Job, model: str, stage: str, rows: pa.Table) -> pa.Table:
    """Write one language model's texts beside those of the others, and return them in the order of the rows."""
    at_once = min(ROWS_AT_ONCE, -(-rows.num_rows // job.resources.data_actors))
    ray.data.from_arrow(rows).repartition(target_num_rows_per_block=at_once).map_batches(
        WriteRows,
        fn_constructor_args=(model, _opened(job, stage)),
        batch_format="pyarrow",
        batch_size=at_once,
        **replicas(job.resources, accelerated=True),
    ).write_parquet(job.out.path("written"), filesystem=job.out.fs)
    every = pads.dataset(job.out.path("written"), filesystem=job.out.fs, format="parquet")
    written = every.to_table(filter=pads.field("model") == model).sort_by("row")
    if not written["row"].equals(rows["row"]):
        raise DataError(f"{model} wrote {written.num_rows} texts for {rows.num_rows} rows, each of them to have one")
    return written


def _rank(job: Job, model: Model, training: Training) -> None:
    """Write one model's ranked rows beside those of the others."""
    ranked = rank_on_replicas(
        ray.data.read_parquet(job.workspace.path("sequences", "test"), filesystem=job.workspace.fs),
        model.name,
        model.opener(job, training),
        keep=job.part.keep_ranked,
        resources=job.resources,
        accelerated=model.needs_accelerator,
    )
    ranked.write_parquet(job.out.path("rows"), filesystem=job.out.fs)


def _sum_up(job: Job, ranked: dict[str, Ranked], test: pa.Table, popularity: NDArray[np.int64]) -> None:
    """Write and show the metrics, the paired differences and what is shown to whom."""
    part = job.part
    settings = Settings(part.ks, part.bootstrap_samples, part.confidence, job.seed)
    users = test["user_id"].to_numpy(zero_copy_only=False).astype(str)
    found = summaries(ranked, PAIRS, users, popularity, settings)
    k = headline(part.ks)
    tests = paired_tests(ranked, PAIRS, users, k, job.seed)
    paired = [{**each, "test": test} for each, test in zip(found.pairs, tests, strict=True)]
    targets = test["target"].to_numpy()
    parts = sliced(ranked, slices(flat_lists(test["history"])[1], targets, popularity), users, settings)
    job.out.write_json("metrics.json", found.models)
    job.out.write_json("differences.json", paired)
    job.out.write_json("slices.json", parts)
    job.out.write_json("exposure.json", _exposure(job, ranked, test, popularity, k))
    shown = f"ndcg@{k}"
    job.out.facts |= {
        "test_rows": test.num_rows,
        "users": len(np.unique(users)),
        "targets never met in training": _on_cold(parts, shown, test.num_rows),
        shown: {each["model"]: each[shown] for each in found.models},
        f"{shown} differences": {f"{each['model']} - {each['minus']}": each[shown] for each in paired},
        "p after Holm": {f"{each['model']} - {each['minus']}": each["test"]["p_holm"] for each in paired},
    }


def _exposure(
    job: Job, ranked: dict[str, Ranked], test: pa.Table, popularity: NDArray[np.int64], k: int
) -> dict[str, Any]:
    """Return what is shown, by popularity and by genre."""
    targets, met = test["target"].to_numpy(), flat_lists(test["history"])[0]
    items = job.workspace.table("ingest", "items", columns=["item", "genres"]).sort_by("item")
    genres = Genres.of(*flat_lists(items["genres"]))
    return {
        **exposure(ranked, targets, popularity),
        "bands": band_hit_rates(ranked, targets, popularity, k),
        "genres": genre_exposure(ranked, met, targets, genres, sorted({1, k})),
    }


def _on_cold(parts: list[dict[str, Any]], measure: str, rows: int) -> dict[str, Any]:
    """Return how many targets training never had, and what every model gets there."""
    cold = next((part for part in parts if part["slice"] == COLD), None)
    if cold is None:
        return {"rows": 0, "of": rows}
    return {
        "rows": cold["rows"],
        "of": rows,
        **{f"{measure} {model}": found[measure] for model, found in cold["models"].items()},
    }
