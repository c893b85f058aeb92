"""Scores of every positive and negative under the frozen SFT model, by Ray Data actors."""

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy

from recray.config import Reference
from recray.data.examples import aligned, list_arrays, matrix
from recray.lm.scorer import ItemScorer, score_rows
from recray.schema import REFERENCE
from recray.stages.flow import Job
from recray.stages.recommender import open_from, scorer_print
from recray.workspace import Workspace

ROWS_AT_ONCE = 256


class ScoreRows:
    """Ray Data actor: rows with their items in, scores of these items out."""

    def __init__(self, workspace: Workspace, tokens_per_micro_batch: int, threads: int) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        model, self._catalogue = open_from(workspace, "sft", "model")
        self._scorer = ItemScorer(model).eval()
        if torch.cuda.is_available():
            self._scorer.cuda()
        self._tokens = tokens_per_micro_batch

    def __call__(self, batch: pa.Table) -> pa.Table:
        items = list(matrix(batch["items"]))
        scores = score_rows(
            self._scorer,
            self._catalogue,
            list_arrays(batch["history"]),
            items,
            tokens_per_micro_batch=self._tokens,
        )
        columns = [
            batch["row"],
            pa.array(items, pa.list_(pa.int32())),
            pa.array(scores, pa.list_(pa.float32())),
        ]
        return pa.table(columns, schema=REFERENCE)


def run(job: Job) -> None:
    """Score sequences/train with negatives/train, and say which model did it."""
    part: Reference = job.part
    rows = _rows_with_items(job.workspace)
    blocks = [rows.slice(start, ROWS_AT_ONCE) for start in range(0, rows.num_rows, ROWS_AT_ONCE)]
    resources = job.resources
    scored = ray.data.from_arrow(blocks).map_batches(
        ScoreRows,
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        compute=ActorPoolStrategy(size=resources.data_actors),
        num_cpus=1,
        num_gpus=1 if resources.gpus_per_worker > 0 else None,
        fn_constructor_args=(job.workspace, part.tokens_per_micro_batch, resources.threads_per_worker),
    )
    scored.write_parquet(job.out.path("train"), filesystem=job.out.fs)
    job.out.counts["train"] = rows.num_rows
    job.out.counts["scores"] = rows.num_rows * matrix(rows["items"]).shape[1] if rows.num_rows else 0
    job.out.write_json("fingerprint.json", scorer_print(job.workspace, "sft"))


def _rows_with_items(workspace: Workspace) -> pa.Table:
    """Return (row, history, items): the target first, then the negatives."""
    examples = workspace.table("sequences", "train").sort_by("row")
    negatives = aligned(examples["row"].to_numpy(), workspace.table("negatives", "train"), "negatives")
    items = np.column_stack([examples["target"].to_numpy(), matrix(negatives["negatives"])]).astype(np.int32)
    return pa.table(
        {
            "row": examples["row"],
            "history": examples["history"],
            "items": pa.array(list(items), pa.list_(pa.int32())),
        }
    )
