"""The items that a language model ranks highest for each row, among uniform candidates, by Ray Data.

Shared: `negatives` makes the pools of the SFT model; alignment makes them again of the model it trains, as others.
"""

import numpy as np
import pyarrow as pa
import ray
from ray.data import Dataset

from recray.config import Negatives, Resources
from recray.data.examples import list_arrays
from recray.data.prompts import find_template
from recray.errors import ConfigError, DataError
from recray.negatives import uniform
from recray.negatives.draws import another_seed
from recray.negatives.met import ItemsOfUsers, of_rows
from recray.negatives.self_play import Pools, ranked
from recray.schema import POOLS
from recray.stages.item_scores import ROWS_AT_ONCE, score_items
from recray.stages.rowwise import read_rows
from recray.users.ragged import from_arrow
from recray.workspace import Workspace

TOKENS_PER_MICRO_BATCH = 16384
_CANDIDATES = 4  # the use of chance


def rank_candidates(
    workspace: Workspace,
    met: ray.ObjectRef,
    part: Negatives,
    *,
    seed: int,
    resources: Resources,
    version: int = 0,
    model: tuple[str, ...] = ("sft", "model"),
) -> tuple[Dataset, np.ndarray]:
    """Return `schema.POOLS` rows, in any order, and the ids of all rows of sequences/train.

    The candidates are uniform among what the row's user did not meet, and others in every version.

    Args:
        workspace: Where rows and model are.
        met: `ItemsOfUsers`, in Ray's object store.
        part: Its sampler is named in errors; `candidates` items are ranked for each row.
        seed: Of the candidates.
        resources: How many actors there may be, and on what.
        version: How often pools were made before.
        model: The folder of the recommender.

    Raises:
        ConfigError: if the model's prompts show candidates: each row would be scored under a prompt of its own.
        DataError: if a row has fewer items left than there shall be candidates.
    """
    if find_template(workspace.require("sft").part["prompt"]["template"]).shows_candidates:
        raise ConfigError(
            f"negatives.sampler={part.sampler} ranks items one by one, but sft.prompt.template shows candidates; "
            "set another sampler or sft.prompt.template=titles"
        )
    dataset, rows = read_rows(workspace, "sequences", "train", ["row", "user_id", "history"])
    drawn = dataset.map_batches(
        draw_candidates,
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        fn_kwargs={"num": part.candidates, "seed": another_seed(another_seed(seed, version), _CANDIDATES)},
        fn_args=(met,),
    )
    scored = score_items(
        drawn, workspace, model, tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH, resources=resources
    ).map_batches(best_first, batch_format="pyarrow", batch_size=None, fn_kwargs={"version": version})
    return scored, rows


def draw_candidates(batch: pa.Table, met_ref: ray.ObjectRef, *, num: int, seed: int) -> pa.Table:
    """Return (row, history, items) of a batch of (row, user_id, history).

    Raises:
        DataError: if a row has fewer than `num` items left.
    """
    met: ItemsOfUsers = ray.get(met_ref)
    own = of_rows(met, batch["user_id"])
    try:
        items = uniform.draw(
            batch["row"].to_numpy(), own.items, own.offsets, num=num, num_items=met.num_items, seed=seed
        )
    except ValueError as error:
        raise DataError(f"candidates to be ranked: {error}, or negatives.candidates") from None
    lists = pa.array(list(items), pa.list_(pa.int32()))
    return pa.table({"row": batch["row"], "history": batch["history"], "items": lists})


def best_first(batch: pa.Table, *, version: int) -> pa.Table:
    """Return `schema.POOLS` rows of a batch of (row, items, scores)."""
    if not batch.num_rows:
        return POOLS.empty_table()
    items, scores = np.stack(list_arrays(batch["items"])), np.stack(list_arrays(batch["scores"]))
    columns = [
        batch["row"],
        pa.array(np.full(len(items), version, dtype=np.int32)),
        pa.array(list(ranked(items, scores)), pa.list_(pa.int32())),
        pa.array(list(ranked(scores, scores)), pa.list_(pa.float32())),
    ]
    return pa.table(columns, schema=POOLS)


def pools_of(table: pa.Table, num_items: int) -> Pools:
    """Return what a sampler draws from, of `schema.POOLS` rows with equally many items each."""
    table = table.sort_by("row")
    items = from_arrow(table["items"]).items.reshape(table.num_rows, -1)
    return Pools(table["row"].to_numpy(), items, num_items)
