"""Is a paired difference more than chance: a permutation test that flips users, and Holm's correction for many pairs.

Axes: R rows, M comparisons, U users, F flips.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recray.ranking.intervals import by_user

Floats = NDArray[np.float64]

FLIPS = 9_999  # so that no p-value is below 1 / 10,000
_SIGNS_AT_ONCE = 4_000_000  # signs held in memory at a time: 16 MB, of which caches keep most


def sign_flip_p_values(differences: NDArray[Any], users: NDArray[Any], *, seed: int, flips: int = FLIPS) -> Floats:
    r"""Return the two-sided p-value of every comparison; [M].

    Under the null hypothesis it is chance which of the two models is which for a user, so the sign of all of a user's
    differences together may be flipped:

        T_f = | sum_u s_fu d_u |,  s_fu = +-1 with chance 1/2,  d_u = sum of the differences of u
        p = (1 + #{f : T_f >= T}) / (1 + F)

    One user can't show anything: p = 1. All comparisons see the same flips.

    Args:
        differences: [R, M] or [R], one model's measure minus the other's on the same row.
        users: [R], any labels that can be sorted.
        seed: of the flips.
        flips: F.

    Raises:
        ValueError: if there are no rows, or differences and users disagree in length.
    """
    sums, _ = by_user(differences, users)
    # A flip that gives the observed sum again must count, whatever the order in which floats were added.
    observed = np.abs(sums.sum(axis=0)) - 1e-6 * np.abs(sums).max(axis=0)
    reached = np.zeros(sums.shape[1], dtype=np.int64)
    generator = np.random.default_rng(seed)
    chunk = max(1, _SIGNS_AT_ONCE // len(sums))
    narrow = sums.astype(np.float32)
    total = narrow.sum(axis=0)
    for start in range(0, flips, chunk):
        kept = _kept(generator, min(chunk, flips - start), len(sums))
        # Signs are 2 kept - 1, so the sum under them is twice that of what keeps its sign, less that of all.
        reached += (np.abs(2 * (kept @ narrow) - total) >= observed).sum(axis=0)
    return np.asarray((1.0 + reached) / (1.0 + flips), dtype=np.float64)


def holm(p_values: NDArray[Any]) -> Floats:
    """Return p-values corrected so that the chance of any false finding among all stays below the level; [M].

    With p rising, the i-th of M (from 0) becomes the largest of (M - j) p_j over j <= i, at most 1.
    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    rising = p_values[order] * np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(rising))
    return corrected


def _kept(generator: np.random.Generator, flips: int, users: int) -> NDArray[np.float32]:
    """Return 1 where a user keeps the sign and 0 where it is flipped, from one random bit each; [flips, users]."""
    drawn = np.frombuffer(generator.bytes(flips * -(-users // 8)), dtype=np.uint8).reshape(flips, -1)
    return np.unpackbits(drawn, axis=1, count=users).astype(np.float32)
