"""Rules that can't know what people like: if one of them finds the target, the evaluation gives it away.

Every rule takes histories and candidates, and returns one score a candidate; none sees a target. What a rule is fitted
to comes from training and validation rows.

Axes: R rows, H items of all histories end to end, C candidates of all rows end to end, L lists to fit to, I items.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recray.ranking.orders import Order
from recray.ranking.rows import flat_lists

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

OTHERS_ASKED = 24  # of a candidate list, as evidence for each candidate: all of them would be quadratic in its length


class Rows(NamedTuple):
    """Histories and candidate lists of many rows, each laid end to end."""

    met: Ints  # [H], oldest first
    met_lengths: Ints  # [R]
    candidates: Ints  # [C], in the order of the list
    lengths: Ints  # [R]

    @classmethod
    def of(cls, table: pa.Table) -> "Rows":
        """Take rows of `schema.EVALUATION`, without their targets."""
        met, met_lengths = flat_lists(table["history"])
        candidates, lengths = flat_lists(table["candidates"])
        return cls(met.astype(np.int64), met_lengths, candidates.astype(np.int64), lengths)

    @property
    def owners(self) -> Ints:
        """The row of each candidate; [C]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def places(self) -> Ints:
        """The place of each candidate in its list, from 0; [C]."""
        return np.arange(len(self.candidates)) - np.repeat(np.cumsum(self.lengths) - self.lengths, self.lengths)


class Lists(NamedTuple):
    """Candidate lists whose target is known: what a rule about lists is fitted to."""

    candidates: Ints  # end to end
    lengths: Ints  # [L]
    targets: Ints  # [L]

    @property
    def is_target(self) -> Bools:
        """Which candidates are their list's target."""
        return np.asarray(self.candidates == np.repeat(self.targets, self.lengths))


class Rule(Protocol):
    """Scores all candidates, the higher the better; -inf for one that it would never name."""

    def __call__(self, rows: Rows, /) -> Floats:
        """Return the scores of all candidates; [C]."""
        ...


def found_first(scores: Floats, rows: Rows, targets: Ints) -> Bools:
    """Return in which rows the target's score is above that of every other candidate; [R].

    Ties count against the rule, so one that scores all alike never finds anything.
    """
    of_target = np.full(len(rows.lengths), -np.inf)
    is_target = rows.candidates == np.repeat(targets, rows.lengths)
    owners = rows.owners
    of_target[owners[is_target]] = scores[is_target]
    beaten_by = np.bincount(owners[scores >= of_target[owners]], minlength=len(targets))
    return np.asarray((beaten_by == 1) & np.isfinite(of_target))


class NextInOrder(NamedTuple):
    """The candidate that follows the history's last item in an order, the nearest one above first.

        score(c | last) = last - c where c > last, else -inf       (descending: c - last where c < last)

    Where histories are sorted, what comes next is the smallest candidate above what came last, whoever the user is.
    """

    order: Order
    descending: bool = False

    def __call__(self, rows: Rows) -> Floats:
        """Return the scores of all candidates; [C]."""
        gap, comparable = _gaps(self.order, rows)
        gap = -gap if self.descending else gap
        return np.where(comparable & (gap > 0), -gap, -np.inf)


class NearestInOrder(NamedTuple):
    """The candidate whose id is nearest to that of the history's last item, that item itself left out."""

    order: Order

    def __call__(self, rows: Rows) -> Floats:
        """Return the scores of all candidates; [C]."""
        gap, comparable = _gaps(self.order, rows)
        return np.where(comparable & (gap != 0), -np.abs(gap), -np.inf)


class Position(NamedTuple):
    """The candidate at one place of the list: the place where most targets of known lists stand."""

    preference: Ints  # [longest list] rank of each place, 0 the best
    from_end: bool

    @classmethod
    def of(cls, lists: Lists) -> "Position":
        """Count places from the start and from the end of the lists, and keep what singles out one place more."""
        starts = np.cumsum(lists.lengths) - lists.lengths
        place = np.flatnonzero(lists.is_target) - starts[_owners(lists.lengths)[lists.is_target]]
        back = lists.lengths[_owners(lists.lengths)[lists.is_target]] - 1 - place
        counts = [np.bincount(each, minlength=1) for each in (place, back)]
        from_end = bool(counts[1].max() > counts[0].max())
        preference = np.empty(len(counts[from_end]), dtype=np.int64)
        preference[np.argsort(-counts[from_end], kind="stable")] = np.arange(len(preference))
        return cls(preference, from_end)

    def __call__(self, rows: Rows) -> Floats:
        """Return the scores of all candidates; [C]."""
        place = np.repeat(rows.lengths, rows.lengths) - 1 - rows.places if self.from_end else rows.places
        inside = place < len(self.preference)
        return np.where(inside, -self.preference[np.where(inside, place, 0)].astype(np.float64), -np.inf)


class TargetShare(NamedTuple):
    """How often a candidate was the target of the known lists that hold it: neither history nor other candidates."""

    share: Floats  # [I]

    @classmethod
    def of(cls, lists: Lists, num_items: int) -> "TargetShare":
        """Count in lists whose target is known; 0 for items in none of them."""
        held = np.bincount(lists.candidates[~lists.is_target], minlength=num_items)
        chosen = np.bincount(lists.targets, minlength=num_items)
        return cls(chosen / np.maximum(held + chosen, 1))

    def __call__(self, rows: Rows) -> Floats:
        """Return the scores of all candidates; [C]."""
        return self.share[rows.candidates]


class ListOverlap(NamedTuple):
    """How much a list looks like the known lists whose target was the candidate; the history is never seen.

        score(c | list) = mean over d in list, d != c, of 1[some list with target c holds d]
                          + 1e-3 * (share of the lists with target c that hold d)

    Negatives that are drawn by a seed of the target come back with it in every split, and this finds them. Of each list
    the first 24 others are asked.
    """

    num_items: int
    pairs: Ints  # sorted keys target * num_items + other
    share: Floats  # of each pair

    @classmethod
    def of(cls, lists: Lists, num_items: int) -> "ListOverlap":
        """Count which items stood in a list with each target."""
        target = np.repeat(lists.targets, lists.lengths)
        keys = (target * num_items + lists.candidates)[target != lists.candidates]
        pairs, counts = np.unique(keys, return_counts=True)
        lists_of_target = np.bincount(lists.targets, minlength=num_items)
        return cls(num_items, pairs, counts / np.maximum(lists_of_target[pairs // num_items], 1))

    def __call__(self, rows: Rows) -> Floats:
        """Return the scores of all candidates; [C]."""
        scores = np.zeros(len(rows.candidates))
        if len(self.pairs) == 0:
            return scores
        was_target = np.zeros(self.num_items, dtype=bool)
        was_target[self.pairs // self.num_items] = True
        asked = np.flatnonzero(was_target[rows.candidates])  # the others score nothing
        owner = rows.owners[asked]
        starts = np.cumsum(rows.lengths) - rows.lengths
        base = rows.candidates[asked] * self.num_items
        others = np.zeros(len(asked))
        for place in range(min(OTHERS_ASKED, int(rows.lengths.max(initial=0)))):
            there = place < rows.lengths[owner]
            other = rows.candidates[np.where(there, starts[owner] + place, 0)]
            there &= other != rows.candidates[asked]
            share = self._look_up(base + other)
            scores[asked] += there * ((share > 0) + 1e-3 * share)
            others += there
        scores[asked] /= np.maximum(others, 1)
        return scores

    def _look_up(self, keys: Ints) -> Floats:
        place = np.minimum(np.searchsorted(self.pairs, keys), len(self.pairs) - 1)
        return np.where(self.pairs[place] == keys, self.share[place], 0.0)


def _gaps(order: Order, rows: Rows) -> tuple[Floats, Bools]:
    """Return each candidate's value less that of the row's last item, and where both have one; [C]."""
    ends = np.cumsum(rows.met_lengths)
    last = np.where(rows.met_lengths > 0, _taken(rows.met, ends - 1), -1)[rows.owners]
    comparable = (last >= 0) & order.known[rows.candidates] & order.known[last]
    gap = order.values[rows.candidates] - order.values[last]
    return gap.astype(np.float64), comparable


def _taken(values: NDArray[Any], places: Ints) -> NDArray[Any]:
    """Return values at places; -1 for all where there are none."""
    return values[np.maximum(places, 0)] if len(values) else np.full(len(places), -1)


def _owners(lengths: Ints) -> Ints:
    return np.repeat(np.arange(len(lengths)), lengths)
