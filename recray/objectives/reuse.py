"""Which items a user borrows, to score them under its own prompt.

Axes:
    B  borrowers
    G  users of the global batch (owners)
    N  negatives drawn for each of those
    I  distinct items among them
    R  most items that a user borrows

Not from a paper: NAPO (https://arxiv.org/abs/2508.09653) lends scores, which the owner's prompt gave.
"""

import numpy as np
from jaxtyping import Bool, Int, UInt64
from numpy import ndarray


def offered_items(lends: Bool[ndarray, "B G"], column: Int[ndarray, "G N"], num_items: int) -> Bool[ndarray, "B I"]:
    """Return which distinct item is a negative of somebody who lends to the borrower.

    `column` is each negative's place among the `num_items` distinct ones, all of which are somebody's.
    """
    order = np.argsort(column, axis=None, kind="stable")
    owner = np.repeat(np.arange(column.shape[0]), column.shape[1])[order]
    starts = np.searchsorted(column.reshape(-1)[order], np.arange(num_items))
    offered: ndarray = np.logical_or.reduceat(lends[:, owner], starts, axis=1)
    return offered


def first_allowed(key: UInt64[ndarray, "B I"], allowed: Bool[ndarray, "B I"], most: int) -> list[Int[ndarray, " _"]]:
    """Return the places of each borrower's allowed items with the smallest keys, by rising key, `most` at most.

    A smaller `most` gives the first of these. Seeded keys draw uniformly without replacement.
    """
    ranked = np.where(allowed, key, np.iinfo(np.uint64).max)
    if most < key.shape[1]:
        near = np.argpartition(ranked, most - 1, axis=1)[:, :most]
    else:
        near = np.broadcast_to(np.arange(key.shape[1]), key.shape)
    order = np.take_along_axis(near, np.take_along_axis(ranked, near, axis=1).argsort(axis=1, kind="stable"), axis=1)
    counts = np.minimum(allowed.sum(axis=1), most)
    return [own[:count].copy() for own, count in zip(order, counts.tolist(), strict=True)]
