"""Negatives drawn again while a model is aligned, from what it ranks highest by then, by Ray Data.

Reference: RoDPO, https://arxiv.org/abs/2603.29259: the pool that a negative is drawn from follows the model.
"""

import logging
import time
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import ray

from recray.config import Negatives, Resources
from recray.negatives.draws import another_seed
from recray.negatives.met import met_in_training, of_rows
from recray.negatives.registry import prepared
from recray.schema import NEGATIVES
from recray.stages.item_scores import complete, rows_with_items, score_table
from recray.stages.pools import pools_of, rank_candidates
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

_DRAWS = 5  # the use of chance


class Drawn(NamedTuple):
    """The negatives of all rows of sequences/train, and what the frozen model makes of them and of the targets."""

    negatives: pa.Table  # schema.NEGATIVES
    reference: pa.Table | None  # schema.REFERENCE; None where the trainer scores them itself


def draw_again(workspace: Workspace, resources: Resources, *, model: tuple[str, ...], version: int, seed: int) -> Drawn:
    """Return new negatives by the workspace's sampler, from the list that `model` ranks highest now.

    Args:
        workspace: Where rows, the frozen SFT model and `model` are.
        resources: How many actors there may be, and on what.
        model: The folder of the recommender as it is now.
        version: How often negatives were drawn before; each has candidates and draws of its own.
        seed: Of the run.
    """
    started = time.monotonic()
    part = Negatives.model_validate(workspace.require("negatives").part)
    histories = workspace.table("sequences", "histories", ["user_id", "items"])
    examples = workspace.table("sequences", "train", ["row", "user_id", "history", "target"]).sort_by("row")
    num_items = workspace.table("ingest", "items", ["item"]).num_rows
    met = met_in_training(histories, examples, num_items)
    ranked, _ = rank_candidates(
        workspace, ray.put(met), part, seed=seed, resources=resources, version=version, model=model
    )
    pools = pools_of(pa.concat_tables(ray.get(ranked.to_arrow_refs())), num_items)
    sampler = prepared(part.sampler, {"pools": pools, "top_k": part.top_k, "num_items": num_items})
    own = of_rows(met, examples["user_id"])
    rows = examples["row"].to_numpy()
    chance = another_seed(another_seed(seed, version), _DRAWS)
    drawn = sampler.draw(rows, own.items, own.offsets, num=part.num, seed=chance).negatives
    negatives = pa.table([rows, pa.array(list(drawn), pa.list_(pa.int32()))], schema=NEGATIVES)
    reference, scoring = None, workspace.require("reference").part
    if scoring["source"] == "table":
        score = partial(
            score_table,
            workspace=workspace,
            tokens_per_micro_batch=scoring["tokens_per_micro_batch"],
            resources=resources,
        )
        reference = complete(rows_with_items(examples, drawn), workspace.table("reference", "train"), score).table
    logger.info(
        "align: negatives of %s rows are drawn again, from the model's own top list (version %d, %.1f s)",
        f"{len(rows):,}",
        version,
        time.monotonic() - started,
    )
    return Drawn(negatives, reference)
