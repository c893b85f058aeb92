"""Lists of items end to end in one array: what histories and candidates are while they are worked on.

Axes:
    R  lists
    T  items of all lists together
    L  items of the longest list of a batch
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int
from numpy import ndarray


@dataclass(frozen=True)
class Ragged:
    """List r is `items[offsets[r] : offsets[r + 1]]`."""

    items: Int[ndarray, " T"]  # int32
    offsets: Int[ndarray, " offsets"]  # int64, ascending, one more than there are lists

    @property
    def num_lists(self) -> int:
        """How many lists there are."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Int[ndarray, " R"]:
        """Items of each list."""
        return np.diff(self.offsets)


def from_lengths(items: Int[ndarray, " T"], lengths: Int[ndarray, " R"]) -> Ragged:
    """Return the lists of these lengths that lie end to end in `items`."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Ragged(np.asarray(items, dtype=np.int32), offsets)


def from_arrow(column: pa.ChunkedArray | pa.ListArray) -> Ragged:
    """Return an Arrow column of lists; a null list counts as empty."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    lengths = np.asarray(array.value_lengths().fill_null(0))
    return from_lengths(np.asarray(array.flatten()), lengths)


def take(lists: Ragged, rows: Int[ndarray, " r"]) -> Ragged:
    """Return the lists at `rows`, in that order."""
    return _slices(lists, lists.offsets[rows], lists.lengths[rows])


def latest(lists: Ragged, most: int) -> Ragged:
    """Return each list's last `most` items."""
    lengths = np.minimum(lists.lengths, most)
    return _slices(lists, lists.offsets[1:] - lengths, lengths)


def windows(lists: Ragged, width: int) -> Ragged:
    """Cut every list into windows of `width` items, counted from its end; only its first one may be shorter.

    Every item is in exactly one window, and an empty list has none.
    """
    counts = -(-lists.lengths // width)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    still_to_come = np.repeat(counts, counts) - 1 - (np.arange(counts.sum()) - firsts)
    ends = np.repeat(lists.offsets[1:], counts) - still_to_come * width
    return Ragged(lists.items, np.concatenate([lists.offsets[:1], ends]))


def padded(lists: Ragged) -> tuple[Int[ndarray, "R L"], Bool[ndarray, "R L"]]:
    """Return the lists as one array, padded with 0 on the right, and which of its places hold an item."""
    lengths = lists.lengths
    columns = np.arange(lengths.max(initial=0))
    valid = columns < lengths[:, None]
    places = np.where(valid, lists.offsets[:-1, None] + columns, 0)
    if not valid.any():
        return np.zeros(valid.shape, dtype=np.int64), valid
    return np.where(valid, lists.items[places], 0).astype(np.int64), valid


def _slices(lists: Ragged, starts: Int[ndarray, " r"], lengths: Int[ndarray, " r"]) -> Ragged:
    """Return the slices of `lists.items` that start and extend so."""
    short = from_lengths(np.empty(0, dtype=np.int32), lengths)
    places = np.arange(short.offsets[-1]) + np.repeat(starts - short.offsets[:-1], lengths)
    return Ragged(lists.items[places], short.offsets)
