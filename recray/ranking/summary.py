"""Ranked rows as the numbers that are shown: one object a model, one a pair of models, each with intervals.

Axes: R rows, K kept items a row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recray.ranking.exposure import GROUP_NAMES, average_popularity, coverage, group_shares, popularity_groups
from recray.ranking.intervals import Intervals, clustered_means
from recray.ranking.metrics import hit_rate, ndcg, reciprocal_rank

Measures = dict[str, NDArray[np.float64]]


class Ranked(NamedTuple):
    """What one model made of all rows; every model's rows lie in the same order."""

    ranks: NDArray[np.int64]  # [R]
    recommended: NDArray[np.int64]  # [R, K], best first, -1 where a row has fewer


class Settings(NamedTuple):
    """How ranked rows are summed up."""

    ks: tuple[int, ...]
    samples: int
    confidence: float
    seed: int


def measures(ranked: Ranked, popularity: NDArray[Any], ks: Sequence[int]) -> Measures:
    """Return every measure that is a mean over rows, by name; [R] each.

    `average_popularity` is that of the first item shown, `average_popularity@k` of the first k; the latter
    only as far as items were kept.
    """
    found: Measures = {}
    for k in ks:
        found[f"hr@{k}"] = hit_rate(ranked.ranks, k)
    for k in ks:
        found[f"ndcg@{k}"] = ndcg(ranked.ranks, k)
    found["mrr"] = reciprocal_rank(ranked.ranks)
    found["average_popularity"] = average_popularity(ranked.recommended, popularity, 1)
    for k in _kept(ranked, ks):
        found[f"average_popularity@{k}"] = average_popularity(ranked.recommended, popularity, k)
    return found


def summaries(
    ranked: dict[str, Ranked], users: NDArray[Any], popularity: NDArray[Any], settings: Settings
) -> list[dict[str, Any]]:
    """Return one object a model: measures as {value, low, high}, and the coverage of the catalogue."""
    counted = {"rows": len(users), "users": len(np.unique(users))}
    found = []
    for model, ranks in ranked.items():
        by_name = _intervals(measures(ranks, popularity, settings.ks), users, settings)
        reach = {"coverage": coverage(ranks.recommended, len(popularity), 1)}
        for k in _kept(ranks, settings.ks):
            reach[f"coverage@{k}"] = coverage(ranks.recommended, len(popularity), k)
        found.append({"model": model, **counted, **by_name, **reach})
    return found


def differences(
    ranked: dict[str, Ranked],
    pairs: Sequence[tuple[str, str]],
    users: NDArray[Any],
    popularity: NDArray[Any],
    settings: Settings,
) -> list[dict[str, Any]]:
    """Return one object a pair: `model` minus `minus` on the same rows, as {value, low, high} a measure."""
    found = []
    for first, second in pairs:
        left = measures(ranked[first], popularity, settings.ks)
        right = measures(ranked[second], popularity, settings.ks)
        apart = {name: left[name] - right[name] for name in left}
        counted = {"rows": len(users), "users": len(np.unique(users))}
        found.append({"model": first, "minus": second, **counted, **_intervals(apart, users, settings)})
    return found


def exposure(ranked: dict[str, Ranked], targets: NDArray[Any], popularity: NDArray[Any]) -> dict[str, Any]:
    """Return the popularity of what each model shows first, and of what people chose, by popularity group."""
    groups = popularity_groups(popularity)
    shares = {model: group_shares(ranks.recommended[:, 0], groups).tolist() for model, ranks in ranked.items()}
    return {
        "groups": list(GROUP_NAMES),
        "models": shares,
        "chosen": group_shares(targets, groups).tolist(),
        "chosen_average_popularity": float(np.asarray(popularity, dtype=np.float64)[targets].mean()),
    }


def _kept(ranked: Ranked, ks: Sequence[int]) -> list[int]:
    return [k for k in ks if 1 < k <= ranked.recommended.shape[1]]


def _intervals(found: Measures, users: NDArray[Any], settings: Settings) -> dict[str, dict[str, float | None]]:
    values = np.stack(list(found.values()), axis=1)
    intervals = clustered_means(
        values, users, samples=settings.samples, confidence=settings.confidence, seed=settings.seed
    )
    return {name: _at(intervals, column) for column, name in enumerate(found)}


def _at(intervals: Intervals, column: int) -> dict[str, float | None]:
    """Return one measure as JSON holds it: a bound that is not known is null, NaN being no JSON."""
    pairs = ((name, float(values[column])) for name, values in intervals._asdict().items())
    return {name: None if np.isnan(value) else value for name, value in pairs}
