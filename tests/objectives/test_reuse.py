"""Which items are offered to whom, and which of them are drawn."""

import numpy as np
import pytest

from recray.data.hashing import mix
from recray.objectives.reuse import first_allowed, offered_items


def test_an_item_is_offered_if_any_lender_has_it() -> None:
    rng = np.random.default_rng(0)
    negatives = rng.integers(9, size=(5, 4))
    different, column = np.unique(negatives, return_inverse=True)
    lends = rng.random((3, 5)) < 0.5
    offered = offered_items(lends, column.reshape(5, 4), different.size)
    for b in range(3):
        expected = {item for owner in range(5) if lends[b, owner] for item in negatives[owner].tolist()}
        assert set(different[offered[b]].tolist()) == expected


@pytest.mark.parametrize("most", [1, 3, 6, 20])
def test_what_is_drawn_is_allowed_distinct_and_the_first_of_any_larger_draw(most: int) -> None:
    allowed = np.random.default_rng(1).random((40, 6)) < 0.5
    allowed[0], allowed[1] = False, True
    key = mix(7, np.arange(40)[:, None], np.arange(6))
    found, whole = first_allowed(key, allowed, most), first_allowed(key, allowed, 6)
    for own, every, row, may in zip(found, whole, key, allowed, strict=True):
        assert own.size == min(most, may.sum())
        assert may[own].all()
        assert own.tolist() == every[: own.size].tolist()
        assert every.tolist() == sorted(np.flatnonzero(may).tolist(), key=lambda item: row[item])


def test_every_allowed_item_is_as_likely() -> None:
    key = mix(0, np.arange(20_000)[:, None], np.arange(8))
    allowed = np.tile(np.arange(8) != 5, (20_000, 1))
    counts = np.bincount(np.concatenate(first_allowed(key, allowed, 2)), minlength=8)
    assert counts[5] == 0
    expected = 20_000 * 2 / 7
    assert np.abs(np.delete(counts, 5) - expected).max() < 5 * np.sqrt(expected)
