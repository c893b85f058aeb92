"""Scoring evaluation rows on Ray Data, by replicas that open a model where they run; for `evaluate` and `compare`."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray
from numpy.typing import NDArray
from pyarrow import fs as pafs
from ray.data import ActorPoolStrategy, Dataset

from recray.config import Resources
from recray.errors import DataError
from recray.ranking.baselines import Cooccurrence, Popularity
from recray.ranking.forms import Form
from recray.ranking.ragged import padded
from recray.ranking.rows import Batch, Scorer, batch_of, flat_lists, rank_rows
from recray.ranking.summary import Ranked
from recray.workspace import Workspace

ROWS_AT_ONCE = 256  # what a model is handed; it cuts by its own token budget below that

OpenScorer = Callable[[], Scorer]


class Training(NamedTuple):
    """What the counting models know: the training histories, end to end."""

    items: NDArray[Any]
    lengths: NDArray[np.int64]
    num_items: int


class OpenedModel(NamedTuple):
    """What a process far away needs to open a language model."""

    workspace: Workspace
    folder: tuple[str, ...]  # of the model, in the workspace
    tokens_per_micro_batch: int
    threads: int

    def writer(self) -> Any:
        """Return the model as a `recray.lm.generate.Writer`."""
        import torch

        from recray.lm.generate import load_writer

        torch.set_num_threads(self.threads)
        folder = self.workspace.folder(*self.folder)
        return load_writer(folder, tokens_per_micro_batch=self.tokens_per_micro_batch)

    def __call__(self) -> Any:
        """Return the model as a `recray.lm.scorer.LoadedScorer`."""
        # Imported here: torch and transformers take seconds, which replicas of the counting models need not wait.
        import torch

        from recray.lm.scorer import LoadedScorer

        torch.set_num_threads(self.threads)
        folder = self.workspace.folder(*self.folder)
        return LoadedScorer(folder, tokens_per_micro_batch=self.tokens_per_micro_batch)


def language_scorer(opened: OpenedModel, form: Form) -> OpenScorer:
    """Return what opens a language model's scorer where it is used: this may be another machine."""
    return partial(_language_scorer, opened, form)


def counting_scorer(model: Popularity | Cooccurrence) -> OpenScorer:
    """Return what opens a counting model from the object store, where its arrays are shared and not copied."""
    return partial(_counting_scorer, ray.put(model))


def training_of(workspace: Workspace) -> Training:
    """Return the training histories, end to end."""
    histories = workspace.table("sequences", "histories", columns=["items"])
    items = workspace.table("ingest", "items", columns=["item"])
    return Training(*flat_lists(histories["items"]), items.num_rows)


def _counting_scorer(stored: Any) -> Scorer:
    model: Popularity | Cooccurrence = ray.get(stored)

    def score(batch: Batch) -> list[NDArray[Any]]:
        return model(batch.histories, batch.candidates)

    return score


def _language_scorer(opened: OpenedModel, form: Form) -> Scorer:
    scorer = opened()

    def score(batch: Batch) -> list[NDArray[Any]]:
        (found,) = in_forms(scorer, [form], batch.histories, batch.candidates)
        return found

    return score


def in_forms(
    scorer: Any, forms: list[Form], histories: list[NDArray[Any]], candidates: list[NDArray[Any]]
) -> list[list[NDArray[Any]]]:
    """Return the rows' scores in each form."""
    summed = scorer(histories, candidates)
    priors = scorer.prior(candidates) if any(form.needs_prior for form in forms) else [None] * len(summed)
    tokens = [scorer.catalogue.item_lengths[items] for items in candidates]
    return [[form(*each) for each in zip(summed, tokens, priors, strict=True)] for form in forms]


def replicas(resources: Resources, *, accelerated: bool) -> dict[str, Any]:
    """Return what Ray Data is told about replicas of a model."""
    return {
        "compute": ActorPoolStrategy(min_size=1, max_size=resources.data_actors),
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": resources.gpus_per_worker if accelerated else 0,
    }


class RankRows:
    """A replica of one model that ranks batches of evaluation rows."""

    def __init__(self, model: str, open_scorer: OpenScorer, keep: int) -> None:
        self._model = model
        self._scorer = open_scorer()
        self._keep = keep

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the rows of `schema.RANKED_ROWS` for rows of `schema.EVALUATION`."""
        return rank_rows(table, self._scorer(batch_of(table)), model=self._model, keep=self._keep)


def rank_on_replicas(
    rows: Dataset, model: str, open_scorer: OpenScorer, *, keep: int, resources: Resources, accelerated: bool
) -> Dataset:
    """Return `schema.RANKED_ROWS` of rows of `schema.EVALUATION`, made by replicas of one model."""
    return rows.repartition(target_num_rows_per_block=ROWS_AT_ONCE).map_batches(
        RankRows,
        fn_constructor_args=(model, open_scorer, keep),
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        **replicas(resources, accelerated=accelerated),
    )


def read_ranked(fs: pafs.FileSystem, path: str, model: str, test: pa.Table) -> Ranked:
    """Read one model's rows back in the order of the test rows.

    Raises:
        DataError: if rows are missing or there twice.
    """
    written = pads.dataset(path, filesystem=fs, format="parquet")
    table = written.to_table(columns=["row", "rank", "ranked"], filter=pads.field("model") == model)
    table = table.sort_by("row")
    if not np.array_equal(table["row"].to_numpy(), test["row"].to_numpy()):
        raise DataError(
            f"{model} ranked {table.num_rows} rows, but sequences/test has {test.num_rows}, "
            "each of them to be ranked once"
        )
    recommended, _ = padded(*flat_lists(table["ranked"]), fill=-1)
    return Ranked(table["rank"].to_numpy().astype(np.int64), recommended.astype(np.int64))
