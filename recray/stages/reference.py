"""Scores of every positive and negative under the frozen SFT model, by Ray Data actors.

A score once made for a (row, item) is kept beside the stage and not made again while model, tokenizer, prompts, number
format and sequences are the same: other negatives, or more of them, cost what is new.
"""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray
import torch
from jaxtyping import Bool, Int
from numpy import ndarray
from ray.data import ActorPoolStrategy

from recray.config import Reference
from recray.data.examples import aligned, find_scores, list_arrays, list_values, matrix
from recray.data.prompts import find_template
from recray.errors import DataError
from recray.lm.scorer import ItemScorer, score_rows
from recray.schema import REFERENCE
from recray.stages.flow import STAGES, Job
from recray.stages.recommender import open_from, scorer_print
from recray.workspace import Workspace, fingerprint

logger = logging.getLogger(__name__)

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
        items = list_arrays(batch["items"])
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
    """Score what of sequences/train with negatives/train has no score yet, and say which model did it."""
    part: Reference = job.part
    if part.source == "table":
        _write_scores(job)
    else:
        logger.info("reference: nothing is scored here, as align scores its own rows in every step (%s)", part.source)
        job.out.write_table("train", REFERENCE.empty_table())
    job.out.facts["source"] = part.source
    job.out.write_json("fingerprint.json", scorer_print(job.workspace, "sft"))


def _write_scores(job: Job) -> None:
    rows = _rows_with_items(job.workspace)
    ids, items = rows["row"].to_numpy(), matrix(rows["items"])
    cache = _cache(job)
    known = _read(job.workspace, cache) if cache else REFERENCE.empty_table()
    _, found = find_scores(ids, items, known)
    logger.info("reference: %d scores to make, %d kept from before", (~found).sum(), found.sum())
    new = _score(job, _without(rows, items, found))
    if cache and new.num_rows:
        job.workspace.put_table(new, *cache, f"{job.fingerprint}.parquet")
    scores, there = find_scores(ids, items, pa.concat_tables([known, new]))
    if not there.all():
        raise DataError(f"reference: {(~there).sum()} of {there.size} scores did not come back; run it again")
    columns = [rows["row"], rows["items"], pa.array(list(scores), pa.list_(pa.float32()))]
    job.out.write_table("train", pa.table(columns, schema=REFERENCE))
    scored = list_values(new["items"].combine_chunks()).size
    job.out.counts |= {"scores": found.size, "scored": scored, "kept": int(found.sum())}


def _cache(job: Job) -> tuple[str, ...] | None:
    """Return the folder of scores that hold here, emptied if the stage is forced.

    None where a prompt shows all of its row's candidates: there, other negatives make another prompt.
    """
    if find_template(job.workspace.require("sft").part["prompt"]["template"]).shows_candidates:
        return None
    model = scorer_print(job.workspace, "sft")
    rows = {"sequences": job.workspace.require("sequences").fingerprint}  # rows are numbered there
    folder = (".cache", "reference", fingerprint("reference", STAGES["reference"].version, model, job.seed, rows))
    if job.forced:
        job.workspace.remove(*folder)
    return folder


def _read(workspace: Workspace, cache: tuple[str, ...]) -> pa.Table:
    if not workspace.exists(*cache):
        return REFERENCE.empty_table()
    return pads.dataset(workspace.path(*cache), filesystem=workspace.fs, schema=REFERENCE, format="parquet").to_table()


def _without(rows: pa.Table, items: Int[ndarray, "R K"], found: Bool[ndarray, "R K"]) -> pa.Table:
    """Return the rows that lack a score, with the items that lack one."""
    lacking = np.flatnonzero(~found.all(axis=1))
    left = [items[row][~found[row]] for row in lacking]
    return rows.take(pa.array(lacking)).set_column(2, "items", pa.array(left, pa.list_(pa.int32())))


def _score(job: Job, rows: pa.Table) -> pa.Table:
    """Return `REFERENCE` rows, in any order."""
    if not rows.num_rows:
        return REFERENCE.empty_table()
    part: Reference = job.part
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
    return pa.concat_tables(ray.get(scored.to_arrow_refs()))


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
