"""The hardest of the batch: in-batch candidates that a recommender scores highest for the row's user.

Axes: R rows, N negatives a row, M items met, I items, T all rows, D width of vectors, P candidates a row.

"Adaptive" of the study of Prakash et al., https://arxiv.org/abs/2410.17276, takes the scores of the model that is being
trained. A table is drawn once, so here they are those of the auxiliary recommender as it was fitted.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from recray.negatives.draws import Drawn
from recray.negatives.in_batch import Batches
from recray.negatives.in_batch import weights as in_batch_weights
from recray.negatives.lists import from_lists, places


class Scores(NamedTuple):
    """Vectors whose dot product is how much the user of a row would like an item."""

    rows: Int[ndarray, " T"]  # ids, ascending
    users: Float[ndarray, "T D"]
    items: Float[ndarray, "I D"]

    def of(self, rows: Int[ndarray, " R"], items: Int[ndarray, "R P"]) -> Float[ndarray, "R P"]:
        """Return each row's score of each of its items."""
        users = self.users[places(self.rows, rows)]
        return np.asarray(np.matmul(self.items[items], users[:, :, None])[:, :, 0])


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    batches: Batches,
    target_frequency: Int[ndarray, " I"],
    scores: Scores,
    seed: int,
) -> Drawn:
    """Return the `num` targets of each row's batch with the highest scores, highest first.

    Where the batch has too few that the user did not meet, the others are drawn by how often an item is a target.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        batches: of all rows.
        target_frequency: [I] how many rows' target each item is.
        scores: of the recommender.
        seed: of the fallback.

    Raises:
        ValueError: if a row has fewer than `num` items left, or is unknown to `batches` or `scores`.
    """

    def candidates(part: slice) -> tuple[Int[ndarray, "r P"], Float[ndarray, "r P"]]:
        items = batches.of(rows[part])
        return items, -scores.of(rows[part], items)

    return from_lists(
        rows,
        met_items,
        met_offsets,
        num=num,
        seed=seed,
        candidates=candidates,
        width=batches.targets.shape[1] * (1 + scores.items.shape[1] // 4),
        weights=in_batch_weights(target_frequency=target_frequency),
    )
