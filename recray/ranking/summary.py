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
    div_ratio,
    gini,
    group_shares,
    popularity_groups,
    shown_counts,
)
from recray.ranking.genres import Genres, dgu, genre_shares, mgu, without_genre
from recray.ranking.intervals import Intervals, by_user, percentile_intervals, resampled_means
from recray.ranking.metrics import hit_rate, ndcg, reciprocal_rank
from recray.ranking.paired import FLIPS, holm, sign_flip_p_values
from recray.ranking.slices import Slice

Measures = dict[str, NDArray[np.float64]]


class Ranked(NamedTuple):
    """What one model made of all rows; every model's rows lie in the same order."""

    ranks: NDArray[np.int64]  # [R]
    recommended: NDArray[np.int64]  # [R, K], best first, -1 where a row has fewer


class Summaries(NamedTuple):
    """What is shown of all rows."""

    models: list[dict[str, Any]]
    pairs: list[dict[str, Any]]


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
    ranked: dict[str, Ranked],
    pairs: Sequence[tuple[str, str]],
    users: NDArray[Any],
    popularity: NDArray[Any],
    settings: Settings,
) -> Summaries:
    """Return one object a model and one a pair, measures as {value, low, high}, all from one resampling of the users.

    A pair is `model` minus `minus` on the same rows. `coverage`, `gini` and `div_ratio` of a model are those of the
    first items shown, `@k` of the first k; coverage and Gini over the whole catalogue.
    """
    own = {model: measures(each, popularity, settings.ks) for model, each in ranked.items()}
    found, counted = resampled(own, users, settings)
    models = [
        {"model": model, **counted, **found[model].named(settings), **_reach(each, popularity, settings)}
        for model, each in ranked.items()
    ]
    apart = [
        {"model": first, "minus": second, **counted, **found[first].minus(found[second]).named(settings)}
        for first, second in pairs
    ]
    return Summaries(models, apart)


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
    codes = np.unique(users, return_inverse=True)[1]  # once: names are slow to sort
    own = {model: rank_measures(each, settings.ks) for model, each in ranked.items()}
    slices = []
    for part in parts:
        there = {model: {name: column[part.chosen] for name, column in by.items()} for model, by in own.items()}
        found, counted = resampled(there, codes[part.chosen], settings)
        counted = {"rows": counted["rows"], "of": len(users), "users": counted["users"]}
        by_model = {model: each.named(settings) for model, each in found.items()}
        slices.append({"by": part.by, "slice": part.name, **counted, "models": by_model})
    return slices


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


def genre_exposure(
    ranked: dict[str, Ranked], met: NDArray[Any], targets: NDArray[Any], genres: Genres, ks: Sequence[int]
) -> dict[str, Any] | None:
    """Return how far each model's first k items are from the histories by genre; None where nobody met a genre.

    Args:
        ranked: of every model.
        met: items of the histories of the same rows, end to end.
        targets: [R] what people chose: what a model that is always right shows first, so its gap is not zero.
        genres: of all items.
        ks: how many of what is shown count; only as far as items were kept.
    """
    history = genre_shares(met, genres)
    if np.isnan(history).any() or not genres.names:
        return None

    def beside(items: NDArray[Any]) -> dict[str, Any]:
        shares = genre_shares(items, genres)
        gap = {"mgu": _known(mgu(shares, history)), "dgu": _known(dgu(shares, history))}
        left_out = {"items": int((items >= 0).sum()), "without_genre": without_genre(items, genres)}
        return {**gap, **left_out, "shares": [_known(share) for share in shares]}

    models = {
        model: [{"k": k, **beside(each.recommended[:, :k])} for k in ks if k <= each.recommended.shape[1]]
        for model, each in ranked.items()
    }
    return {
        "genres": genres.names,
        "met": {"items": len(met), "without_genre": without_genre(met, genres), "shares": history.tolist()},
        "catalogue": {"items": len(genres.has_one), "without_genre": int((~genres.has_one).sum())},
        "chosen": beside(targets),
        "models": models,
    }


def _reach(ranked: Ranked, popularity: NDArray[Any], settings: Settings) -> dict[str, float]:
    """Return how much of the catalogue is shown, and how evenly."""
    reach, num_items = {}, len(popularity)
    for k in [1, *_kept(ranked, settings.ks)]:
        at = "" if k == 1 else f"@{k}"
        reach[f"coverage{at}"] = coverage(ranked.recommended, num_items, k)
        reach[f"gini{at}"] = gini(shown_counts(ranked.recommended, num_items, k))
        reach[f"div_ratio{at}"] = div_ratio(ranked.recommended, k)
    return reach


def _kept(ranked: Ranked, ks: Sequence[int]) -> list[int]:
    return [k for k in ks if 1 < k <= ranked.recommended.shape[1]]


class Resampled(NamedTuple):
    """Measures of one model or pair, and what the resamples of the users make of them."""

    names: list[str]  # [M]
    sums: NDArray[np.float64]  # [U, M] over each user's rows
    mean: NDArray[np.float64]  # [M]
    resamples: NDArray[np.float64]  # [S, M]

    def minus(self, other: "Resampled") -> "Resampled":
        """Return the differences, which need no resampling of their own."""
        apart = self.sums - other.sums
        # A product of matrices may add equal columns in another order: what is equal must not differ by a rounding.
        differ = apart.any(axis=0)
        return Resampled(
            self.names, apart, (self.mean - other.mean) * differ, (self.resamples - other.resamples) * differ
        )

    def named(self, settings: Settings) -> dict[str, dict[str, float | None]]:
        """Return {value, low, high} a measure."""
        intervals = percentile_intervals(self.mean, self.resamples, confidence=settings.confidence)
        return {name: _at(intervals, column) for column, name in enumerate(self.names)}


def resampled(
    own: dict[str, Measures], users: NDArray[Any], settings: Settings
) -> tuple[dict[str, Resampled], dict[str, int]]:
    """Return the measures that all models have, from one resampling of the users, and how many rows and users."""
    names = [name for name in next(iter(own.values())) if all(name in found for found in own.values())]
    sums, rows_of_user = by_user(np.stack([found[name] for found in own.values() for name in names], axis=1), users)
    mean = sums.sum(axis=0) / rows_of_user.sum()
    resamples = resampled_means(sums, rows_of_user, samples=settings.samples, seed=settings.seed)
    found = {}
    for place, model in enumerate(own):
        at = slice(place * len(names), (place + 1) * len(names))
        found[model] = Resampled(names, sums[:, at], mean[at], resamples[:, at])
    return found, {"rows": len(users), "users": len(rows_of_user)}


def _at(intervals: Intervals, column: int) -> dict[str, float | None]:
    return {name: _known(values[column]) for name, values in intervals._asdict().items()}


def _known(value: float) -> float | None:
    """Return a number as JSON holds it: what is not known is null, NaN being no JSON."""
    return None if np.isnan(value) else float(value)
