"""Negatives of every alignment example, by Ray Data; how often they meet what the user took or likes, as facts."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray

from recray.config import Negatives
from recray.errors import DataError
from recray.negatives.met import ItemsOfUsers, encounters, held_out, liked_but_never_met, met_in_training, of_rows
from recray.negatives.registry import Sampler, prepared
from recray.schema import NEGATIVES
from recray.stages.flow import Job
from recray.stages.rowwise import read_rows, write_rows
from recray.users.ragged import from_arrow

ROWS_AT_ONCE = 8192


def run(job: Job) -> None:
    """Draw the negatives of sequences/train, seeded by row, without what the row's user met in training."""
    part: Negatives = job.part
    histories = job.workspace.table("sequences", "histories", ["user_id", "items"])
    examples = job.workspace.table("sequences", "train", ["row", "user_id", "history", "target"])
    num_items = job.workspace.table("ingest", "items", ["item"]).num_rows
    met = met_in_training(histories, examples, num_items)
    frequency = np.bincount(from_arrow(histories["items"]).items, minlength=num_items)
    sampler = prepared(part.sampler, num_items=num_items, frequency=frequency, exponent=part.exponent)
    dataset, rows = read_rows(job, "sequences", "train", ["row", "user_id"])
    drawn = dataset.map_batches(
        draw_batch,
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        fn_kwargs={"sampler": sampler, "num": part.num, "seed": job.seed},
        fn_args=(ray.put(met),),  # fetched once a node, and read from shared memory
    )
    write_rows(job, "train", drawn, rows, NEGATIVES)
    job.out.facts |= {"sampler": part.sampler, "negatives_a_row": part.num}
    if len(rows):
        user_ids = examples.sort_by("row")["user_id"]
        job.out.facts |= _encountered(job, _drawn(job, part.num), user_ids, met, sampler)


def draw_batch(batch: pa.Table, met_ref: ray.ObjectRef, *, sampler: Sampler, num: int, seed: int) -> pa.Table:
    """Return (row, negatives) of a batch of (row, user_id).

    Raises:
        DataError: if a row has fewer than `num` items left.
    """
    met: ItemsOfUsers = ray.get(met_ref)
    own = of_rows(met, batch["user_id"])
    try:
        negatives = sampler.draw(batch["row"].to_numpy(), own.items, own.offsets, num=num, seed=seed)
    except ValueError as error:
        raise DataError(str(error)) from None
    offsets = np.arange(0, negatives.size + 1, num, dtype=np.int32)
    lists = pa.ListArray.from_arrays(offsets, negatives.reshape(-1))
    return pa.table([batch["row"], lists], schema=NEGATIVES)


def _drawn(job: Job, num: int) -> np.ndarray:
    """Return the negatives written, [rows, num], in order of rows."""
    table = pads.dataset(job.out.path("train"), filesystem=job.out.fs).to_table(columns=["negatives"])
    return from_arrow(table["negatives"]).items.reshape(-1, num)


def _encountered(
    job: Job, negatives: np.ndarray, user_ids: pa.ChunkedArray, met: ItemsOfUsers, sampler: Sampler
) -> dict[str, Any]:
    """Return which items were drawn, how often a held-out one, and, where the truth is known, a false negative."""
    validation, test = (
        job.workspace.table("sequences", split, ["user_id", "target"]) for split in ("validation", "test")
    )
    sets = {"held_out": held_out(validation, test, met.num_items)}
    if job.workspace.exists("ingest", "truth"):
        sets["false_negatives"] = liked_but_never_met(job.workspace.table("ingest", "truth"), met.num_items)
    weights = sampler.weights()
    facts: dict[str, Any] = {"items": met.num_items, "items_drawn": len(np.unique(negatives))}
    for name, among in sets.items():
        found = encounters(negatives, user_ids, among, met, weights)
        facts[name] = {key: round(value, 6) for key, value in found.items()}
    return facts
