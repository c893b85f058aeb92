"""Negatives from a list of candidates that each row has, in the order of a key, and from all items where it ends.

Axes:
    R  rows
    r  rows that are worked on together
    P  places of a row's list
    N  negatives wanted a row
    M  items met, all rows together
    I  items of the catalogue

A list does not depend on N, nor does its order: so the first N of any larger draw are the smaller one. Where a list
has fewer than N items that the user did not meet, all of those are taken, and `distinct` draws the others.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from recray.negatives import draws
from recray.negatives.draws import Drawn, another_seed, by_weight, contains, distinct
from recray.users.ragged import Ragged, take

# From places among the rows to their lists: items, -1 where a list ends, and keys, the least of which comes first.
Candidates = Callable[[slice], tuple[Int[ndarray, "r P"], Float[ndarray, "r P"]]]

_FALLBACK = 1


class Targets(NamedTuple):
    """What came next in each row."""

    rows: Int[ndarray, " R"]  # ids, ascending
    items: Int[ndarray, " R"]


def places(known: Int[ndarray, " T"], rows: Int[ndarray, " R"]) -> Int[ndarray, " R"]:
    """Return where each of `rows` is among the `known` ones, which ascend.

    Raises:
        ValueError: if one is not there.
    """
    found = np.minimum(np.searchsorted(known, rows), len(known) - 1)
    missing = rows[known[found] != rows]
    if len(missing):
        raise ValueError(f"{len(missing)} rows are not among the {len(known)} known ones, row {missing[0]} for one")
    return np.asarray(found)


def from_lists(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    seed: int,
    candidates: Candidates,
    width: int,
    weights: Float[ndarray, " I"],
) -> Drawn:
    """Return the first `num` items of each row's list that its user did not meet, each once.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        seed: of the fallback's draws.
        candidates: the lists.
        width: P, to know how many rows fit into memory together.
        weights: [I] by which the fallback draws.

    Raises:
        ValueError: if lists and fallback together have fewer than `num` items for a row.
    """
    if num < 1:
        raise ValueError(f"at least one negative a row must be wanted, got {num}")
    negatives, own = np.full((len(rows), num), -1, dtype=np.int32), np.zeros(len(rows), dtype=np.int64)
    share = max(1, draws.CELLS_AT_ONCE // (4 * (num + width)))
    for first in range(0, len(rows), share):
        part = slice(first, min(first + share, len(rows)))
        offsets = met_offsets[part.start : part.stop + 1]
        owners = np.repeat(np.arange(part.stop - part.start), np.diff(offsets))
        barred = np.unique(owners * len(weights) + met_items[offsets[0] : offsets[-1]])
        items, keys = candidates(part)
        negatives[part], own[part] = _first(items, keys, barred, num, len(weights))
    return filled(rows, met_items, met_offsets, Drawn(negatives, own), weights=weights, seed=seed)


def filled(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    drawn: Drawn,
    *,
    weights: Float[ndarray, " I"],
    seed: int,
) -> Drawn:
    """Return `drawn` with the places behind each row's own negatives drawn by weight.

    A row that lacks one must have all that its sampler is for, or the first of a larger draw would not be the smaller.

    Raises:
        ValueError: if a row has too few items left.
    """
    negatives, own = drawn.negatives.copy(), drawn.own
    lacking = negatives.shape[1] - own
    for lack in np.unique(lacking[lacking > 0]).tolist():
        at = np.flatnonzero(lacking == lack)
        taken = negatives[at, : negatives.shape[1] - lack]
        items, offsets = _with(take(Ragged(met_items, met_offsets), at), taken)
        negatives[at, -lack:] = distinct(
            rows[at],
            items,
            offsets,
            num=lack,
            seed=another_seed(seed, _FALLBACK),
            place=by_weight(weights),
            weights=weights,
        )
    return Drawn(negatives, own)


def _with(lists: Ragged, more: Int[ndarray, "r n"]) -> tuple[Int[ndarray, " m"], Int[ndarray, " offsets"]]:
    """Return the lists with as many more items each, and where each begins and ends."""
    rows = np.arange(lists.num_lists)
    owners = np.concatenate([np.repeat(rows, lists.lengths), np.repeat(rows, more.shape[1])])
    items = np.concatenate([lists.items, more.reshape(-1)])[np.argsort(owners, kind="stable")]
    return items, lists.offsets + more.shape[1] * np.arange(lists.num_lists + 1)


def _first(
    items: Int[ndarray, "r P"],
    keys: Float[ndarray, "r P"],
    barred: Int[ndarray, " met"],
    num: int,
    num_items: int,
) -> tuple[Int[ndarray, "r N"], Int[ndarray, " r"]]:
    """Return the `num` different items with the least keys that are allowed, -1 where there are too few; how many."""
    owners = np.arange(len(items))[:, None]
    allowed = (items >= 0) & ~contains(barred, owners * num_items + items)
    order = np.argsort(np.where(allowed, keys, np.inf), axis=1, kind="stable")
    ordered, kept = np.take_along_axis(items, order, axis=1), np.take_along_axis(allowed, order, axis=1)
    kept &= ~_repeated(np.where(kept, ordered, -1))
    found = kept.cumsum(axis=1)
    kept &= found <= num
    chosen = np.full((len(items), num), -1, dtype=np.int32)
    at, column = np.nonzero(kept)
    chosen[at, found[at, column] - 1] = ordered[at, column]
    return chosen, np.minimum(found[:, -1], num)


def _repeated(items: Int[ndarray, "r P"]) -> Bool[ndarray, "r P"]:
    """Return which are in their row a second time."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    again = np.zeros(items.shape, dtype=bool)
    np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return again
