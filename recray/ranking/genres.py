"""How what is shown spreads over genres, beside what people had met before.

Axes: R rows, K recommended items a row, I items, G genres, E pairs of an item and one of its genres.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# How catalogues write that they know no genre; MovieLens has the last.
NO_GENRE = ("", "None", "(no genres listed)")


class Genres(NamedTuple):
    """Who has which genre; an item of n genres counts 1/n for each."""

    names: list[str]  # [G], sorted
    items: NDArray[np.int64]  # [E]
    genres: NDArray[np.int64]  # [E]
    weights: Floats  # [E]
    has_one: NDArray[np.bool_]  # [I], whether an item has a genre at all

    @classmethod
    def of(cls, flat: NDArray[Any], lengths: NDArray[Any]) -> "Genres":
        """Take the genres of all items, end to end, and how many each item has; a genre named twice counts once.

        Args:
            flat: [sum of lengths] names.
            lengths: [I].
        """
        owner, named = np.repeat(np.arange(len(lengths)), lengths), np.asarray(flat).astype(str)
        known = ~np.isin(named, NO_GENRE)
        names, code = np.unique(named[known], return_inverse=True)
        number = max(1, len(names))
        items, genres = np.divmod(np.unique(owner[known] * number + code), number)
        of_item = np.bincount(items, minlength=len(lengths))
        return cls(names.tolist(), items, genres, 1.0 / of_item[items], of_item > 0)


def genre_shares(items: NDArray[Any], genres: Genres) -> Floats:
    """Return the share of every genre in `items` (repeats count, -1 does not), which sum to one; [G].

    Items without genres are left out. NaN where none has one.
    """
    items = np.asarray(items).ravel()
    times = np.bincount(items[items >= 0], minlength=len(genres.has_one))
    share = np.bincount(genres.genres, weights=times[genres.items] * genres.weights, minlength=len(genres.names))
    total = share.sum()
    return share / total if total else np.full(len(genres.names), np.nan)


def without_genre(items: NDArray[Any], genres: Genres) -> int:
    """Return how many of `items` (repeats count, -1 does not) have no genre, so that the shares leave them out."""
    items = np.asarray(items).ravel()
    return int((~genres.has_one[items[items >= 0]]).sum())


def mgu(shown: NDArray[Any], met: NDArray[Any]) -> float:
    """Return the mean over genres of |G_rec - G_hist|: how far what is shown is from what people had met.

    Args:
        shown: [G] shares of what is recommended.
        met: [G] shares of the histories.

    Source: the mean genre unfairness of IFairLRS and SPRec. Over all genres of the catalogue.
    """
    return float(np.abs(np.asarray(shown) - np.asarray(met)).mean())


def dgu(shown: NDArray[Any], met: NDArray[Any]) -> float:
    """Return max_g (G_rec - G_hist) - min_g (G_rec - G_hist): from the genre shown too little to that shown too much.

    Args:
        shown: [G] shares of what is recommended.
        met: [G] shares of the histories.

    Source: the difference genre unfairness of IFairLRS and SPRec.
    """
    return float(np.ptp(np.asarray(shown) - np.asarray(met)))
