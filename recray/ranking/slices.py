"""Parts of the evaluation rows that are looked at on their own: each kind cuts all rows, so none is lost.

Axes: R rows, I items.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from recray.ranking.exposure import BAND_NAMES, bands

HISTORY_LENGTH, TRAINING, POPULARITY = "history length", "target in training", "popularity of the target"
COLD, WARM = "never met", "met"

# The shortest history of each slice but the first, and what the slices are called.
LENGTH_BORDERS = (1, 5, 10, 20, 50)
LENGTH_NAMES = ("0", "1–4", "5–9", "10–19", "20–49", "50 or more")


class Slice(NamedTuple):
    """Some of the rows."""

    by: str  # the kind: slices of one kind cut all rows
    name: str
    chosen: NDArray[np.bool_]  # [R]


def slices(history_lengths: NDArray[Any], targets: NDArray[Any], popularity: NDArray[Any]) -> list[Slice]:
    """Return the slices that hold a row, by kind: length of the history, target in training or not, its popularity.

    Popularity is cut in `exposure.bands`: a target never met in training is in the tail.

    Args:
        history_lengths: [R] items of what a model is shown.
        targets: [R] items.
        popularity: [I] training interactions of every item.
    """
    lengths = np.searchsorted(LENGTH_BORDERS, np.asarray(history_lengths), side="right")
    cold = (np.asarray(popularity)[targets] == 0).astype(np.int64)
    band = bands(popularity)[targets]
    kinds = ((TRAINING, (WARM, COLD), cold), (POPULARITY, BAND_NAMES, band), (HISTORY_LENGTH, LENGTH_NAMES, lengths))
    every = [Slice(by, name, code == place) for by, names, code in kinds for place, name in enumerate(names)]
    return [each for each in every if each.chosen.any()]
