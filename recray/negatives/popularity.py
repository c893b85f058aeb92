"""Negatives drawn by training frequency: popular items are met often, so not having taken one says more.

Axes: R rows, N negatives a row, M items met, I items.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from recray.negatives.draws import by_weight, distinct


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    frequency: Int[ndarray, " I"],
    exponent: float,
    seed: int,
) -> Int[ndarray, "R N"]:
    """Return `num` different items a row, each drawn in proportion to frequency ** exponent among those left.

    Seeded by (seed, row) alone, and prefix-nested: the first N of any larger draw. See `recray.negatives.draws`.
    An item that never occurs in training is never drawn, unless the exponent is 0, which makes all items alike.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        frequency: [I] how often each item occurs in training.
        exponent: not negative; 1 is proportional, below 1 flatter.
        seed: of all draws.

    Raises:
        ValueError: if a row has fewer than `num` items left; names the row and the counts.
    """
    likely = weights(frequency=frequency, exponent=exponent)
    return distinct(rows, met_items, met_offsets, num=num, seed=seed, place=by_weight(likely), weights=likely)


def weights(*, frequency: Int[ndarray, " I"], exponent: float) -> Float[ndarray, " I"]:
    """Return how likely each item is, up to a factor.

    >>> weights(frequency=np.array([0, 1, 4]), exponent=0.5).tolist()
    [0.0, 1.0, 2.0]

    Raises:
        ValueError: if the exponent is negative.
    """
    if exponent < 0:
        raise ValueError(f"the exponent of popularity must not be negative, got {exponent}")
    likely: ndarray = frequency.astype(np.float64) ** exponent
    return likely
