"""Which rows make up which step: a pure function of the seed, never of the number of ranks.

Axes:
    G  rows of a global batch
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int
from numpy import ndarray


class Order(NamedTuple):
    """A shuffle of `num_rows` rows that needs memory of one window only.

    Rows are cut into windows of `window_rows`; in every epoch the windows come in a new order and each is shuffled
    within. With `window_rows >= num_rows` that is a plain permutation.
    """

    num_rows: int
    global_batch: int
    seed: int
    window_rows: int = 65536

    @property
    def steps_per_epoch(self) -> float:
        """Steps that read every row once; a fraction where the last batch runs on into the next epoch."""
        return self.num_rows / self.global_batch


def rows_of_step(order: Order, step: int) -> Int[ndarray, " G"]:
    """Return the row ids of a global batch, the same on every rank.

    Batches run on across epochs: the batch that ends one epoch is filled up from the next, so every batch is full and
    every row is read exactly once an epoch.

    Raises:
        ValueError: if there are no rows, or the step is negative.
    """
    if order.num_rows < 1 or step < 0:
        raise ValueError(f"expected at least one row and a step >= 0, got {order.num_rows} rows and step {step}")
    first = step * order.global_batch
    positions = np.arange(first, first + order.global_batch, dtype=np.int64)
    epochs, offsets = np.divmod(positions, order.num_rows)
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        rows[inside] = _rows_at(order, int(epoch), offsets[inside])
    return rows


def _rows_at(order: Order, epoch: int, offsets: Int[ndarray, " n"]) -> Int[ndarray, " n"]:
    """Return the rows at these offsets of one epoch."""
    num_windows = -(-order.num_rows // order.window_rows)
    sequence = np.random.default_rng([order.seed, epoch]).permutation(num_windows)
    sizes = np.minimum(order.window_rows, order.num_rows - sequence * order.window_rows)
    ends = np.cumsum(sizes)
    places = np.searchsorted(ends, offsets, side="right")
    rows = np.empty_like(offsets)
    for place in np.unique(places):
        inside = places == place
        window = int(sequence[place])
        shuffled = np.random.default_rng([order.seed, epoch, window]).permutation(int(sizes[place]))
        start = int(ends[place] - sizes[place])
        rows[inside] = window * order.window_rows + shuffled[offsets[inside] - start]
    return rows
