"""Scores of given items for given rows under a recommender of the workspace, by Ray Data actors.

Shared: `reference` scores what is compared with the frozen model, pools what a model may rank highest.

Axes: R rows, N negatives, K candidates: the positive, then the negatives.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray
import torch
from jaxtyping import Int
from numpy import ndarray
from ray.data import ActorPoolStrategy, Dataset

from recray.config import Resources
from recray.data.examples import find_scores, list_arrays, list_values, matrix
from recray.errors import DataError
from recray.lm.scorer import ItemScorer, score_rows
from recray.schema import REFERENCE
from recray.stages.recommender import open_from
from recray.workspace import Workspace

ROWS_AT_ONCE = 256
ACTOR_CPUS = 0.5  # leaves room for reading on a machine of one CPU


class ScoreItems:
    """Ray Data actor: (row, history, items) in, (row, items, scores) out."""

    def __init__(self, workspace: Workspace, model: tuple[str, ...], tokens_per_micro_batch: int, threads: int) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        opened, self._catalogue = open_from(workspace, *model)
        self._scorer = ItemScorer(opened).eval()
        if torch.cuda.is_available():
            self._scorer.cuda()
        self._tokens = tokens_per_micro_batch

    def __call__(self, batch: pa.Table) -> pa.Table:
        items, histories = list_arrays(batch["items"]), list_arrays(batch["history"])
        found = score_rows(self._scorer, self._catalogue, histories, items, tokens_per_micro_batch=self._tokens)
        lists = pa.array(items, pa.list_(pa.int32())), pa.array(found, pa.list_(pa.float32()))
        return pa.table([batch["row"], *lists], schema=REFERENCE)


def score_items(
    rows: Dataset, workspace: Workspace, model: tuple[str, ...], *, tokens_per_micro_batch: int, resources: Resources
) -> Dataset:
    """Return `schema.REFERENCE` rows, in any order, of (row, history, items).

    Args:
        rows: What to score.
        workspace: Where the model is.
        model: Its folder there.
        tokens_per_micro_batch: Of the model's passes.
        resources: How many actors there may be, and on what.
    """
    return rows.map_batches(
        ScoreItems,
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        compute=ActorPoolStrategy(size=resources.data_actors),
        num_cpus=ACTOR_CPUS,
        num_gpus=min(1.0, resources.gpus_per_worker) if resources.gpus_per_worker > 0 else None,
        fn_constructor_args=(workspace, model, tokens_per_micro_batch, resources.threads_per_worker),
    )


def score_table(rows: pa.Table, workspace: Workspace, *, tokens_per_micro_batch: int, resources: Resources) -> pa.Table:
    """Return what the frozen SFT model makes of (row, history, items): `schema.REFERENCE` rows, in any order."""
    if not rows.num_rows:
        return REFERENCE.empty_table()
    blocks = [rows.slice(start, ROWS_AT_ONCE) for start in range(0, rows.num_rows, ROWS_AT_ONCE)]
    scored = score_items(
        ray.data.from_arrow(blocks),
        workspace,
        ("sft", "model"),
        tokens_per_micro_batch=tokens_per_micro_batch,
        resources=resources,
    )
    return pa.concat_tables(ray.get(scored.to_arrow_refs()))


def rows_with_items(examples: pa.Table, negatives: Int[ndarray, "R N"]) -> pa.Table:
    """Return (row, history, items) of `schema.EXAMPLES` rows: the target first, then the negatives."""
    items = np.column_stack([examples["target"].to_numpy(), negatives]).astype(np.int32)
    return pa.table(
        {
            "row": examples["row"],
            "history": examples["history"],
            "items": pa.array(list(items), pa.list_(pa.int32())),
        }
    )


class Completed(NamedTuple):
    """Scores of all that was asked for."""

    table: pa.Table  # schema.REFERENCE, in the order of the rows
    new: pa.Table  # schema.REFERENCE of what had to be scored
    kept: int  # scores that were known

    @property
    def scored(self) -> int:
        """How many scores are new."""
        return int(list_values(self.new["items"].combine_chunks()).size)


def complete(rows: pa.Table, known: pa.Table, score: Callable[[pa.Table], pa.Table]) -> Completed:
    """Return the score of every (row, item), those that are known as they are.

    Args:
        rows: As `rows_with_items`, with as many items each.
        known: `schema.REFERENCE` of the same model; of other items, too.
        score: Returns `schema.REFERENCE` rows of (row, history, items), in any order.

    Raises:
        DataError: if a score did not come back.
    """
    ids, items = rows["row"].to_numpy(), matrix(rows["items"])
    _, found = find_scores(ids, items, known)
    lacking = np.flatnonzero(~found.all(axis=1))
    left = [items[row][~found[row]] for row in lacking]
    new = score(rows.take(pa.array(lacking)).set_column(2, "items", pa.array(left, pa.list_(pa.int32()))))
    scores, there = find_scores(ids, items, pa.concat_tables([known, new]))
    if not there.all():
        raise DataError(f"reference: {(~there).sum()} of {there.size} scores did not come back; run it again")
    columns = [rows["row"], rows["items"], pa.array(list(scores), pa.list_(pa.float32()))]
    return Completed(pa.table(columns, schema=REFERENCE), new, int(found.sum()))
