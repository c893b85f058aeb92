"""Vectors of rows' users by Ray Data actors. Light to import, as each of them does: no Ray Train, no transformers."""

import numpy as np
import pyarrow as pa
import torch

from recray.schema import ROW_VECTORS
from recray.users.ragged import from_arrow
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


def lists_of(vectors: np.ndarray) -> pa.ListArray:
    """Return vectors as an Arrow column of lists."""
    count, dim = vectors.shape
    return pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * dim, vectors.reshape(-1))
