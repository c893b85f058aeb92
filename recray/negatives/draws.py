"""What all samplers share: counter-based randomness, and distinct draws that leave out what a user met.

Axes:
    R  rows
    N  negatives wanted a row
    M  items met, all rows together
    I  items of the catalogue
    K  draws made at once

The negatives of a row are defined without its neighbours, and without N. Draws k = 0, 1, 2, ... are hashes of
(seed, row, k), and count unless their item was met or has been drawn before. After `patience` draws, which a row only
makes if it asks for much of what there is or if few items hold nearly all the weight, the items that are left come in
the order of an exponential race: by -log(hash of (seed, row, item)) over the item's weight. Both are sampling without
replacement by weight, so the change from one to the other changes no distribution. The race costs as much as the
catalogue is long, so `patience` grows with that; it doesn't depend on N, or larger draws would not begin with smaller.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64
from numpy import ndarray

# From chances in [0, 1) to items; what makes one sampler differ from another.
Place = Callable[[Float[ndarray, "R K"]], Int[ndarray, "R K"]]

CELLS_AT_ONCE = 1 << 21  # draws in memory: 16 MiB each of hashes, keys and order
_DRAW, _RACE, LISTED = 1, 2, 3  # the uses of chance, kept apart; the last orders what a row's own list holds


class Drawn(NamedTuple):
    """Negatives, and how many of each row's are what the sampler is for; its fallback found the others."""

    negatives: Int[ndarray, "R N"]  # int32
    own: Int[ndarray, " R"]


def distinct(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    *,
    num: int,
    seed: int,
    place: Place,
    weights: Float[ndarray, " I"],
) -> Int[ndarray, "R N"]:
    """Return `num` different items a row, none of them met by the row's user: the first N of any larger number.

    Args:
        rows: [R] row ids: with the seed, all that chance depends on.
        met_items: [M] what the user of each row met in training, end to end; repeats do no harm.
        met_offsets: [R + 1] where each row's items begin and end.
        num: N, at least 1.
        seed: of all draws.
        place: from a chance in [0, 1) to an item, by weight.
        weights: [I] not negative; an item of weight 0 is never drawn.

    Raises:
        ValueError: if a row has fewer than `num` items left, naming the row and the counts; if an item met is not in
            the catalogue, or the offsets don't fit.
    """
    _check(rows, met_items, met_offsets, num, len(weights))
    negatives = np.empty((len(rows), num), dtype=np.int32)
    share = max(1, CELLS_AT_ONCE // (4 * num + 16))
    for first in range(0, len(rows), share):
        part = slice(first, first + share)
        offsets = met_offsets[first : first + share + 1]
        met = met_items[offsets[0] : offsets[-1]]
        owners = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        keys = np.unique(owners * len(weights) + met)
        negatives[part] = _chunk(rows[part], keys, num, seed, place, weights)
    return negatives


def by_weight(weights: Float[ndarray, " I"]) -> Place:
    """Return what places chances on items in proportion to their weights."""
    cumulative = np.cumsum(weights)
    last = int(np.max(np.flatnonzero(weights), initial=0))

    def place(chance: Float[ndarray, "R K"]) -> Int[ndarray, "R K"]:
        # Rounding may carry the largest chances to the very end, beyond the last item that can be drawn.
        found = np.searchsorted(cumulative, chance * cumulative[-1], side="right")
        return np.asarray(np.minimum(found, last))

    return place


def another_seed(seed: int, use: int) -> int:
    """Return a seed that is as good as independent of this one and of that of any other use."""
    return int(np.random.SeedSequence([seed, use]).generate_state(1, np.uint64)[0] >> np.uint64(2))


def chances(seed: int, rows: Int[ndarray, " R"], counters: Int[ndarray, " K"], use: int) -> Float[ndarray, "R K"]:
    """Return numbers in [0, 1), one for each (row, counter): a hash, so the same wherever and whenever asked for."""
    seeded = _mix(np.array([seed], dtype=np.uint64) * np.uint64(4) + np.uint64(use))
    of_row = _mix(seeded ^ rows.astype(np.uint64))[:, None]
    hashed = _mix(of_row + (counters.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))
    inside: ndarray = (hashed >> np.uint64(11)) * 2.0**-53
    return inside


def contains(keys: Int[ndarray, " M"], wanted: Int[ndarray, "*shape"]) -> Bool[ndarray, "*shape"]:
    """Return which of `wanted` are among the sorted `keys`."""
    if len(keys) == 0:
        return np.zeros(wanted.shape, dtype=bool)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.asarray(keys[at] == wanted)


def _mix(value: UInt64[ndarray, "..."]) -> UInt64[ndarray, "..."]:
    """Return the finaliser of splitmix64 (Steele, Lea and Flood 2014): each bit in moves each bit out."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: ndarray = value ^ (value >> np.uint64(31))
    return mixed


def _chunk(
    rows: Int[ndarray, " R"],
    keys: Int[ndarray, " met"],
    num: int,
    seed: int,
    place: Place,
    weights: Float[ndarray, " I"],
) -> Int[ndarray, "R N"]:
    """Return the negatives of rows that fit into memory together; `keys` are place * I + item of what they met."""
    num_items = len(weights)
    possible = weights > 0
    barred = np.bincount(keys[possible[keys % num_items]] // num_items, minlength=len(rows))
    left = int(possible.sum()) - barred
    _enough(rows, keys, left, num, num_items, int(possible.sum()))
    patience = 256 + left // 4
    drawn = np.full((len(rows), num), -1, dtype=np.int64)
    found = np.zeros(len(rows), dtype=np.int64)
    pending, first, width = np.arange(len(rows)), 0, num + num // 4 + 4
    while len(pending):
        counters = np.arange(first, first + width)
        items = place(chances(seed, rows[pending], counters, _DRAW))
        fresh = ~contains(keys, pending[:, None] * num_items + items)
        fresh &= counters < patience[pending, None]
        _accept(drawn, found, pending, items, fresh)
        first, width = first + width, max(width, min(2 * width, CELLS_AT_ONCE // len(pending)))
        exhausted = (found[pending] < num) & (first >= patience[pending])
        for at in pending[exhausted].tolist():
            own = keys[np.searchsorted(keys, at * num_items) : np.searchsorted(keys, (at + 1) * num_items)]
            barred_items = np.append(own % num_items, drawn[at, : found[at]])
            drawn[at, found[at] :] = _race(int(rows[at]), barred_items, num - int(found[at]), seed, weights)
            found[at] = num
        pending = pending[found[pending] < num]
    return drawn.astype(np.int32)


def _accept(
    drawn: Int[ndarray, "R N"],
    found: Int[ndarray, " R"],
    pending: Int[ndarray, " P"],
    items: Int[ndarray, "P K"],
    fresh: Bool[ndarray, "P K"],
) -> None:
    """Append to `drawn` the fresh items that the row does not have yet, each once, in the order of the draws."""
    num = drawn.shape[1]
    every = np.concatenate([drawn[pending], items], axis=1)
    wanted = np.concatenate([drawn[pending] >= 0, fresh], axis=1)
    every[~wanted] = -1
    order = np.argsort(every, axis=1, kind="stable")
    ordered = np.take_along_axis(every, order, axis=1)
    repeated = np.zeros_like(wanted)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    wanted &= ~repeated
    places = wanted.cumsum(axis=1) - 1
    wanted &= places < num
    at, column = np.nonzero(wanted)
    drawn[pending[at], places[at, column]] = every[at, column]
    found[pending] = wanted.sum(axis=1)


def _race(
    row: int, barred: Int[ndarray, " b"], wanted: int, seed: int, weights: Float[ndarray, " I"]
) -> Int[ndarray, " n"]:
    """Return the next `wanted` items of a row that has made its draws: an exponential race among those left."""
    chance = chances(seed, np.array([row]), np.arange(len(weights)), _RACE)[0]
    with np.errstate(divide="ignore"):
        finish = -np.log1p(-chance) / weights
    finish[weights == 0] = np.inf
    finish[barred] = np.inf
    return np.argsort(finish, kind="stable")[:wanted]


def _check(
    rows: Int[ndarray, " R"],
    met_items: Int[ndarray, " M"],
    met_offsets: Int[ndarray, " offsets"],
    num: int,
    num_items: int,
) -> None:
    if num < 1:
        raise ValueError(f"at least one negative a row must be wanted, got {num}")
    if len(met_offsets) != len(rows) + 1 or met_offsets[-1] > len(met_items):
        raise ValueError(
            f"{len(rows)} rows need {len(rows) + 1} offsets into {len(met_items)} items met, "
            f"got {len(met_offsets)} that end at {met_offsets[-1:].tolist()}"
        )
    if len(met_items) and not (met_items.min() >= 0 and met_items.max() < num_items):
        raise ValueError(
            f"items met must be 0 to {num_items - 1}, got {int(met_items.min())} to {int(met_items.max())}"
        )


def _enough(
    rows: Int[ndarray, " R"],
    keys: Int[ndarray, " met"],
    left: Int[ndarray, " R"],
    num: int,
    num_items: int,
    num_possible: int,
) -> None:
    short = np.flatnonzero(left < num)
    if len(short) == 0:
        return
    at = int(short[0])
    met = int(np.count_nonzero(keys // num_items == at))
    raise ValueError(
        f"row {int(rows[at])}: {num} negatives are wanted, but of {num_items} items, {num_possible} of which this "
        f"sampler ever draws, its user met {met} in training and {int(left[at])} are left "
        f"({len(short)} such rows); lower negatives.num"
    )
