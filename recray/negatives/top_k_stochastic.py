"""Random ones of a model's current top K: hard, but not always the same, so a false negative among them does less harm.

Axes: R rows, N negatives a row, M items met, I items, C items of a pool, K items that are drawn from.

Reference: RoDPO, https://arxiv.org/abs/2603.29259. There the pool follows the model while it is trained. `Pools` can be
made again from a later model; a draw says of which epoch it is, so each has its own negatives from one pool.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from recray.negatives.draws import LISTED, Drawn, another_seed, chances
from recray.negatives.lists import from_lists
from recray.negatives.self_play import Pools

_EPOCH = 3


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    pools: Pools,
    top_k: int,
    seed: int,
    epoch: int = 0,
) -> Drawn:
    """Return `num` different items a row, each as likely as any other of the best `top_k` of its pool.

    Where the user met too many of those, the others are uniform.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        pools: of all rows.
        top_k: K.
        seed: of all draws.
        epoch: each has draws of its own.

    Raises:
        ValueError: if a row has fewer than `num` items left, or no pool; if K is 0 or more than a pool has.
    """
    if not 1 <= top_k <= pools.items.shape[1]:
        raise ValueError(f"pools have {pools.items.shape[1]} items, so the best {top_k} of them can't be drawn from")
    own_seed = another_seed(another_seed(seed, epoch), _EPOCH)

    def candidates(part: slice) -> tuple[Int[ndarray, "r P"], Float[ndarray, "r P"]]:
        return pools.of(rows[part])[:, :top_k], chances(own_seed, rows[part], np.arange(top_k), LISTED)

    return from_lists(
        rows,
        met_items,
        met_offsets,
        num=num,
        seed=own_seed,
        candidates=candidates,
        width=top_k,
        weights=np.ones(pools.num_items),
    )
