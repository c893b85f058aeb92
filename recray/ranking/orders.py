"""Orders of the items that say nothing about people: by an id, by title, or the one that all histories follow.

Axes: I items, E pairs of items in which the first was met right before the second.
"""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_PAIRS = 1_000_000  # distinct pairs that an order is fitted to; more, and a seeded part of them is taken
_SPRING_ROUNDS, _BETWEEN_ROUNDS = 150, 60
_WHOLE_NUMBER = r"^[+-]?\d{1,18}$"


class Order(NamedTuple):
    """A value for every item; only the comparison of two values means something, for ids also their distance."""

    name: str
    values: Ints  # [I]
    known: NDArray[np.bool_]  # [I] an item without a value is never before or after another


def order_of_ids(name: str, ids: pa.Array | pa.ChunkedArray) -> Order:
    """Return items in order of their ids: as whole numbers where all are, else as text.

    >>> order_of_ids("id", pa.array(["10", "9"])).values.tolist(), order_of_ids("id", pa.array(["b", "a"])).values
    ([10, 9], array([1, 0]))
    """
    ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    if bool(pc.all(pc.match_substring_regex(ids, _WHOLE_NUMBER)).as_py()):
        values = pc.cast(pc.replace_substring_regex(ids, r"^\+", ""), pa.int64())
        return Order(name, values.to_numpy(zero_copy_only=False), np.ones(len(ids), dtype=bool))
    return _order_of_text(name, ids)


def order_of_titles(titles: pa.Array | pa.ChunkedArray) -> Order:
    """Return items in alphabetical order of their titles, capitals aside; equal titles have one place."""
    titles = titles.combine_chunks() if isinstance(titles, pa.ChunkedArray) else titles
    return _order_of_text("title", pc.utf8_lower(titles))


def _order_of_text(name: str, text: pa.Array) -> Order:
    place = pc.rank(text, sort_keys="ascending", tiebreaker="dense").to_numpy(zero_copy_only=False)
    return Order(name, place.astype(np.int64) - 1, np.ones(len(text), dtype=bool))


def consecutive(items: NDArray[Any], lengths: NDArray[Any]) -> tuple[Ints, Ints]:
    """Return (first, second) of all neighbours within histories that are laid end to end; [E] each."""
    owners = np.repeat(np.arange(len(lengths)), lengths)
    same = np.flatnonzero(owners[1:] == owners[:-1])
    return items[same].astype(np.int64), items[same + 1].astype(np.int64)


def ascending_share(order: Order, first: Ints, second: Ints) -> float:
    """Return how often the second item of a pair stands above the first; NaN where no pair can be compared."""
    compared = order.known[first] & order.known[second] & (order.values[first] != order.values[second])
    if not compared.any():
        return float("nan")
    return float((order.values[second] > order.values[first])[compared].mean())


def order_of_histories(first: Ints, second: Ints, num_items: int, *, seed: int) -> Order:
    """Return the order of items that the histories themselves follow most nearly.

    People do not all walk one line through a catalogue, so no such order explains what they do next. Histories that
    were sorted by something, be it a number the catalogue does not hold, are explained by it almost wholly.

    Each item is first put where springs of length one, from every item to the one met next, are least stretched
    (De Bacco, Larremore and Moore, "A physical model for efficient ranking in networks", 2018; we iterate instead of
    solving). Then, round after round, it moves to the middle between the last item met before it and the first met
    after it, which is exact where one order fits all pairs.

    Args:
        first, second: [E] neighbours in training histories.
        num_items: I; items in no pair have no place.
        seed: of the part of the pairs that is taken where there are very many.
    """
    before, after = np.divmod(_distinct_pairs(first * num_items + second, seed), num_items)
    before, after = before[before != after], after[before != after]
    pairs_of_item = np.bincount(before, minlength=num_items) + np.bincount(after, minlength=num_items)
    place = _springs(before, after, pairs_of_item)
    for _ in range(_BETWEEN_ROUNDS):
        rank = _ranks(place)
        low, high = np.zeros(num_items), np.full(num_items, float(num_items))
        np.maximum.at(low, after, rank[before])
        np.minimum.at(high, before, rank[after])
        place = np.where(pairs_of_item > 0, (low + high) / 2, rank)
    return Order("order", _ranks(place).astype(np.int64), pairs_of_item > 0)


def _distinct_pairs(keys: Ints, seed: int) -> Ints:
    """Return the distinct keys in order, at most `_PAIRS` of them."""
    generator = np.random.default_rng(seed)
    if len(keys) > 4 * _PAIRS:  # sorting all of a long log would take longer than all the rest
        keys = keys[generator.integers(0, len(keys), 4 * _PAIRS)]
    keys = np.sort(keys)
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])] if len(keys) else keys
    return keys if len(keys) <= _PAIRS else np.sort(generator.choice(keys, _PAIRS, replace=False))


def _springs(before: Ints, after: Ints, pairs_of_item: Ints) -> Floats:
    place = np.zeros(len(pairs_of_item))
    size = len(place)
    for _ in range(_SPRING_ROUNDS):
        pulled = np.bincount(before, place[after] - 1, minlength=size)
        pulled += np.bincount(after, place[before] + 1, minlength=size)
        place = 0.98 * pulled / np.maximum(pairs_of_item, 1)  # damped, or two sides of the springs swap for ever
    return place


def _ranks(values: Floats) -> Floats:
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks
