"""How often negatives, own and borrowed, are items that the user would like: for logs whose truth is known.

Axes:
    G  users of a global batch     N  negatives drawn for each
"""

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from recray.train.feeding import AlignFeed


def known_false_negatives(
    feed: AlignFeed, steps: Iterable[int], liked: Sequence[Int[ndarray, " liked"]], *, base: float, slope: float
) -> dict[str, float]:
    """Return how often usable negatives are known false ones, and the margin asked of those and of the others.

    Args:
        feed: Of one rank.
        steps: Those to look at.
        liked: For each row of the examples, the items its user would like but never met.
        base: gamma_0 of the per-negative margin.
        slope: alpha.
    """
    own, borrowed = _Tally(), _Tally()
    margin = _Tally()
    for step in steps:
        unit = feed.unit(step, 0)
        back = np.argsort(unit.arrays["place"])
        usable, sure = unit.arrays["usable"][back], unit.arrays["confidence"][back]
        false = _liked(feed.negatives_of(unit.rows), [liked[row] for row in unit.rows])
        mine = np.eye(len(unit.rows), dtype=bool)[:, :, None]
        own.add(false[usable & mine])
        borrowed.add(false[usable & ~mine])
        asked = np.maximum(0.0, base * (1 + slope * sure))
        margin.add_weighted(asked[usable], false[usable])
    return {
        "own_negatives_known_false": own.share(),
        "borrowed_negatives_known_false": borrowed.share(),
        "borrowed_negatives_each": borrowed.count / max(1, own.count) * feed.num_negatives,
        "margin_on_known_false": margin.mean_true(),
        "margin_on_others": margin.mean_false(),
    }


def _liked(negatives: Int[ndarray, "G N"], liked: Sequence[Int[ndarray, " liked"]]) -> Bool[ndarray, "G G N"]:
    """Return which negative of which owner (second axis) each borrower (first axis) would like."""
    flat = np.stack([np.isin(negatives.reshape(-1), own) for own in liked])
    return flat.reshape(len(liked), *negatives.shape)


class _Tally:
    """Counts and sums of values that fall into two kinds."""

    def __init__(self) -> None:
        self.count = self.true = 0
        self._sums = [0.0, 0.0]

    def add(self, kinds: Bool[ndarray, " n"]) -> None:
        """Count these."""
        self.count += kinds.size
        self.true += int(kinds.sum())

    def add_weighted(self, values: Float[ndarray, " n"], kinds: Bool[ndarray, " n"]) -> None:
        """Count these, with a value each."""
        self.add(kinds)
        self._sums[0] += float(values[~kinds].sum())
        self._sums[1] += float(values[kinds].sum())

    def share(self) -> float:
        """Return the share of the true kind."""
        return self.true / max(1, self.count)

    def mean_true(self) -> float:
        """Return the mean value of the true kind."""
        return self._sums[1] / max(1, self.true)

    def mean_false(self) -> float:
        """Return the mean value of the other kind."""
        return self._sums[0] / max(1, self.count - self.true)
