"""Facts about a split that decide what a score on it can mean: counted, not judged.

Axes: R evaluation rows, T training histories, H items of all training histories end to end, N interactions of the log,
I items. Users are codes; -1 is a user of whom nothing else is known.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recray.data.hashing import Hash, mix
from recray.ranking.rules import Rows

Ints = NDArray[np.int64]

LARGEST_USERS = 10


class Fact(NamedTuple):
    """So many of so many, and why it matters. Neither number is known where the log lacks what it takes."""

    fact: str
    number: int | None
    of: int | None
    note: str


class Training(NamedTuple):
    """Training histories with the codes of their users."""

    items: Ints  # [H]
    lengths: Ints  # [T]
    users: Ints  # [T]

    @property
    def owners(self) -> Ints:
        """The user of each interaction; [H]."""
        return np.repeat(self.users, self.lengths)


class Log(NamedTuple):
    """The interactions of a log with a clock, in any order."""

    users: Ints  # [N]
    items: Ints  # [N]
    times: Ints  # [N] seconds


def row_facts(rows: Rows, targets: Ints, users: Ints, training: Training, num_items: int) -> list[Fact]:
    """Return what can be told without a clock.

    Args:
        rows, targets, users: of the evaluation rows; users as codes of the training histories' users.
        training: all training histories.
        num_items: I.
    """
    taught = np.bincount(training.items, minlength=num_items) > 0
    cold = int((~taught[targets]).sum())
    met = met_before(rows, targets, users, training, num_items)
    shared = np.isin(users, training.users)
    largest = np.sort(np.bincount(np.unique(users, return_inverse=True)[1]))[-LARGEST_USERS:]
    count = len(targets)
    return [
        Fact("cold targets", cold, count, "never met in training; what is never shown can't be learned from histories"),
        Fact(
            "targets already met", int(met.sum()), count, "by the same user; drawn candidates never are, so this tells"
        ),
        Fact("rows of users who are in training too", int(shared.sum()), count, "for new users look at the others"),
        Fact(
            "rows of the ten largest users",
            int(largest.sum()),
            count,
            "rows are not independent: intervals resample users",
        ),
    ]


def duplicate_facts(rows: Rows, targets: Ints, train_rows: Hash) -> list[Fact]:
    """Return how many rows stand elsewhere, too.

    Args:
        rows, targets: of the evaluation rows.
        train_rows: `row_hashes` of the training examples.
    """
    mine = row_hashes(rows.met, rows.met_lengths, targets)
    _, codes, counts = np.unique(mine, return_inverse=True, return_counts=True)
    twice, taught = int((counts[codes] > 1).sum()), int(np.isin(mine, train_rows).sum())
    return [
        Fact("rows that stand twice", twice, len(mine), "with the same history and target"),
        Fact("rows that are training examples", taught, len(mine), "with the same history and target"),
    ]


def time_facts(
    targets: Ints, users: Ints, training: Training, log: Log | None, when_trained: Ints | None, num_items: int
) -> list[Fact]:
    """Return how much of training is later than what is to be foretold; unknown without a clock.

    Args:
        targets, users: of the evaluation rows.
        training: all training histories.
        log, when_trained: the log, and when each training interaction happened first; None without a clock.
        num_items: I.
    """
    names = ("training interactions later than half of the targets", "rows with training of the same user later")
    notes = (
        "models know what the world did after the moment they foretell; a split by time has none",
        "later than the row's target: the user's own future",
    )
    if log is None or when_trained is None:
        return [Fact(name, None, None, "the log has no timestamps") for name in names]
    when_target = times_of(log, users, targets, num_items, latest=True)
    if len(when_target) == 0 or (when_target < 0).all():
        return [Fact(name, None, None, "the targets are not in the log") for name in names]
    moment = np.median(when_target[when_target >= 0])
    newest = np.full(int(max(users.max(initial=0), training.users.max(initial=0))) + 1, -1)
    known = training.owners >= 0
    np.maximum.at(newest, training.owners[known], when_trained[known])
    own = (when_target >= 0) & (users >= 0) & (newest[np.maximum(users, 0)] > when_target)
    return [
        Fact(names[0], int((when_trained > moment).sum()), len(when_trained), notes[0]),
        Fact(names[1], int(own.sum()), len(targets), notes[1]),
    ]


def met_before(rows: Rows, targets: Ints, users: Ints, training: Training, num_items: int) -> NDArray[np.bool_]:
    """Return which targets are in the row's own history or in a training history of the same user; [R]."""
    by = np.repeat(np.arange(len(targets)), rows.met_lengths)
    found = np.zeros(len(targets), dtype=bool)
    found[by[rows.met == targets[by]]] = True
    asked = users * num_items + targets
    known = np.unique(asked[users >= 0])
    keys = training.owners * num_items + training.items
    trained = np.intersect1d(keys[_among(keys, known)], known) if len(known) else known
    return np.asarray(found | ((users >= 0) & np.isin(asked, trained)))


def times_of(log: Log, users: Ints, items: NDArray[Any], num_items: int, *, latest: bool) -> Ints:
    """Return when each user met each item, the latest or the first time; -1 for what the log does not hold."""
    keys = log.users * num_items + log.items
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else order
    asked = users * num_items + items
    if len(starts) == 0:
        return np.full(len(asked), -1, dtype=np.int64)
    times = (np.maximum if latest else np.minimum).reduceat(log.times[order], starts)
    place = np.minimum(np.searchsorted(ordered[starts], asked), len(starts) - 1)
    return np.where((ordered[starts][place] == asked) & (users >= 0), times[place], -1)


def row_hashes(met: Ints, met_lengths: Ints, targets: Ints) -> Hash:
    """Return one hash of each row's history and target; [R]."""
    starts = np.cumsum(met_lengths) - met_lengths
    place = np.arange(len(met)) - np.repeat(starts, met_lengths)
    running = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(mix(place, met), dtype=np.uint64)])
    with np.errstate(over="ignore"):
        sums = running[starts + met_lengths] - running[starts]
    return mix(sums, met_lengths, targets)


def _among(keys: Ints, known: Ints) -> NDArray[np.bool_]:
    """Return which keys are among sorted ones."""
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return np.asarray(known[place] == keys)
