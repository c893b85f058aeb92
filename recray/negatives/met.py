"""What each user met in training: exactly what no negative of that user may be.

Axes:
    U  users
    R  rows
    N  negatives a row
    M  items of all users together
    I  items of the catalogue
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int
from numpy import ndarray

from recray.errors import DataError
from recray.negatives.draws import contains
from recray.users.ragged import Ragged, from_arrow, take

ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ItemsOfUsers:
    """A set of items for each user."""

    user_ids: pa.Array  # [U] strings, each once
    items: Ragged  # [U] lists, sorted, each item once
    num_items: int

    def rows_of(self, user_ids: pa.ChunkedArray | pa.Array) -> Int[ndarray, " R"]:
        """Return the place of each of these users, -1 where the user is unknown."""
        found = pc.index_in(user_ids, value_set=self.user_ids).fill_null(-1)
        if isinstance(found, pa.ChunkedArray):
            found = found.combine_chunks()
        return np.asarray(found).astype(np.int64)

    def keys(self) -> Int[ndarray, " M"]:
        """Return place * num_items + item of every member, sorted."""
        owners = np.repeat(np.arange(self.items.num_lists), self.items.lengths)
        return np.asarray(owners * self.num_items + self.items.items)


def met_in_training(histories: pa.Table, examples: pa.Table, num_items: int) -> ItemsOfUsers:
    """Return what each user met in the training split: in any of its histories, and in any of its examples.

    Items that a user meets only in validation or test are left in: leaving them out of what is drawn would teach the
    answers.

    Args:
        histories: recray.schema.HISTORIES.
        examples: recray.schema.EXAMPLES of the training split: histories and targets.
        num_items: I.

    Raises:
        DataError: if a table holds an item that is not in the catalogue.
    """
    users = _chunks(histories["user_id"], examples["user_id"], examples["user_id"])
    seen, known = from_arrow(histories["items"]), from_arrow(examples["history"])
    lengths = np.concatenate([seen.lengths, known.lengths, np.ones(examples.num_rows, dtype=np.int64)])
    items = np.concatenate([seen.items, known.items, np.asarray(examples["target"], dtype=np.int32)])
    return _gathered(users, lengths, items, num_items)


def of_rows(met: ItemsOfUsers, user_ids: pa.ChunkedArray | pa.Array) -> Ragged:
    """Return what the user of each row met.

    Raises:
        DataError: if a user is unknown.
    """
    places = met.rows_of(user_ids)
    if (places < 0).any():
        unknown = user_ids[int(np.flatnonzero(places < 0)[0])].as_py()
        raise DataError(f"user {unknown!r} has an example, but nothing met in training; run the sequences stage again")
    return take(met.items, places)


def held_out(validation: pa.Table, test: pa.Table, num_items: int) -> ItemsOfUsers:
    """Return the targets of each user's validation and test rows."""
    users = _chunks(validation["user_id"], test["user_id"])
    targets = np.concatenate([np.asarray(table["target"], dtype=np.int32) for table in (validation, test)])
    return _gathered(users, np.ones(len(targets), dtype=np.int64), targets, num_items)


def liked_but_never_met(truth: pa.Table, num_items: int) -> ItemsOfUsers:
    """Return the known false negatives of each user, where the log's truth is known: columns user_id and liked."""
    lists = from_arrow(truth["liked"])
    return _gathered(_chunks(truth["user_id"]), lists.lengths, lists.items, num_items)


def encounters(
    negatives: Int[ndarray, "R N"],
    user_ids: pa.ChunkedArray,
    among: ItemsOfUsers,
    met: ItemsOfUsers,
    weights: Float[ndarray, " I"],
) -> dict[str, float]:
    """Return how often a negative is among its user's `among`, and how often chance says so.

    `share` is of all negatives, `first_share` of the first of each row, and `by_chance` what to expect of it: the
    weight of the user's `among` that are not met, over the weight of all items not met. For a sampler whose weights
    are alike that is what to expect of `share`, too; one that favours some items runs out of them.
    """
    places, own = among.rows_of(user_ids), met.rows_of(user_ids)
    keys = among.keys()
    hits = np.zeros(negatives.shape[1], dtype=np.int64)
    for first in range(0, len(negatives), ROWS_AT_ONCE):
        part = slice(first, first + ROWS_AT_ONCE)
        drawn = places[part, None] * among.num_items + negatives[part]
        hits += (contains(keys, drawn) & (places[part, None] >= 0)).sum(axis=0)
    possible = np.append(_weight_not_met(among, met, weights), 0.0)[places]  # -1, an unknown user, is the 0
    left = weights.sum() - _weight(met.items, weights)
    return {
        "share": float(hits.sum() / negatives.size),
        "first_share": float(hits[0] / len(negatives)),
        "by_chance": float((possible / left[own]).mean()),
    }


def _weight_not_met(among: ItemsOfUsers, met: ItemsOfUsers, weights: Float[ndarray, " I"]) -> Float[ndarray, " U"]:
    """Return for each user of `among` the weight of its items without those that the user met."""
    places = np.arange(among.items.num_lists)
    owners = np.repeat(places, among.items.lengths)
    theirs = met.rows_of(among.user_ids)[owners]
    items = among.items.items
    kept = ~contains(met.keys(), theirs * met.num_items + items) | (theirs < 0)
    return np.bincount(owners, weights=np.where(kept, weights[items], 0.0), minlength=len(places))


def _weight(lists: Ragged, weights: Float[ndarray, " I"]) -> Float[ndarray, " U"]:
    owners = np.repeat(np.arange(lists.num_lists), lists.lengths)
    return np.bincount(owners, weights=weights[lists.items], minlength=lists.num_lists)


def _gathered(
    users: pa.ChunkedArray, lengths: Int[ndarray, " R"], items: Int[ndarray, " M"], num_items: int
) -> ItemsOfUsers:
    """Return the union of each user's lists."""
    if len(items) and not (items.min() >= 0 and items.max() < num_items):
        raise DataError(
            f"sequences hold items {int(items.min())} to {int(items.max())}, but the catalogue has {num_items}; "
            "run the sequences stage again"
        )
    encoded = users.combine_chunks().dictionary_encode()
    owners = np.repeat(np.asarray(encoded.indices, dtype=np.int64), lengths)
    keys = np.unique(owners * num_items + items)
    num_users = len(encoded.dictionary)
    offsets = np.searchsorted(keys, np.arange(num_users + 1, dtype=np.int64) * num_items)
    return ItemsOfUsers(encoded.dictionary, Ragged((keys % num_items).astype(np.int32), offsets), num_items)


def _chunks(*columns: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
