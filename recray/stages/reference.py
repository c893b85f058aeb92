"""Scores of every positive and negative under the frozen SFT model, by Ray Data actors.

A score once made for a (row, item) is kept beside the stage and not made again while model, tokenizer, prompts, number
format and sequences are the same: other negatives, or more of them, cost what is new.
"""

import logging
from functools import partial

import pyarrow as pa
import pyarrow.dataset as pads

from recray.config import Reference
from recray.data.examples import aligned, matrix
from recray.data.prompts import find_template
from recray.schema import REFERENCE
from recray.stages.flow import STAGES, Job
from recray.stages.item_scores import complete, rows_with_items, score_table
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
    examples = job.workspace.table("sequences", "train").sort_by("row")
    negatives = aligned(examples["row"].to_numpy(), job.workspace.table("negatives", "train"), "negatives")
    rows = rows_with_items(examples, matrix(negatives["negatives"]))
    cache = _cache(job)
    known = _read(job.workspace, cache) if cache else REFERENCE.empty_table()
    found = complete(rows, known, partial(_score, job))
    logger.info("reference: %d scores made, %d kept from before", found.scored, found.kept)
    if cache and found.new.num_rows:
        job.workspace.put_table(found.new, *cache, f"{job.fingerprint}.parquet")
    job.out.write_table("train", found.table)
    job.out.counts |= {"scores": found.scored + found.kept, "scored": found.scored, "kept": found.kept}


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


def _score(job: Job, rows: pa.Table) -> pa.Table:
    part: Reference = job.part
    return score_table(rows, job.workspace, tokens_per_micro_batch=part.tokens_per_micro_batch, resources=job.resources)
