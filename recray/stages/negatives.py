"""Negatives of every alignment example, by Ray Data; how often they meet what the user took or likes, as facts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray

from recray.config import Negatives
from recray.data.examples import aligned, matrix
from recray.errors import DataError
from recray.negatives.adaptive import Scores
from recray.negatives.in_batch import batches_of
from recray.negatives.lists import Targets
from recray.negatives.met import ItemsOfUsers, encounters, held_out, liked_but_never_met, met_in_training, of_rows
from recray.negatives.nearest import neighbours
from recray.negatives.registry import SAMPLERS, Prepared, needs_of, prepared
from recray.negatives.same_category import Genres, genres_of_items
from recray.schema import COUNTED_NEGATIVES, NEGATIVES, POOLS
from recray.stages.flow import Job
from recray.stages.rowwise import read_rows, write_rows
from recray.users.ragged import from_arrow

ROWS_AT_ONCE = 8192


def run(job: Job) -> None:
    """Draw the negatives of sequences/train, seeded by row, without what the row's user met in training."""
    part: Negatives = job.part
    histories = job.workspace.table("sequences", "histories", ["user_id", "items"])
    examples = job.workspace.table("sequences", "train", ["row", "user_id", "history", "target"]).sort_by("row")
    num_items = job.workspace.table("ingest", "items", ["item"]).num_rows
    met = met_in_training(histories, examples, num_items)
    met_ref = ray.put(met)  # fetched once a node, and read from shared memory; so is the sampler
    counted = SAMPLERS[part.sampler].falls_back
    job.out.facts |= {"sampler": part.sampler, "negatives_a_row": part.num}
    if not examples.num_rows:
        job.out.write_table("train", (COUNTED_NEGATIVES if counted else NEGATIVES).empty_table())
        return
    frequency = np.bincount(from_arrow(histories["items"]).items, minlength=num_items)
    sampler = prepared(part.sampler, _told(job, examples, frequency, met_ref))
    dataset, rows = read_rows(job.workspace, "sequences", "train", ["row", "user_id"])
    drawn = dataset.map_batches(
        draw_batch,
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        fn_kwargs={"num": part.num, "seed": job.seed, "counted": counted},
        fn_args=(met_ref, ray.put(sampler)),
    )
    write_rows(job, "train", drawn, rows, COUNTED_NEGATIVES if counted else NEGATIVES)
    job.out.facts |= _fallbacks(job, part.num) if counted else {}
    job.out.facts |= _encountered(job, _drawn(job, part.num), examples["user_id"], met, sampler)


def draw_batch(
    batch: pa.Table, met_ref: ray.ObjectRef, sampler_ref: ray.ObjectRef, *, num: int, seed: int, counted: bool
) -> pa.Table:
    """Return (row, negatives) of a batch of (row, user_id); and, if counted, how many are the sampler's own.

    Raises:
        DataError: if a row has fewer than `num` items left.
    """
    met: ItemsOfUsers = ray.get(met_ref)
    sampler: Prepared = ray.get(sampler_ref)
    own = of_rows(met, batch["user_id"])
    try:
        drawn = sampler.draw(batch["row"].to_numpy(), own.items, own.offsets, num=num, seed=seed)
    except ValueError as error:
        raise DataError(str(error)) from None
    offsets = np.arange(0, drawn.negatives.size + 1, num, dtype=np.int32)
    lists = pa.ListArray.from_arrays(offsets, drawn.negatives.reshape(-1))
    if not counted:
        return pa.table([batch["row"], lists], schema=NEGATIVES)
    return pa.table([batch["row"], lists, pa.array(drawn.own, pa.int32())], schema=COUNTED_NEGATIVES)


def _told(job: Job, examples: pa.Table, frequency: np.ndarray, met_ref: ray.ObjectRef) -> dict[str, Any]:
    """Return what the sampler has to be told; only that is read or made."""
    part: Negatives = job.part
    num_items = len(frequency)
    targets = Targets(examples["row"].to_numpy(), examples["target"].to_numpy())
    makers: dict[str, Callable[[], Any]] = {
        "num_items": lambda: num_items,
        "frequency": lambda: frequency,
        "exponent": lambda: part.exponent,
        "uniform_share": lambda: part.uniform_share,
        "candidates": lambda: part.candidates,
        "top_k": lambda: part.top_k,
        "targets": lambda: targets,
        "target_frequency": lambda: np.bincount(targets.items, minlength=num_items),
        "batches": lambda: batches_of(targets, size=part.batch_rows, seed=job.seed),
        "genres": lambda: _genres(job),
        "near": lambda: neighbours(_item_vectors(job), first_rank=part.nearest_from, last_rank=part.nearest_to),
        "scores": lambda: _scores(job, targets.rows),
        "pools": lambda: _pools(job, met_ref),
    }
    return {need: makers[need]() for need in needs_of(part.sampler)}


def _genres(job: Job) -> Genres:
    return genres_of_items(job.workspace.table("ingest", "items", ["item", "genres"]).sort_by("item")["genres"])


def _item_vectors(job: Job) -> np.ndarray:
    return matrix(job.workspace.table("users", "items").sort_by("item")["vector"])


def _scores(job: Job, rows: np.ndarray) -> Scores:
    users = matrix(aligned(rows, job.workspace.table("users", "train"), "users")["vector"])
    return Scores(rows, users, _item_vectors(job))


def _pools(job: Job, met_ref: ray.ObjectRef) -> Any:
    # A language model takes seconds to import, and few samplers need one.
    from recray.stages.pools import pools_of, rank_candidates

    ranked, rows = rank_candidates(job.workspace, met_ref, job.part, seed=job.seed, resources=job.resources)
    write_rows(job, "pools", ranked, rows, POOLS)
    written = pads.dataset(job.out.path("pools"), filesystem=job.out.fs, schema=POOLS, format="parquet").to_table()
    return pools_of(written, job.workspace.table("ingest", "items", ["item"]).num_rows)


def _fallbacks(job: Job, num: int) -> dict[str, int]:
    """Return how many negatives, in how many rows, are not the sampler's own."""
    table = pads.dataset(job.out.path("train"), filesystem=job.out.fs).to_table(columns=["own"])
    lacking = num - table["own"].to_numpy()
    return {"negatives_from_fallback": int(lacking.sum()), "rows_with_fallback": int((lacking > 0).sum())}


def _drawn(job: Job, num: int) -> np.ndarray:
    """Return the negatives written, [rows, num], in order of rows."""
    table = pads.dataset(job.out.path("train"), filesystem=job.out.fs).to_table(columns=["row", "negatives"])
    table = table.sort_by("row")
    return from_arrow(table["negatives"]).items.reshape(-1, num)


def _encountered(
    job: Job, negatives: np.ndarray, user_ids: pa.ChunkedArray, met: ItemsOfUsers, sampler: Prepared
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
