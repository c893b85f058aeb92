"""The hardest of the batch and of uniform candidates: those that a recommender scores highest for the row's user.

Axes: R rows, N negatives a row, M items met, I items, P candidates a row.

See `recray.negatives.adaptive` for the source, and for whose scores these are.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from recray.negatives import uniform
from recray.negatives.adaptive import Scores
from recray.negatives.draws import Drawn, another_seed
from recray.negatives.in_batch import Batches
from recray.negatives.lists import from_lists

_UNIFORM = 2


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    batches: Batches,
    scores: Scores,
    candidates: int,
    seed: int,
) -> Drawn:
    """Return the `num` highest of the targets of each row's batch and `candidates` uniform items, highest first.

    Where these are too few that the user did not meet, the others are uniform, too.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        batches: of all rows.
        scores: of the recommender.
        candidates: how many uniform items stand for choice, beside the batch's.
        seed: of uniform items and the fallback.

    Raises:
        ValueError: if a row has fewer than `num` or `candidates` items left, or is unknown to `batches` or `scores`.
    """
    num_items = len(scores.items)

    def listed(part: slice) -> tuple[Int[ndarray, "r P"], Float[ndarray, "r P"]]:
        offsets = met_offsets[part.start : part.stop + 1]
        met = met_items[offsets[0] : offsets[-1]]
        any_items = uniform.draw(
            rows[part],
            met,
            offsets - offsets[0],
            num=candidates,
            num_items=num_items,
            seed=another_seed(seed, _UNIFORM),
        )
        items = np.concatenate([batches.of(rows[part]), any_items], axis=1)
        return items, -scores.of(rows[part], items)

    return from_lists(
        rows,
        met_items,
        met_offsets,
        num=num,
        seed=seed,
        candidates=listed,
        width=(batches.targets.shape[1] + candidates) * (1 + scores.items.shape[1] // 4),
        weights=uniform.weights(num_items=num_items),
    )
