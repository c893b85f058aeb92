"""Negatives drawn uniformly from the catalogue.

Axes: R rows, N negatives a row, M items met, I items.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from recray.negatives.draws import distinct


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    num_items: int,
    seed: int,
) -> Int[ndarray, "R N"]:
    """Return `num` different items a row, each as likely as any other that the row's user did not meet.

    Seeded by (seed, row) alone, and prefix-nested: the first N of any larger draw. See `recray.negatives.draws`.

    >>> sorted(draw(np.array([7]), np.array([0, 2]), np.array([0, 2]), num=2, num_items=4, seed=0)[0].tolist())
    [1, 3]

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        num_items: I, items of the catalogue.
        seed: of all draws.

    Raises:
        ValueError: if a row has fewer than `num` items left; names the row and the counts.
    """

    def place(chance: Float[ndarray, "R K"]) -> Int[ndarray, "R K"]:
        return (chance * num_items).astype(np.int64)

    return distinct(rows, met_items, met_offsets, num=num, seed=seed, place=place, weights=weights(num_items=num_items))


def weights(*, num_items: int) -> Float[ndarray, " I"]:
    """Return how likely each item is, up to a factor."""
    return np.ones(num_items)
