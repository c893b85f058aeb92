"""Scores of every positive and negative under the frozen SFT model, by Ray Data actors.

A score once made for a (row, item) is kept beside the stage and not made again while model, tokenizer, prompts, number
format and sequences are the same: other negatives, or more of them, cost what is new.
"""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray
from jaxtyping import Bool, Int
from numpy import ndarray

from recray.config import Reference
from recray.data.examples import aligned, find_scores, list_values, matrix
from recray.data.prompts import find_template
from recray.errors import DataError
from recray.schema import REFERENCE
from recray.stages.flow import STAGES, Job
from recray.stages.item_scores import ROWS_AT_ONCE, score_items
from recray.stages.recommender import scorer_print
from recray.workspace import Workspace, fingerprint

logger = logging.getLogger(__name__)


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
    scored = score_items(
        ray.data.from_arrow(blocks),
        job.workspace,
        ("sft", "model"),
        tokens_per_micro_batch=part.tokens_per_micro_batch,
        resources=job.resources,
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
