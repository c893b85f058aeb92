"""A model's own top list as negatives: what it would recommend, and should not prefer to what the user took.

Axes: R rows, N negatives a row, M items met, I items, T all rows, C items of a pool.

Reference: Gao et al., "SPRec: Self-Play to Debias LLM-based Recommendation", https://arxiv.org/abs/2412.09243. There
the model writes its negatives; here it ranks a pool of candidates, so every negative is an item, and costs one score.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from recray.negatives.draws import Drawn
from recray.negatives.lists import from_lists, places


class Pools(NamedTuple):
    """For each row the items that a model ranked."""

    rows: Int[ndarray, " T"]  # ids, ascending
    items: Int[ndarray, "T C"]  # best first
    num_items: int  # of the catalogue

    def of(self, rows: Int[ndarray, " R"]) -> Int[ndarray, "R C"]:
        """Return each row's pool."""
        return np.asarray(self.items[places(self.rows, rows)])


def ranked(items: Int[ndarray, "R C"], scores: Float[ndarray, "R C"]) -> Int[ndarray, "R C"]:
    """Return each row's items by score, highest first; of two alike, the one that comes first."""
    return np.take_along_axis(items, np.argsort(-scores, axis=1, kind="stable"), axis=1)


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    pools: Pools,
    seed: int,
) -> Drawn:
    """Return the best `num` of each row's pool that its user did not meet, best first; uniform ones where it ends.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        pools: of all rows.
        seed: of the fallback.

    Raises:
        ValueError: if a row has fewer than `num` items left, or no pool.
    """
    width = pools.items.shape[1]

    def candidates(part: slice) -> tuple[Int[ndarray, "r P"], Float[ndarray, "r P"]]:
        items = pools.of(rows[part])
        return items, np.broadcast_to(np.arange(width, dtype=np.float64), items.shape)

    return from_lists(
        rows,
        met_items,
        met_offsets,
        num=num,
        seed=seed,
        candidates=candidates,
        width=width,
        weights=np.ones(pools.num_items),
    )
