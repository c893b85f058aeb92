"""Negatives that are the targets of the other rows of a batch: popular items, as often as users take them.

Axes: R rows, N negatives a row, M items met, I items, T all rows, B batches, G rows of a batch.

A batch is what `recray.train.order` puts into one step of the first epoch. Align reads the same batches in its first
epoch if its seed, batch size and window are the same; later epochs have other batches, but rows keep their negatives.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from recray.negatives.draws import LISTED, Drawn, chances
from recray.negatives.lists import Targets, from_lists, places
from recray.train.order import Order, rows_of_step


class Batches(NamedTuple):
    """Which batch each row is in, and the targets of each."""

    rows: Int[ndarray, " T"]  # ids, ascending
    batch: Int[ndarray, " T"]
    targets: Int[ndarray, "B G"]

    def of(self, rows: Int[ndarray, " R"]) -> Int[ndarray, "R G"]:
        """Return the targets of each row's batch, its own among them."""
        return np.asarray(self.targets[self.batch[places(self.rows, rows)]])


def batches_of(targets: Targets, *, size: int, seed: int) -> Batches:
    """Return the batches of `size` rows that a first epoch has; the last is filled up from the second.

    Raises:
        ValueError: if a batch would hold one row only, or there are no rows.
    """
    if size < 2:
        raise ValueError(f"a batch needs at least two rows, got {size}")
    count = -(-len(targets.rows) // size)
    read = rows_of_step(Order(len(targets.rows), count * size, seed), 0)
    batch = np.empty(len(targets.rows), dtype=np.int64)
    first_epoch = read[: len(targets.rows)]
    batch[first_epoch] = np.arange(len(first_epoch)) // size
    return Batches(targets.rows, batch, targets.items[read].reshape(count, size))


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    batches: Batches,
    target_frequency: Int[ndarray, " I"],
    seed: int,
) -> Drawn:
    """Return `num` different items a row: targets of its batch in a seeded order, in proportion to their number there.

    The row's own target is left out with all that its user met. Where the batch has too few, the others are drawn by
    how often an item is a target anywhere, which is what batches hold on average.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        batches: of all rows.
        target_frequency: [I] how many rows' target each item is.
        seed: of the order and the fallback.

    Raises:
        ValueError: if a row has fewer than `num` items left, or is in no batch.
    """
    width = batches.targets.shape[1]

    def candidates(part: slice) -> tuple[Int[ndarray, "r P"], Float[ndarray, "r P"]]:
        return batches.of(rows[part]), chances(seed, rows[part], np.arange(width), LISTED)

    return from_lists(
        rows,
        met_items,
        met_offsets,
        num=num,
        seed=seed,
        candidates=candidates,
        width=width,
        weights=weights(target_frequency=target_frequency),
    )


def weights(*, target_frequency: Int[ndarray, " I"]) -> Float[ndarray, " I"]:
    """Return how likely each item is, averaged over batches, up to a factor."""
    return target_frequency.astype(np.float64)
