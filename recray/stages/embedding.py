"""Vectors of rows' users by Ray Data actors. Light to import, as each of them does: no Ray Train, no transformers."""

import numpy as np
import pyarrow as pa
import torch

from recray.data.examples import matrix
from recray.schema import CROSSFIT_ROWS, ROW_VECTORS
from recray.users.crossfit import folds_of
from recray.users.ragged import from_arrow, take
from recray.users.sasrec import load, user_vectors
from recray.workspace import Workspace


class EmbedHistories:
    """Ray Data actor: (row, history) in, (row, vector) out."""

    def __init__(self, workspace: Workspace, model: tuple[str, ...], threads: int, gpu: bool) -> None:
        if not gpu:
            torch.set_num_threads(threads)
        self._model = load(workspace.folder(*model)).to("cuda" if gpu else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        vectors = user_vectors(self._model, from_arrow(batch["history"]))
        return pa.table([batch["row"], lists_of(vectors)], schema=ROW_VECTORS)


class EmbedUnseen:
    """Ray Data actor: (row, user_id, history) in, (row, fold, vector) out, by the model fitted without that fold."""

    def __init__(
        self, workspace: Workspace, models: tuple[tuple[str, ...], ...], seed: int, threads: int, gpu: bool
    ) -> None:
        if not gpu:
            torch.set_num_threads(threads)
        self._models = [load(workspace.folder(*model)).to("cuda" if gpu else "cpu") for model in models]
        self._seed = seed

    def __call__(self, batch: pa.Table) -> pa.Table:
        folds, histories = folds_of(batch["user_id"], seed=self._seed), from_arrow(batch["history"])
        vectors = np.empty((len(folds), self._models[0].shape.dim), dtype=np.float32)
        for fold, model in enumerate(self._models):
            rows = np.flatnonzero(folds == fold)
            vectors[rows] = user_vectors(model, take(histories, rows))
        return pa.table([batch["row"], pa.array(folds), lists_of(vectors)], schema=CROSSFIT_ROWS)


def lists_of(vectors: np.ndarray) -> pa.ListArray:
    """Return vectors as an Arrow column of lists."""
    count, dim = vectors.shape
    return pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * dim, vectors.reshape(-1))


def vectors_of_folds(table: pa.Table) -> list[np.ndarray]:
    """Return the item vectors of each fold of a table, by rising item: of one fold where it names none."""
    table = table.sort_by("item")
    if "fold" not in table.column_names:
        return [matrix(table["vector"])]
    folds = table["fold"].to_numpy()
    return [matrix(table.filter(pa.array(folds == fold))["vector"]) for fold in np.unique(folds)]
