"""Ranks of a target among its candidates, and the metrics that follow from them, one value a row.

Axes: R rows, C candidates (columns of shorter rows are padded and not `valid`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def ranks(scores: NDArray[Any], target_column: NDArray[Any], valid: NDArray[np.bool_]) -> Ints:
    """Return the rank of the target in every row, from 1, with ties against us.

    rank_r = 1 + #{c != target_r : valid_rc and score_rc >= score_r,target}

    A model that scores everything alike is therefore last, never first by accident.

    Args:
        scores: [R, C], higher is better, any unit; what lies outside `valid` is not read.
        target_column: [R], the column of the target.
        valid: [R, C], True where there is a candidate.

    Raises:
        ValueError: if shapes disagree, a target is not valid, or a valid score is NaN; names the row.
    """
    scores, target_column, valid = (
        np.asarray(scores),
        np.asarray(target_column),
        np.asarray(valid, dtype=bool),
    )
    if scores.ndim != 2 or valid.shape != scores.shape or target_column.shape != scores.shape[:1]:
        raise ValueError(
            f"expected scores [R, C], target_column [R] and valid [R, C], got shapes {scores.shape}, "
            f"{target_column.shape} and {valid.shape}"
        )
    _refuse(
        (target_column < 0) | (target_column >= scores.shape[1]),
        "its target column is outside the candidates",
    )
    rows = np.arange(len(scores))
    _refuse(~valid[rows, target_column], "its target is not a valid candidate")
    _refuse((np.isnan(scores) & valid).any(axis=1), "a score is NaN")
    beaten_by: NDArray[np.bool_] = valid & (scores >= scores[rows, target_column][:, None])
    # The target ties with itself, which is the 1 that ranks start from.
    count: Ints = beaten_by.sum(axis=1, dtype=np.int64)
    return count


def hit_rate(ranks: NDArray[Any], k: int) -> Floats:
    """Return 1 where the target is among the first `k`, else 0; [R]."""
    return (np.asarray(ranks) <= k).astype(np.float64)


def ndcg(ranks: NDArray[Any], k: int) -> Floats:
    """Return NDCG@k for one relevant item: 1 / log2(1 + rank) where rank <= k, else 0; [R]."""
    ranks = np.asarray(ranks)
    return np.where(ranks <= k, 1.0 / np.log2(1.0 + ranks), 0.0)


def reciprocal_rank(ranks: NDArray[Any]) -> Floats:
    """Return 1 / rank; [R]."""
    return 1.0 / np.asarray(ranks, dtype=np.float64)


def best_first(scores: NDArray[Any], target_column: NDArray[Any], valid: NDArray[np.bool_], keep: int) -> Ints:
    """Return the columns of the best candidates of every row, best first; [R, keep], -1 where fewer.

    Among equal scores the target comes last and the others keep the order of their columns, so that the
    target's place agrees with `ranks`.
    """
    scores = np.where(valid, scores, 0.0)
    is_target = np.arange(scores.shape[1])[None, :] == np.asarray(target_column)[:, None]
    # The last key is the first to decide: what is no candidate goes to the end, whatever its score.
    order: Ints = np.lexsort((is_target, -scores, ~valid), axis=1)[:, :keep]
    return np.where(np.take_along_axis(valid, order, axis=1), order, -1)


def _refuse(faulty: NDArray[np.bool_], reason: str) -> None:
    if faulty.any():
        raise ValueError(f"row {int(np.flatnonzero(faulty)[0])} can't be ranked: {reason}")


def headline(ks: Sequence[int]) -> int:
    """Return the k by which models are judged: the largest up to 10, else the largest."""
    return max([k for k in ks if k <= 10] or ks)
