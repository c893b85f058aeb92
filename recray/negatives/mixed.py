"""Negatives in part from the batch and in part uniform: in-batch ones alone never say that an unpopular item is wrong.

Axes: R rows, N negatives a row, M items met, I items.

Reference: Yang et al., "Mixed Negative Sampling for Learning Two-tower Neural Networks in Recommendations", WWW 2020.
"""

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray

from recray.negatives import in_batch, uniform
from recray.negatives.draws import Drawn, another_seed
from recray.negatives.in_batch import Batches

_UNIFORM = 2


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    batches: Batches,
    target_frequency: Int[ndarray, " I"],
    uniform_share: float,
    seed: int,
) -> Drawn:
    """Return `num` different items a row, floor(n * uniform_share) of any first n uniform, the others in-batch.

    Places, not items, are shared out: the two kinds alternate in the same order in each row. An item that is there
    already is passed over for the next of its kind.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        batches: of all rows.
        target_frequency: [I] how many rows' target each item is; for the fallback of in-batch.
        uniform_share: above 0, below 1.
        seed: of all draws.

    Raises:
        ValueError: if a row has fewer than `num` items left of either kind, or a share is 0.
    """
    if not 0 < uniform_share < 1:
        raise ValueError(f"the share of uniform negatives must lie between 0 and 1, got {uniform_share}")
    popular = in_batch.draw(
        rows, met_items, met_offsets, num=num, batches=batches, target_frequency=target_frequency, seed=seed
    )
    num_items = len(target_frequency)
    any_items = uniform.draw(
        rows, met_items, met_offsets, num=num, num_items=num_items, seed=another_seed(seed, _UNIFORM)
    )
    return _alternated(popular, any_items, uniform_places(num, uniform_share))


def uniform_places(num: int, share: float) -> Bool[ndarray, " N"]:
    """Return which of a row's places are uniform.

    >>> uniform_places(6, 1 / 3).astype(int).tolist()
    [0, 0, 1, 0, 0, 1]
    """
    before = np.floor(np.arange(num + 1) * share + 1e-9)  # 0.57 * 100 is below 57
    return np.asarray(before[1:] > before[:-1])


def _alternated(popular: Drawn, any_items: Int[ndarray, "R N"], is_uniform: Bool[ndarray, " N"]) -> Drawn:
    """Return each place's next item of its kind that is not there yet; N of each kind always suffice."""
    count, num = any_items.shape
    every, chosen = np.arange(count), np.full((count, num), -1, dtype=np.int32)
    next_of = {False: np.zeros(count, dtype=np.int64), True: np.zeros(count, dtype=np.int64)}
    fell_back = np.zeros(count, dtype=np.int64)
    for place in range(num):
        kind = bool(is_uniform[place])
        source, at = any_items if kind else popular.negatives, next_of[kind]
        again = (chosen[:, :place] == source[every, at][:, None]).any(axis=1)
        while again.any():
            at += again
            again = (chosen[:, :place] == source[every, at][:, None]).any(axis=1)
        chosen[:, place] = source[every, at]
        fell_back += 0 if kind else at >= popular.own
        at += 1
    return Drawn(chosen, num - fell_back)
