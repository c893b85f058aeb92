"""Two recommenders that learn nothing but counts: what every other model has to beat.

Both are called as a language-model scorer is: lists of histories and candidates in, one float32 array of
scores a row out. Counts are of the training split only.

Axes: I items, P distinct pairs, R rows, H history, C candidates.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recray.ranking.ragged import concatenated

Ints = NDArray[np.int64]
Rows = list[NDArray[Any]]

LATEST_ITEMS = 200  # of a training history, for pairs: a few users with thousands of items would outvote all others
_PAIRS_AT_ONCE = 8_000_000  # unsorted pair keys held in memory at a time: 64 MB
_LOOKUPS_AT_ONCE = 2_000_000


def item_popularity(histories: NDArray[Any], num_items: int) -> Ints:
    """Return the training interactions of every item, from all histories laid end to end; [I]."""
    return np.bincount(np.asarray(histories), minlength=num_items).astype(np.int64)


class Popularity(NamedTuple):
    """Scores a candidate by its training interactions, whatever the history."""

    counts: Ints  # [I]

    def __call__(self, histories: Rows, candidates: Rows) -> Rows:  # noqa: ARG002  the history is not asked
        """Return the counts of every row's candidates."""
        return [self.counts[row].astype(np.float32) for row in candidates]


class Cooccurrence(NamedTuple):
    """Scores a candidate by how often the history's items were met together with it.

        score(c | history) = sum_{h in history, h != c} n_hc / sqrt(n_h * n_c)

    n_hc: users who met both h and c; n_h: users who met h; each in the training split. That is the cosine of
    the two items' user columns, summed. Only pairs that occur are kept, sorted: never an items x items table.
    """

    num_items: int
    pairs: Ints  # [P] sorted keys low * num_items + high
    cosine: NDArray[np.float32]  # [P]

    @classmethod
    def of(cls, histories: NDArray[Any], lengths: NDArray[Any], num_items: int) -> "Cooccurrence":
        """Count pairs within histories, laid end to end; the latest 200 distinct items of each."""
        items, owners = _distinct_latest(np.asarray(histories), np.asarray(lengths), num_items)
        users_of_item = np.bincount(items, minlength=num_items).astype(np.float64)
        pairs, together = _count_pairs(items, owners, num_items)
        low, high = np.divmod(pairs, num_items)
        cosine = together / np.sqrt(users_of_item[low] * users_of_item[high])
        return cls(num_items, pairs, cosine.astype(np.float32))

    def __call__(self, histories: Rows, candidates: Rows) -> Rows:
        """Return the summed cosine of every row's candidates."""
        scores: Rows = []
        start = 0
        costs = np.cumsum([len(h) * len(c) for h, c in zip(histories, candidates, strict=True)])
        while start < len(histories):
            before = int(costs[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(costs, before + _LOOKUPS_AT_ONCE, side="right")))
            scores += self._score(histories[start:stop], candidates[start:stop])
            start = stop
        return scores

    def _score(self, histories: Rows, candidates: Rows) -> Rows:
        """Score every row from the cross product of its history and its candidates."""
        met, met_by = _distinct_latest(*concatenated(histories), self.num_items)
        asked, asked_lengths = concatenated(candidates)
        asked_by = np.repeat(np.arange(len(candidates)), asked_lengths)
        met_lengths = np.bincount(met_by, minlength=len(histories))
        repeats = met_lengths[asked_by]
        slot = np.repeat(np.arange(len(asked)), repeats)
        within = np.arange(len(slot)) - (np.cumsum(repeats) - repeats)[slot]
        partner = met[(np.cumsum(met_lengths) - met_lengths)[asked_by[slot]] + within]
        cosine = self._look_up(partner, asked[slot].astype(np.int64))
        total = np.bincount(slot, weights=cosine, minlength=len(asked)).astype(np.float32)
        return np.split(total, np.cumsum(asked_lengths)[:-1])

    def _look_up(self, first: Ints, second: Ints) -> NDArray[np.float32]:
        """Return the cosine of every pair; 0 where never met together, and for an item with itself."""
        if len(self.pairs) == 0:
            return np.zeros(len(first), dtype=np.float32)
        keys = np.minimum(first, second) * self.num_items + np.maximum(first, second)
        place = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        return np.where(self.pairs[place] == keys, self.cosine[place], np.float32(0.0))


def _distinct_latest(items: NDArray[Any], lengths: NDArray[Any], num_items: int) -> tuple[Ints, Ints]:
    """Return (items, owners) of all histories end to end, repeats dropped, the latest 200 of each kept."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    newest_first = np.arange(len(items))[::-1]
    _, found = np.unique((owners * num_items + items)[newest_first], return_index=True)
    keep = np.sort(newest_first[found])  # the last time each was met, in time order
    items, owners = items[keep].astype(np.int64), owners[keep]
    ends = np.cumsum(np.bincount(owners, minlength=len(lengths)))
    recent = np.arange(len(items)) >= ends[owners] - LATEST_ITEMS
    return items[recent], owners[recent]


def _count_pairs(items: Ints, owners: Ints, num_items: int) -> tuple[Ints, NDArray[np.float64]]:
    """Return the sorted keys of all pairs met by one user, and how many users met each.

    One vectorised pass a distance in the history: items and owners are compared with themselves, shifted.
    """
    keys, counts = np.zeros(0, dtype=np.int64), np.zeros(0)
    waiting: list[Ints] = []
    for distance in range(1, len(items)):
        same = np.flatnonzero(owners[distance:] == owners[:-distance])
        if len(same) == 0:
            break  # a longer distance has no pair either
        first, second = items[same], items[same + distance]
        waiting.append(np.minimum(first, second) * num_items + np.maximum(first, second))
        # At least as many as are known already, so that a pair is merged a logarithmic number of times.
        if sum(map(len, waiting)) > max(_PAIRS_AT_ONCE, len(keys)):
            keys, counts = _merged(keys, counts, waiting)
            waiting = []
    return _merged(keys, counts, waiting)


def _merged(keys: Ints, counts: NDArray[np.float64], waiting: list[Ints]) -> tuple[Ints, NDArray[np.float64]]:
    """Return sorted keys and their counts with the waiting pairs, one each, added."""
    every = np.concatenate([keys, *waiting])
    if len(every) == 0:
        return keys, counts
    weights = np.ones(len(every))
    weights[: len(keys)] = counts
    order = np.argsort(every, kind="stable")
    every = every[order]
    starts = np.flatnonzero(np.concatenate([[True], every[1:] != every[:-1]]))
    return every[starts], np.add.reduceat(weights[order], starts)
