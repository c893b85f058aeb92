"""Two folds of users: what a user's negatives are worth is judged by a model that was fitted without that user.

A model that was fitted on a user's history knows by heart what the user took, and scores all else lower, what the user
would have liked as well. See docs/confidence.md.

Axes:
    U  users, or rows of users
    V  validation rows
    K  items that are judged
    D  width of user and item vectors
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from recray.config import Users
from recray.data.hashing import hash_strings, mix
from recray.errors import DataError
from recray.objectives.margins import confidence
from recray.users.fit import Validation
from recray.users.ragged import Ragged, take

FOLDS = 2
_OF_FOLDS = 0xF01D  # keeps this hash of users apart from others under the same seed


class Log(NamedTuple):
    """What SASRec is fitted on, and which users are whose."""

    histories: Ragged
    validation: Validation
    folds: Int[ndarray, " U"]  # of the users of the histories
    rows_folds: Int[ndarray, " V"]  # of the users of the validation rows


def folds_of(user_ids: pa.Array | pa.ChunkedArray, *, seed: int) -> Int[ndarray, " U"]:
    """Return the fold of each user, 0 or 1: by a seeded hash of the id, whoever else there is.

    >>> folds_of(pa.array(["ann", "bob", "eve", "ann"]), seed=3).tolist()
    [0, 1, 0, 0]
    """
    folds: ndarray = (mix(seed, _OF_FOLDS, hash_strings(user_ids)) % np.uint64(FOLDS)).astype(np.int32)
    return folds


def without(fold: int, log: Log) -> Log:
    """Return what the users outside a fold did.

    Validation rows of the fold are left out as well: they hold the histories of their users, and decide the pass at
    which a fit stops.

    Raises:
        DataError: if no history or no validation row is left.
    """
    kept, rows = np.flatnonzero(log.folds != fold), np.flatnonzero(log.rows_folds != fold)
    if not len(kept) or not len(rows):
        raise DataError(
            f"users.folds is {FOLDS}, but without fold {fold} {len(kept)} of {len(log.folds)} training histories and "
            f"{len(rows)} of {len(log.rows_folds)} validation rows are left; set users.folds=1"
        )
    old = log.validation
    left = Validation(take(old.histories, rows), take(old.candidates, rows), old.targets[rows])
    return Log(take(log.histories, kept), left, log.folds[kept], log.rows_folds[rows])


def in_as_many_steps(settings: Users) -> Users:
    """Return the settings of a fit without a fold: its passes are over half of the users, so it may take twice as many.

    So it ends after as many steps at most, and as many without an improvement, as the fit on all users.
    """
    return settings.model_copy(update={"passes": FOLDS * settings.passes, "patience": FOLDS * settings.patience})


def confidences(
    users: Float[ndarray, "U D"], folds: Int[ndarray, " U"], judges: Sequence[Float[ndarray, "K D"]]
) -> Float[ndarray, "U K"]:
    """Return each user's confidence in each of K items, its percentile among them, by the model that judges its fold.

    Args:
        users: [U, D] vectors by that model.
        folds: [U] a place in `judges`.
        judges: for each fold the vectors of the K items.
    """
    found = np.empty((len(users), len(judges[0])), dtype=np.float32)
    for fold, items in enumerate(map(torch.from_numpy, judges)):
        own = folds == fold
        found[own] = confidence(torch.from_numpy(users[own]), items, items).numpy()
    return found


def separation(sure: Float[ndarray, "U K"], false: Bool[ndarray, "U K"], among: Bool[ndarray, "U K"]) -> float:
    """Return how well confidence tells false negatives from the others: the area under its ROC curve.

    That is the chance that, of a false negative and another one, of any two users, the false one has the lower
    confidence; a tie counts half. 1/2 is none, 1 is perfect; NaN where either kind is missing.

    Args:
        sure: [U, K] that item k is a true negative for user u.
        false: [U, K] whether it is a false one.
        among: [U, K] whether it counts.
    """
    values, kinds = sure[among], false[among]
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # from 1, mean of ties
    wrong, others = int(kinds.sum()), int((~kinds).sum())
    if not wrong or not others:
        return float("nan")
    above = rank[place][~kinds].sum() - others * (others + 1) / 2
    return float(above / (wrong * others))
