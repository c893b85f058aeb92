"""The items that a language model ranks highest for each row, among uniform candidates, by Ray Data.

Shared: `negatives` makes the pools of the SFT model; whoever trains on may make them again, as another version.
"""

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray
import torch
from ray.data import ActorPoolStrategy

from recray.config import Resources
from recray.data.examples import list_arrays
from recray.data.prompts import find_template
from recray.errors import ConfigError, DataError
from recray.lm.scorer import ItemScorer, score_rows
from recray.negatives import uniform
from recray.negatives.draws import another_seed
from recray.negatives.met import ItemsOfUsers, of_rows
from recray.negatives.self_play import Pools, ranked
from recray.schema import POOLS
from recray.stages.flow import Job
from recray.stages.recommender import open_from
from recray.stages.rowwise import read_rows, write_rows
from recray.users.ragged import from_arrow
from recray.workspace import Workspace

ROWS_AT_ONCE = 256
TOKENS_PER_MICRO_BATCH = 16384
_CANDIDATES = 4  # the use of chance


class RankCandidates:
    """Ray Data actor: (row, history, items) in, (row, version, items, scores) out, the best items first."""

    def __init__(self, workspace: Workspace, model: tuple[str, ...], version: int, threads: int) -> None:
        if not torch.cuda.is_available():
            torch.set_num_threads(threads)
        opened, self._catalogue = open_from(workspace, *model)
        self._scorer = ItemScorer(opened).eval()
        if torch.cuda.is_available():
            self._scorer.cuda()
        self._version = version

    def __call__(self, batch: pa.Table) -> pa.Table:
        items = list_arrays(batch["items"])
        histories = list_arrays(batch["history"])
        found = score_rows(
            self._scorer, self._catalogue, histories, items, tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH
        )
        matrix, scores = np.stack(items), np.stack(found)
        columns = [
            batch["row"],
            pa.array(np.full(len(items), self._version, dtype=np.int32)),
            pa.array(list(ranked(matrix, scores)), pa.list_(pa.int32())),
            pa.array(list(ranked(scores, scores)), pa.list_(pa.float32())),
        ]
        return pa.table(columns, schema=POOLS)


def write_pools(
    job: Job, met: ray.ObjectRef, *, candidates: int, version: int = 0, model: tuple[str, ...] = ("sft", "model")
) -> Pools:
    """Write and return `candidates` items for each row of sequences/train, ranked by a model of the workspace.

    The candidates are uniform among what the row's user did not meet, and others in every version.

    Args:
        job: its stage gets the table `pools`.
        met: `ItemsOfUsers`, in Ray's object store.
        candidates: C, items a row.
        version: how often pools were made before.
        model: the folder of the recommender.

    Raises:
        ConfigError: if the model's prompts show candidates: each row would be scored under a prompt of its own.
        DataError: if a row has fewer than `candidates` items left.
    """
    if find_template(job.workspace.require("sft").part["prompt"]["template"]).shows_candidates:
        raise ConfigError(
            f"negatives.sampler={job.part.sampler} ranks items one by one, but sft.prompt.template shows candidates; "
            "set another sampler or sft.prompt.template=titles"
        )
    dataset, rows = read_rows(job, "sequences", "train", ["row", "user_id", "history"])
    resources: Resources = job.resources
    scored = dataset.map_batches(
        draw_candidates,
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        fn_kwargs={"num": candidates, "seed": another_seed(another_seed(job.seed, version), _CANDIDATES)},
        fn_args=(met,),
    ).map_batches(
        RankCandidates,
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        compute=ActorPoolStrategy(size=resources.data_actors),
        num_cpus=0.5,  # leaves room for reading on a machine of one CPU
        num_gpus=1 if resources.gpus_per_worker > 0 else None,
        fn_constructor_args=(job.workspace, model, version, resources.threads_per_worker),
    )
    write_rows(job, "pools", scored, rows, POOLS)
    return read_pools(job, len(rows), candidates)


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


def read_pools(job: Job, num_rows: int, candidates: int) -> Pools:
    """Return the pools that the stage has written."""
    num_items = job.workspace.table("ingest", "items", ["item"]).num_rows
    table = pads.dataset(job.out.path("pools"), filesystem=job.out.fs, schema=POOLS, format="parquet").to_table()
    table = table.sort_by("row")
    items = from_arrow(table["items"]).items.reshape(num_rows, candidates)
    return Pools(table["row"].to_numpy(), items, num_items)
