"""Ranked rows as the numbers that are shown: one object a model, one a pair of models, each with intervals.

Axes: R rows, K kept items a row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recray.ranking.exposure import (
    BAND_NAMES,
    GROUP_NAMES,
    average_popularity,
    balance,
    bands,
    coverage,
    gini,
    group_shares,
    popularity_groups,
    shown_counts,
)
from recray.ranking.intervals import Intervals, clustered_means
from recray.ranking.metrics import hit_rate, ndcg, reciprocal_rank
from recray.ranking.paired import FLIPS, holm, sign_flip_p_values
from recray.ranking.slices import Slice

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


def rank_measures(ranked: Ranked, ks: Sequence[int]) -> Measures:
    """Return HR, NDCG and MRR, by name; [R] each. With one target a row, recall is HR."""
    found: Measures = {}
    for k in ks:
        found[f"hr@{k}"] = hit_rate(ranked.ranks, k)
    for k in ks:
        found[f"ndcg@{k}"] = ndcg(ranked.ranks, k)
    found["mrr"] = reciprocal_rank(ranked.ranks)
    return found


def measures(ranked: Ranked, popularity: NDArray[Any], ks: Sequence[int]) -> Measures:
    """Return every measure that is a mean over rows, by name; [R] each.

    `average_popularity` is that of the first item shown, `average_popularity@k` of the first k; the latter
    only as far as items were kept.
    """
    found = rank_measures(ranked, ks)
    found["average_popularity"] = average_popularity(ranked.recommended, popularity, 1)
    for k in _kept(ranked, ks):
        found[f"average_popularity@{k}"] = average_popularity(ranked.recommended, popularity, k)
    return found


def summaries(
    ranked: dict[str, Ranked], users: NDArray[Any], popularity: NDArray[Any], settings: Settings
) -> list[dict[str, Any]]:
    """Return one object a model: measures as {value, low, high}, coverage and Gini of what is shown.

    `coverage` and `gini` are those of the first items shown, over the whole catalogue; `@k` of the first k.
    """
    counted = {"rows": len(users), "users": len(np.unique(users))}
    own = [measures(ranks, popularity, settings.ks) for ranks in ranked.values()]
    found = []
    for (model, ranks), by_name in zip(ranked.items(), _intervals(own, users, settings), strict=True):
        reach = {}
        for k in [1, *_kept(ranks, settings.ks)]:
            at = "" if k == 1 else f"@{k}"
            reach[f"coverage{at}"] = coverage(ranks.recommended, len(popularity), k)
            reach[f"gini{at}"] = gini(shown_counts(ranks.recommended, len(popularity), k))
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
    own = {
        model: measures(ranked[model], popularity, settings.ks) for model in {each for pair in pairs for each in pair}
    }
    apart = [{name: own[first][name] - own[second][name] for name in own[first]} for first, second in pairs]
    counted = {"rows": len(users), "users": len(np.unique(users))}
    return [
        {"model": first, "minus": second, **counted, **by_name}
        for (first, second), by_name in zip(pairs, _intervals(apart, users, settings), strict=True)
    ]


def paired_tests(
    ranked: dict[str, Ranked], pairs: Sequence[tuple[str, str]], users: NDArray[Any], k: int, seed: int
) -> list[dict[str, Any]]:
    """Return one object a pair: `p` of its difference in NDCG@k, flipping users, and `p_holm` for all these pairs.

    One measure, named beforehand: every further one would be a further comparison to correct for.
    """
    own = {model: ndcg(each.ranks, k) for model, each in ranked.items()}
    apart = np.stack([own[first] - own[second] for first, second in pairs], axis=1)
    p_values = sign_flip_p_values(apart, users, seed=seed)
    shared = {"measure": f"ndcg@{k}", "comparisons": len(pairs), "flips": FLIPS}
    corrected = holm(p_values).tolist()
    return [{**shared, "p": p, "p_holm": h} for p, h in zip(p_values.tolist(), corrected, strict=True)]


def sliced(
    ranked: dict[str, Ranked], parts: Sequence[Slice], users: NDArray[Any], settings: Settings
) -> list[dict[str, Any]]:
    """Return one object a slice: its rows `of` how many, and every model's measures there as {value, low, high}.

    The interval resamples the users who have rows in the slice.
    """
    found = []
    for part in parts:
        own = [
            rank_measures(Ranked(each.ranks[part.chosen], each.recommended), settings.ks) for each in ranked.values()
        ]
        theirs = users[part.chosen]
        by_model = dict(zip(ranked, _intervals(own, theirs, settings), strict=True))
        counted = {"rows": len(theirs), "of": len(users), "users": len(np.unique(theirs))}
        found.append({"by": part.by, "slice": part.name, **counted, "models": by_model})
    return found


def band_hit_rates(
    ranked: dict[str, Ranked], targets: NDArray[Any], popularity: NDArray[Any], k: int
) -> dict[str, Any]:
    """Return HR@k of every model for targets in the head, the mid and the tail, and how balanced they are.

    None where a band has no target, and a balance of None with it or where nothing is found.
    """
    band = bands(popularity)
    of_targets = band[targets]
    rows = np.bincount(of_targets, minlength=len(BAND_NAMES))
    models = {}
    for model, ranks in ranked.items():
        hits = np.bincount(of_targets, weights=hit_rate(ranks.ranks, k), minlength=len(BAND_NAMES))
        rates = np.divide(hits, rows, out=np.full(len(rows), np.nan), where=rows > 0)
        models[model] = {"hit_rates": [_known(rate) for rate in rates], "balance": _known(balance(rates))}
    items = np.bincount(band, minlength=len(BAND_NAMES)).tolist()
    return {"k": k, "bands": list(BAND_NAMES), "items": items, "rows": rows.tolist(), "models": models}


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


def _intervals(
    found: Sequence[Measures], users: NDArray[Any], settings: Settings
) -> list[dict[str, dict[str, float | None]]]:
    """Return the measures of several models or pairs with their intervals, all from one resampling of the users."""
    values = np.stack([column for own in found for column in own.values()], axis=1)
    intervals = clustered_means(
        values, users, samples=settings.samples, confidence=settings.confidence, seed=settings.seed
    )
    columns = iter(range(values.shape[1]))
    return [{name: _at(intervals, next(columns)) for name in own} for own in found]


def _at(intervals: Intervals, column: int) -> dict[str, float | None]:
    return {name: _known(values[column]) for name, values in intervals._asdict().items()}


def _known(value: float) -> float | None:
    """Return a number as JSON holds it: what is not known is null, NaN being no JSON."""
    return None if np.isnan(value) else float(value)
