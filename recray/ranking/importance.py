"""How much each setting of a search had to do with what came out, beside what chance alone would show.

Axes: P points that were tried.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

LEVELS = 3  # that a number with more values than that is cut into
SHUFFLES = 2000


class Importance(NamedTuple):
    """What one setting explains of a result."""

    share: float  # of the variance between points that lies between the setting's levels, 0 to 1
    by_chance: float  # the mean of that share if results were dealt to points at random
    p: float  # how often chance alone explains as much


def importance(
    settings: Mapping[str, Sequence[Any]], result: Float[ndarray, " P"], *, seed: int
) -> dict[str, Importance]:
    """Return the share of the result's variance that each setting explains by itself; none without three points.

    share = sum_l P_l (mean_l - mean)^2 / sum_p (result_p - mean)^2, over levels l of the setting

    With few points any setting explains something: chance is shown beside it, by dealing the results out anew. What
    settings do together only, and what a search did not try, is not seen. A setting with one level, or a result that
    is the same everywhere, explains nothing.

    Args:
        settings: of each setting, its value at every point; None where the point does not have it.
        result: of every point.
        seed: of the shuffles.
    """
    if len(result) < 3:
        return {}
    rng = np.random.default_rng(seed)
    dealt = np.stack([result, *(rng.permutation(result) for _ in range(SHUFFLES))])
    found = {}
    for name, values in settings.items():
        shares = _explained(_levels(values), dealt)
        # The real one counts as one of those that chance could have dealt: p is never 0.
        p = float((shares >= shares[0] - 1e-12).mean())
        found[name] = Importance(float(shares[0]), float(shares[1:].mean()), p)
    return found


def _explained(levels: Int[ndarray, " P"], dealt: Float[ndarray, "S P"]) -> Float[ndarray, " S"]:
    """Return the share that lies between levels, for each way the results are dealt out."""
    apart = dealt - dealt.mean(axis=1, keepdims=True)
    whole = (apart**2).sum(axis=1)
    member = np.eye(levels.max() + 1)[levels]
    between: Float[ndarray, " S"] = ((apart @ member) ** 2 / member.sum(axis=0)).sum(axis=1)
    # What is left of equal results after rounding is no variance.
    flat = whole <= 1e-18 * np.maximum(1.0, (dealt**2).sum(axis=1))
    return np.where(flat, 0.0, between / np.where(flat, 1.0, whole))


def _levels(values: Sequence[Any]) -> Int[ndarray, " P"]:
    """Return each point's level: one a value, or thirds of the points where numbers take more values than that."""
    numbers = [value for value in values if value is not None]
    # True and 1 are different values, though equal: levels go by what is written.
    distinct = list(dict.fromkeys(map(repr, values)))
    if len(distinct) <= LEVELS or any(isinstance(value, str | bool) for value in numbers):
        return np.array([distinct.index(repr(value)) for value in values], dtype=np.int64)
    borders = np.quantile(np.array(numbers, dtype=np.float64), np.arange(1, LEVELS) / LEVELS)
    found = [LEVELS if value is None else int(np.searchsorted(borders, float(value), "right")) for value in values]
    return np.unique(found, return_inverse=True)[1].astype(np.int64)
