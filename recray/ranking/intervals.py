"""Intervals of means whose rows are not independent: the bootstrap that resamples users, not rows.

Axes: R rows, M measures, U users, S resamples.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_WEIGHTS_AT_ONCE = 8_000_000  # resampling weights held in memory at a time: 64 MB


class Intervals(NamedTuple):
    """Means with their percentile intervals; bounds are NaN where fewer than two users leave them unknown."""

    value: Floats  # [M]
    low: Floats  # [M]
    high: Floats  # [M]


def clustered_means(
    values: NDArray[Any], users: NDArray[Any], *, samples: int, confidence: float, seed: int
) -> Intervals:
    r"""Return the mean over rows of every measure, with its user-clustered percentile interval.

    A resample draws U users with replacement, each with all of its rows, and takes

        mean_s = sum_u w_su * sum(values of u) / sum_u w_su * (rows of u),   w_s ~ Multinomial(U, 1/U)

    The weights depend on the seed and the number of users only, so measures and models that are given the
    same users and seed see the same resamples. For two models on the same rows, pass the difference of their
    values: the interval is then that of the pair, which is what a comparison needs.

    Args:
        values: [R, M] or [R].
        users: [R], any labels that can be sorted.
        samples: S, resamples.
        confidence: mass of the interval, in (0, 1).
        seed: of the resampling.

    Raises:
        ValueError: if there are no rows, or values and users disagree in length.
    """
    sums, rows_of_user = by_user(values, users)
    means = resampled_means(sums, rows_of_user, samples=samples, seed=seed)
    return percentile_intervals(sums.sum(axis=0) / rows_of_user.sum(), means, confidence=confidence)


def percentile_intervals(value: Floats, resampled: Floats, *, confidence: float) -> Intervals:
    """Return measures [M] with the middle of their resamples [S, M]; bounds are NaN where the resamples are."""
    if np.isnan(resampled).any():
        unknown = np.full_like(value, np.nan)
        return Intervals(value, unknown, unknown)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(resampled, [tail, 1.0 - tail], axis=0)
    return Intervals(value, low, high)


def by_user(values: NDArray[Any], users: NDArray[Any]) -> tuple[Floats, Floats]:
    """Return the sums [U, M] of values [R, M] or [R] over each user's rows, and how many rows each has [U].

    Raises:
        ValueError: if there are no rows, or values and users disagree in length.
    """
    values = np.asarray(values, dtype=np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if len(values) == 0 or len(values) != len(users):
        raise ValueError(f"expected as many users as rows and at least one, got {len(values)} and {len(users)}")
    _, codes = np.unique(np.asarray(users), return_inverse=True)
    sums: Floats = np.stack([np.bincount(codes, weights=column) for column in values.T], axis=1)
    return sums, np.bincount(codes).astype(np.float64)


def resampled_means(sums: Floats, rows_of_user: Floats, *, samples: int, seed: int) -> Floats:
    """Return the means of resampled users; [S, M], NaN where fewer than two users leave nothing to resample.

    The means of differences are the differences of these, for all measures see the same resamples.

    Args:
        sums: [U, M] over each user's rows.
        rows_of_user: [U].
        samples: S.
        seed: of the resampling.
    """
    if len(rows_of_user) < 2:
        return np.full((samples, sums.shape[1]), np.nan)
    generator = np.random.default_rng(seed)
    users = len(rows_of_user)
    chunk = max(1, _WEIGHTS_AT_ONCE // users)
    means = np.empty((samples, sums.shape[1]))
    for start in range(0, samples, chunk):
        stop = min(start + chunk, samples)
        # Drawn and counted: eight times as fast as `Generator.multinomial`, whose counts are the same in law.
        weights = np.empty((stop - start, users))
        for own in weights:
            own[:] = np.bincount(generator.integers(0, users, size=users), minlength=users)
        means[start:stop] = (weights @ sums) / (weights @ rows_of_user)[:, None]
    return means
