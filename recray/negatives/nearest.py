"""Hard negatives: items near the row's target, but for the very nearest, which the user may well like, too.

Axes: R rows, N negatives a row, M items met, I items, D width of vectors, W ranks of the window.

Near is meant by cosine of item vectors, those of the auxiliary recommender: items that users take in like places. It
is nearness to the target, not to the user's vector. That vector was fitted on the very row, so what lies near it is
what the recommender expects, the next step of the user included; and the samplers by score (`adaptive`, `self_play`)
have that already. Ranks before the window are left out as likely false negatives.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from recray.negatives.draws import LISTED, Drawn, chances
from recray.negatives.lists import Targets, from_lists, places

PAIRS_AT_ONCE = 1 << 24  # cosines in memory: 64 MiB


def neighbours(vectors: Float[ndarray, "I D"], *, first_rank: int, last_rank: int) -> Int[ndarray, "I W"]:
    """Return for each item those at these ranks of nearness, nearest first; rank 1 is the nearest other.

    Ranks beyond the catalogue are left out. It costs I * I * D products, once.

    Raises:
        ValueError: if no rank is left.
    """
    last_rank = min(last_rank, len(vectors) - 1)
    if not 1 <= first_rank <= last_rank:
        raise ValueError(f"{len(vectors)} items have no neighbours of ranks {first_rank} to {last_rank}")
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    found = np.empty((len(vectors), last_rank - first_rank + 1), dtype=np.int32)
    share = max(1, PAIRS_AT_ONCE // len(vectors))
    for first in range(0, len(vectors), share):
        cosines = units[first : first + share] @ units.T
        own = np.arange(len(cosines))
        cosines[own, first + own] = np.inf  # rank 0
        near = np.argpartition(-cosines, last_rank, axis=1)[:, : last_rank + 1]
        order = np.lexsort([near, -np.take_along_axis(cosines, near, axis=1)], axis=1)
        found[first : first + share] = np.take_along_axis(near, order, axis=1)[:, first_rank:]
    return found


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    targets: Targets,
    near: Int[ndarray, "I W"],
    seed: int,
) -> Drawn:
    """Return `num` different items a row, each as likely as any other neighbour of its target in the window.

    Where the user met too many of those, the others are uniform.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        targets: of all rows.
        near: of all items, as `neighbours` returns them.
        seed: of all draws.

    Raises:
        ValueError: if a row has fewer than `num` items left, or no target is known of it.
    """
    width = near.shape[1]

    def candidates(part: slice) -> tuple[Int[ndarray, "r P"], Float[ndarray, "r P"]]:
        items = near[targets.items[places(targets.rows, rows[part])]]
        return items, chances(seed, rows[part], np.arange(width), LISTED)

    return from_lists(
        rows,
        met_items,
        met_offsets,
        num=num,
        seed=seed,
        candidates=candidates,
        width=width,
        weights=np.ones(len(near)),
    )
