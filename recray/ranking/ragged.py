"""Rows of different lengths as one padded array, without a Python call a row.

Axes: R rows, C columns of the longest row.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def padded(flat: NDArray[Any], lengths: NDArray[Any], *, fill: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return ([R, C] rows laid left, [R, C] where there is a value) of consecutive rows in `flat`.

    Raises:
        ValueError: if the lengths do not add up to the values.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if int(lengths.sum()) != len(flat):
        raise ValueError(f"lengths add up to {int(lengths.sum())}, but there are {len(flat)} values")
    valid = np.arange(int(lengths.max(initial=0)))[None, :] < lengths[:, None]
    table = np.full(valid.shape, fill, dtype=np.asarray(flat).dtype)
    table[valid] = flat
    return table, valid


def concatenated(rows: list[NDArray[Any]]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return (all values, [R] lengths) of a list of arrays."""
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    return (np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)), lengths
