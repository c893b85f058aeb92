"""How often negatives, own and borrowed, are items that the user would like, and what the guard does about it.

Worked out from the feed alone, without a model. What a user would like is known for logs whose truth is known.

Axes:
    G  users of a global batch     N  negatives of each: drawn, then borrowed to be scored
    B  the first of those users    O  users whose negatives a user looks at: G, or 1, itself
    I  distinct items among all negatives of a batch
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from recray.train.feeding import AlignFeed, Lent
from recray.train.step import margins_of

THRESHOLDS = (-0.49, -0.475, -0.45, -0.4, -0.3, -0.2, -0.1, 0.0)  # at which the guard by nearness is judged
USERS_A_STEP = 256  # whose offers are looked at: a step of thousands has as many offers as users squared
ITEMS_TOLD = 50  # of those that are guarded most often


def known_false_negatives(
    feed: AlignFeed, steps: Iterable[int], liked: Sequence[Int[ndarray, " _"]]
) -> dict[str, float]:
    """Return how often usable negatives are known false ones, and the margin asked of those and of the others.

    Margins are told where each negative has its own.

    Args:
        feed: Of one rank.
        steps: Those to look at.
        liked: For each row of the examples, the items its user would like but never met.
    """
    own, borrowed, margin = _Tally(), _Tally(), _Tally()
    for step in steps:
        unit = feed.unit(step, 0)
        back = np.argsort(unit.arrays["place"])
        usable, sure = unit.arrays["usable"][back], unit.arrays["confidence"][back]
        items, mine = _items_and_own(feed, step, unit.rows)
        mine = np.broadcast_to(mine, usable.shape)
        false = np.stack([np.isin(each, liked[row]) for each, row in zip(items, unit.rows, strict=True)])
        own.add(false[usable & mine])
        borrowed.add(false[usable & ~mine])
        asked = margins_of(feed.objective, torch.from_numpy(sure), torch.from_numpy(~mine)).numpy()
        margin.add_weighted(asked[usable], false[usable])
    found = {
        "own_negatives_known_false": own.share(),
        "borrowed_negatives_known_false": borrowed.share(),
        "borrowed_negatives_each": borrowed.count / max(1, own.count) * feed.num_negatives,
    }
    if feed.objective.has_margins and feed.objective.margin == "per_negative":
        found |= {"margin_on_known_false": margin.mean_true(), "margin_on_others": margin.mean_false()}
    return found


def _items_and_own(
    feed: AlignFeed, step: int, rows: Sequence[int]
) -> tuple[Int[ndarray, "G O N"], Bool[ndarray, "_ _ _"]]:
    """Return which item each user's negatives are, -1 for padding, and which were drawn for the user itself."""
    if feed.objective.shares_scores:
        negatives = feed.negatives_of(rows)
        return np.broadcast_to(negatives, (len(rows), *negatives.shape)), np.eye(len(rows), dtype=bool)[:, :, None]
    width = feed.num_negatives + feed.objective.most_borrowed
    items = np.full((len(rows), 1, width), -1, dtype=np.int64)
    for each, listed in zip(items, feed.listed(step), strict=True):
        each[0, : listed.size - 1] = listed[1:]
    return items, (np.arange(width) < feed.num_negatives)[None, None]


class GuardAudit(NamedTuple):
    """What the guard keeps borrowers from, over some steps; an item that several lend to a user counts once."""

    facts: dict[str, Any]
    items: list[dict[str, Any]]  # guarded most often first


def audit_guard(
    feed: AlignFeed,
    steps: Iterable[int],
    labels: Sequence[str],
    liked: Sequence[Int[ndarray, " _"]] | None,
    *,
    users_a_step: int = USERS_A_STEP,
) -> GuardAudit:
    """Return how many items that are lent the borrower met or lies near to, and how often it likes those.

    Args:
        feed: Of an objective that borrows.
        steps: Those to look at.
        labels: Of all items.
        liked: For each row of the examples, the items its user would like but never met; None: it is not known.
        users_a_step: Of each step, the first so many.
    """
    counts = _Counts(len(labels), feed.objective.guard_threshold)
    for step in steps:
        lent, rows = feed.lent(step, users_a_step)
        likes = np.zeros_like(lent.offered)
        if liked is not None:
            likes = np.stack([np.isin(lent.items, liked[row]) for row in rows])
        counts.add(lent, likes)
    settings = feed.objective
    facts: dict[str, Any] = {"guard": settings.guard, "guard_near": settings.guard_near} | counts.facts(
        liked is not None
    )
    return GuardAudit(facts, counts.table(labels, liked is not None))


class _Counts:
    """Sums over pairs of a user and an item that is lent to it."""

    def __init__(self, num_items: int, threshold: float) -> None:
        self._threshold = threshold
        self._pairs = 0
        self._by_item = {
            name: np.zeros(num_items, dtype=np.int64) for name in ("lent", "met", "near", "liked", "right")
        }
        self._below = {level: np.zeros(2, dtype=np.int64) for level in (*THRESHOLDS, threshold)}  # all, and liked ones

    def add(self, lent: Lent, likes: Bool[ndarray, "B I"]) -> None:
        """Count what some users are offered; who has met an item is not asked how near it is."""
        unmet = lent.offered & ~lent.met
        near = unmet & (lent.confidence < self._threshold)
        self._pairs += lent.offered.shape[0]
        for name, pairs in (
            *(("lent", lent.offered), ("met", lent.offered & lent.met), ("near", near)),
            *(("liked", unmet & likes), ("right", near & likes)),
        ):
            self._by_item[name][lent.items] += pairs.sum(axis=0)
        for level, sums in self._below.items():
            below = unmet & (lent.confidence < level)
            sums += (below.sum(), (below & likes).sum())

    def facts(self, known: bool) -> dict[str, Any]:
        """Return shares of all that is lent; with known truth, how often the guard by nearness is right."""
        lent, met, liked = (int(self._by_item[name].sum()) for name in ("lent", "met", "liked"))
        found: dict[str, Any] = {
            "lent_each": lent / max(1, self._pairs),
            "met": met / max(1, lent),
            **self._at(self._threshold, lent - met, liked, known),
            "by_threshold": [self._at(level, lent - met, liked, known) for level in THRESHOLDS],
        }
        return found

    def _at(self, level: float, unmet: int, liked: int, known: bool) -> dict[str, float]:
        """Return what lies below a threshold of what is lent and was not met."""
        below, right = self._below[level].tolist()
        found = {"threshold": level, "near": below / max(1, unmet)}
        if known:
            found |= {
                "known_false": liked / max(1, unmet),  # what a guard that guesses would hit
                "precision": right / max(1, below),
                "recall": right / max(1, liked),
                "known_false_left": (liked - right) / max(1, unmet - below),
            }
        return found

    def table(self, labels: Sequence[str], known: bool) -> list[dict[str, Any]]:
        """Return the items that are guarded most often, with their counts."""
        guarded = self._by_item["met"] + self._by_item["near"]
        order = np.argsort(-guarded, kind="stable")[:ITEMS_TOLD]
        names = ("lent", "met", "near", *(("liked", "right") if known else ()))
        return [
            {"item": item, "label": labels[item]} | {name: int(self._by_item[name][item]) for name in names}
            for item in order.tolist()
            if guarded[item]
        ]


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
