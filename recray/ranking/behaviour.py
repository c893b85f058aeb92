"""What behaviour alone finds: the baselines of the audit, each a count over training histories.

They are called as `rules.Rule`s are. Popularity and co-occurrence are those of `baselines`.

Axes: I items, P distinct pairs, C candidates of all rows end to end, N training interactions.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from recray.ranking.rules import Floats, Ints, Rows

HALF_LIFE = 0.05  # of the span of training: after so long an interaction counts half for recent popularity


class ListModel(Protocol):
    """What the baselines of `baselines` are."""

    def __call__(self, histories: list[NDArray[Any]], candidates: list[NDArray[Any]], /) -> list[NDArray[Any]]:
        """Return the scores of every row's candidates."""
        ...


class Listed(NamedTuple):
    """A model that takes lists of arrays, called with rows end to end."""

    model: ListModel

    def __call__(self, rows: Rows) -> Floats:
        """Return the scores of all candidates; [C]."""
        if len(rows.lengths) == 0:
            return np.zeros(0)
        histories = np.split(rows.met, np.cumsum(rows.met_lengths)[:-1])
        candidates = np.split(rows.candidates, np.cumsum(rows.lengths)[:-1])
        return np.concatenate(self.model(histories, candidates)).astype(np.float64)


class Recency(NamedTuple):
    """The candidate that the user met last: people come back. Candidates that are not in the history score 0."""

    num_items: int

    def __call__(self, rows: Rows) -> Floats:
        """Return the place in the history, from 1, of the last time each candidate was met; [C]."""
        starts = np.cumsum(rows.met_lengths) - rows.met_lengths
        by = np.repeat(np.arange(len(starts)), rows.met_lengths)
        keys = by * self.num_items + rows.met
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        asked = rows.owners * self.num_items + rows.candidates
        last = np.searchsorted(ordered, asked, side="right") - 1
        if len(ordered) == 0:
            return np.zeros(len(asked))
        place = order[np.maximum(last, 0)] - starts[rows.owners] + 1
        return np.where((last >= 0) & (ordered[last] == asked), place, 0).astype(np.float64)


class RecentPopularity(NamedTuple):
    """The candidate that was popular lately: training interactions, each worth half after a twentieth of the span."""

    weight: Floats  # [I]

    @classmethod
    def of(cls, items: NDArray[Any], times: Ints, num_items: int) -> "RecentPopularity":
        """Weigh [N] training interactions by their times, in seconds."""
        if len(times) == 0:
            return cls(np.zeros(num_items))
        age = (times.max() - times) / max(1, int(times.max() - times.min()))
        weight: Floats = np.bincount(items, weights=0.5 ** (age / HALF_LIFE), minlength=num_items).astype(np.float64)
        return cls(weight)

    def __call__(self, rows: Rows) -> Floats:
        """Return the scores of all candidates; [C]."""
        return self.weight[rows.candidates]


class Transitions(NamedTuple):
    """The candidate that came most often right after the history's last item; where none did, the more popular one.

    score(c | last) = n(last -> c) + n(c) / (1 + max n)
    """

    num_items: int
    pairs: Ints  # [P] sorted keys first * num_items + second
    counts: Ints  # [P]
    popularity: Floats  # [I] below 1

    @classmethod
    def of(cls, first: Ints, second: Ints, popularity: Ints) -> "Transitions":
        """Count neighbours of training histories.

        Args:
            first, second: as `orders.consecutive` gives them.
            popularity: [I] training interactions of every item.
        """
        num_items = len(popularity)
        pairs, counts = np.unique(first * num_items + second, return_counts=True)
        return cls(num_items, pairs, counts, popularity / (1.0 + popularity.max(initial=0)))

    def __call__(self, rows: Rows) -> Floats:
        """Return the scores of all candidates; [C]."""
        scores: Floats = self.popularity[rows.candidates].copy()
        if len(self.pairs) == 0 or len(rows.met) == 0:
            return scores
        ends = np.cumsum(rows.met_lengths)
        last = np.where(rows.met_lengths > 0, rows.met[np.maximum(ends - 1, 0)], -1)[rows.owners]
        keys = last * self.num_items + rows.candidates
        place = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        scores += np.where((last >= 0) & (self.pairs[place] == keys), self.counts[place], 0)
        return scores
