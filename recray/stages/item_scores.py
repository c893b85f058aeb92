"""Scores of given items for given rows under a recommender of the workspace, by Ray Data actors.

Shared: `reference` scores what is compared with the frozen model, pools what a model may rank highest.
"""

import pyarrow as pa
import torch
from ray.data import ActorPoolStrategy, Dataset

from recray.config import Resources
from recray.data.examples import list_arrays
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
