"""What a model shows to people: how popular it is, and how much of the catalogue it reaches.

Axes: R rows, K recommended items a row, best first; -1 where a row has fewer.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Shares of the catalogue, by falling popularity, and what the groups between them are called.
GROUP_BORDERS = (0.01, 0.05, 0.20, 0.50)
GROUP_NAMES = ("top 1 %", "1–5 %", "5–20 %", "20–50 %", "rest")

BAND_NAMES = ("head", "mid", "tail")  # each covers a third of the interactions, not of the catalogue


def average_popularity(recommended: NDArray[Any], popularity: NDArray[Any], k: int) -> Floats:
    """Return the mean popularity of the first `k` recommended items of every row; [R].

    Args:
        recommended: [R, K] items.
        popularity: [I] of every item: its training interactions.
        k: how many count; rows with fewer give the mean of those there are.

    Raises:
        ValueError: if a row recommends nothing.
    """
    first = np.asarray(recommended)[:, :k]
    there = first >= 0
    if not there.any(axis=1).all():
        raise ValueError(f"row {int(np.flatnonzero(~there.any(axis=1))[0])} recommends nothing")
    values = np.where(there, np.asarray(popularity, dtype=np.float64)[first], 0.0)
    mean: Floats = values.sum(axis=1) / there.sum(axis=1)
    return mean


def coverage(recommended: NDArray[Any], num_items: int, k: int) -> float:
    """Return the distinct items among the first `k` of all rows, as a share of the catalogue."""
    return int(np.count_nonzero(shown_counts(recommended, num_items, k))) / num_items


def div_ratio(recommended: NDArray[Any], k: int) -> float:
    """Return the distinct items among the first `k` of all rows, as a share of the R k places.

    A row with fewer than k items leaves places empty, which count. Source: SPRec.
    """
    return int(np.count_nonzero(shown_counts(recommended, 0, k))) / (len(recommended) * k)


def popularity_groups(popularity: NDArray[Any]) -> Ints:
    """Return the group of every item, 0 for the most popular; [I].

    Items are sorted by falling popularity (equal ones by number) and cut at `GROUP_BORDERS` of the catalogue,
    each group rounded up, so that the first holds an item even in a small catalogue.
    """
    popularity = np.asarray(popularity)
    borders = np.ceil(np.array(GROUP_BORDERS) * len(popularity))
    place = np.empty(len(popularity), dtype=np.int64)
    place[np.argsort(-popularity, kind="stable")] = np.arange(len(popularity))
    return np.searchsorted(borders, place, side="right").astype(np.int64)


def group_shares(items: NDArray[Any], groups: Ints) -> Floats:
    """Return the share of `items` (repeats count, -1 does not) in every popularity group; [groups]."""
    items = np.asarray(items).ravel()
    count = np.bincount(groups[items[items >= 0]], minlength=len(GROUP_NAMES)).astype(np.float64)
    return count / max(1.0, float(count.sum()))


def bands(popularity: NDArray[Any]) -> Ints:
    """Return the band of every item: 0 head, 1 mid, 2 tail; [I].

    Items by falling popularity (equal ones by number); the head are those that cover the first third of the training
    interactions, the mid the second, the tail the rest. The item that reaches a third still counts to it, so the head
    is never empty. Items without interactions are in the tail. Source: the study of negative samplers, 2410.17276.
    """
    popularity = np.asarray(popularity, dtype=np.int64)
    order = np.argsort(-popularity, kind="stable")
    before = np.cumsum(popularity[order]) - popularity[order]  # interactions of more popular items
    band = np.empty(len(popularity), dtype=np.int64)
    # In whole numbers: a third of the interactions is no float that can be met exactly.
    band[order] = np.minimum(3 * before // max(1, int(popularity.sum())), len(BAND_NAMES) - 1)
    band[popularity == 0] = len(BAND_NAMES) - 1
    return band


def shown_counts(recommended: NDArray[Any], num_items: int, k: int) -> Ints:
    """Return how often every item of the catalogue is among the first `k` of a row; [I], or up to the last shown."""
    first = np.asarray(recommended)[:, :k]
    return np.bincount(first[first >= 0], minlength=num_items).astype(np.int64)


def gini(amounts: NDArray[Any]) -> float:
    """Return the Gini coefficient of amounts >= 0: 0 where all are equal, 1 - 1/n where one has all; NaN of nothing.

    G = sum_i (2 i - n - 1) x_i / (n sum_i x_i), x rising, i from 1
    """
    rising = np.sort(np.asarray(amounts, dtype=np.float64))
    total, number = rising.sum(), len(rising)
    if total == 0:
        return float("nan")
    return float((2 * np.arange(1, number + 1) - number - 1) @ rising / (number * total))


def balance(hit_rates: NDArray[Any]) -> float:
    """Return 1 - Gini(HR of head, mid, tail): 1 where all are served alike; NaN where nothing is found anywhere.

    Source: 2410.17276, which shows it times 100.
    """
    return 1.0 - gini(hit_rates)
