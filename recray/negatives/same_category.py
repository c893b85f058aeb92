"""Hard negatives: items that share a genre with what the user took.

Axes: R rows, N negatives a row, M items met, I items, T all rows, S sets of genres, E pairs of an item and a genre.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from numpy import ndarray

from recray.negatives.draws import Drawn, contains, distinct
from recray.negatives.lists import Targets, filled, places
from recray.ranking import genres as of_catalogue
from recray.users.ragged import Ragged, take


class Genres(NamedTuple):
    """Which items have which genres."""

    set_of_item: Int[ndarray, " I"]  # the same where the genres are the same; -1 without any
    items: Int[ndarray, " E"]
    genres: Int[ndarray, " E"]
    sets: list[tuple[int, ...]]  # [S] genres of each set

    def sharing(self, which: int) -> Int[ndarray, " i"]:
        """Return the items that have at least one genre of this set, ascending."""
        return np.unique(self.items[np.isin(self.genres, self.sets[which])])


def genres_of(items: Int[ndarray, " E"], genres: Int[ndarray, " E"], num_items: int) -> Genres:
    """Return the sets of genres, from pairs of an item and one of its genres, each once."""
    order = np.lexsort([genres, items])
    items, genres = items[order], genres[order]
    numbers: dict[tuple[int, ...], int] = {}
    set_of_item = np.full(num_items, -1, dtype=np.int64)
    named, firsts = np.unique(items, return_index=True)
    apart = np.split(genres, firsts)[1:]  # what stands before the first is empty
    for item, own in zip(named.tolist(), apart, strict=True):
        set_of_item[item] = numbers.setdefault(tuple(own.tolist()), len(numbers))
    return Genres(set_of_item, items, genres, list(numbers))


def genres_of_items(lists: pa.ListArray | pa.ChunkedArray) -> Genres:
    """Return the sets of genres of a catalogue's items, [I] lists of names in item order; null: none."""
    lists = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    named = of_catalogue.Genres.of(
        np.asarray(lists.flatten()), np.asarray(lists.value_lengths().fill_null(0), dtype=np.int64)
    )
    return genres_of(named.items, named.genres, len(lists))


def draw(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    targets: Targets,
    genres: Genres,
    seed: int,
) -> Drawn:
    """Return `num` different items a row, each as likely as any other that shares a genre with the row's target.

    Where too few do that the user did not meet, or the target has no genre, the others are uniform.

    Args:
        rows: [R] row ids.
        met_items: [M] what the user of each row met in training, end to end; nothing else is left out.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        targets: of all rows.
        genres: of all items.
        seed: of all draws.

    Raises:
        ValueError: if a row has fewer than `num` items left, or no target is known of it.
    """
    if num < 1:
        raise ValueError(f"at least one negative a row must be wanted, got {num}")
    num_items = len(genres.set_of_item)
    sets = genres.set_of_item[targets.items[places(targets.rows, rows)]]
    negatives, own = np.full((len(rows), num), -1, dtype=np.int32), np.zeros(len(rows), dtype=np.int64)
    for which in np.unique(sets[sets >= 0]).tolist():
        at = np.flatnonzero(sets == which)
        met = take(Ragged(met_items, met_offsets), at)
        sharing = genres.sharing(which)
        own[at] = np.minimum(num, len(sharing) - _members(met, sharing, num_items))
        for count in np.unique(own[at][own[at] > 0]).tolist():
            some = np.flatnonzero(own[at] == count)
            negatives[at[some], :count] = _among(rows[at[some]], take(met, some), count, sharing, num_items, seed)
    return filled(
        rows, met_items, met_offsets, Drawn(negatives, own), weights=np.ones(num_items, dtype=np.float64), seed=seed
    )


def _among(
    rows: Int[ndarray, " r"],
    met: Ragged,
    num: int,
    items: Int[ndarray, " i"],
    num_items: int,
    seed: int,
) -> Int[ndarray, "r n"]:
    """Return `num` of these items for each row, uniform."""
    weights = np.zeros(num_items)
    weights[items] = 1.0

    def place(chance: Float[ndarray, "R K"]) -> Int[ndarray, "R K"]:
        return items[(chance * len(items)).astype(np.int64)].astype(np.int64)

    return distinct(rows, met.items, met.offsets, num=num, seed=seed, place=place, weights=weights)


def _members(lists: Ragged, items: Int[ndarray, " i"], num_items: int) -> Int[ndarray, " r"]:
    """Return how many different ones of these items each list holds."""
    owners = np.repeat(np.arange(lists.num_lists), lists.lengths)
    keys = np.unique((owners * num_items + lists.items)[contains(items, lists.items)])
    return np.bincount(keys // num_items, minlength=lists.num_lists)
