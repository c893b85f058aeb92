"""Samplers: exact exclusion, prefixes, independence of neighbours, and the distributions they claim."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recray.negatives import draws, popularity, uniform
from recray.negatives.draws import chances
from recray.negatives.registry import prepared

MASK = (1 << 64) - 1


def _met(lists: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    flat = np.array([item for each in lists for item in each], dtype=np.int32)
    return flat, np.concatenate([[0], np.cumsum([len(each) for each in lists])]).astype(np.int64)


def _uniform(rows: Sequence[int], lists: Sequence[Sequence[int]], num: int, num_items: int, seed: int = 0) -> Any:
    return uniform.draw(np.array(rows), *_met(lists), num=num, num_items=num_items, seed=seed)


def _popular(
    rows: Sequence[int], lists: Sequence[Sequence[int]], num: int, frequency: Any, exponent: float = 1.0
) -> Any:
    return popularity.draw(
        np.array(rows), *_met(lists), num=num, frequency=np.asarray(frequency), exponent=exponent, seed=0
    )


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def _chance(seed: int, row: int, counter: int, use: int) -> float:
    of_row = _mix(_mix((seed * 4 + use) & MASK) ^ row)
    return (_mix((of_row + (counter + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) / 2**53


def _in_loops(row: int, met: set[int], num: int, weights: list[float], seed: int) -> list[int]:
    """The definition: draws until `patience`, then a race among what is left."""
    left = [item for item, weight in enumerate(weights) if weight > 0 and item not in met]
    cumulative = np.cumsum(weights)
    chosen: list[int] = []
    for counter in range(256 + len(left) // 4):
        place = _chance(seed, row, counter, 1) * cumulative[-1]
        item = int(np.searchsorted(cumulative, place, side="right"))
        if item in left and item not in chosen:
            chosen.append(item)
    race = sorted(set(left) - set(chosen), key=lambda item: -math.log1p(-_chance(seed, row, item, 2)) / weights[item])
    return (chosen + race)[:num]


def test_chances_are_splitmix64_in_plain_integers() -> None:
    assert _mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the published first output for seed 0
    found = chances(7, np.array([0, 5, 2**40]), np.array([0, 1, 9]), 1)
    wanted = [[_chance(7, row, counter, 1) for counter in (0, 1, 9)] for row in (0, 5, 2**40)]
    np.testing.assert_array_equal(found, wanted)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_draws_are_their_definition_in_loops(data: st.DataObject) -> None:
    num_items = data.draw(st.integers(2, 40))
    weights = data.draw(st.lists(st.sampled_from([0, 1, 3, 500, 10**7]), min_size=num_items, max_size=num_items))
    lists = data.draw(st.lists(st.lists(st.integers(0, num_items - 1), max_size=num_items), min_size=1, max_size=4))
    rows = data.draw(st.lists(st.integers(0, 2**40), min_size=len(lists), max_size=len(lists)))
    left = min(sum(w > 0 and i not in each for i, w in enumerate(weights)) for each in lists)
    num = data.draw(st.integers(1, max(1, left)))
    if left == 0:
        with pytest.raises(ValueError, match="are left"):
            _popular(rows, lists, num, weights)
        return
    found = _popular(rows, lists, num, weights)
    wanted = [_in_loops(row, set(each), num, weights, 0) for row, each in zip(rows, lists, strict=True)]
    assert found.tolist() == wanted
    assert found.dtype == np.int32


def test_the_change_from_draws_to_race_is_where_the_definition_has_it() -> None:
    weights = [2000, *[1] * 11]
    found = _popular(range(300), [[]] * 300, 12, weights)
    assert found.tolist() == [_in_loops(row, set(), 12, weights, 0) for row in range(300)]


@pytest.mark.parametrize(("chance", "item"), [(0.0, 1), (1 - 2**-53, 3)])
def test_the_least_and_largest_chance_fall_on_items_that_may_be_drawn(
    chance: float, item: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "chances", lambda _, rows, counters, __: np.full((len(rows), len(counters)), chance))
    assert _popular([0], [[]], 1, [0, 3, 1, 3, 0]).tolist() == [[item]]


@given(st.integers(0, 2**63 - 1), st.integers(1, 12), st.integers(0, 12), st.sampled_from(["uniform", "popularity"]))
@settings(max_examples=40, deadline=None)
def test_prefixes_exclusion_and_no_repeats(seed: int, num: int, more: int, name: str) -> None:
    rng = np.random.default_rng(seed)
    lists = [rng.integers(0, 40, size=rng.integers(0, 15)).tolist() for _ in range(5)]
    sampler = prepared(name, {"num_items": 40, "frequency": rng.integers(1, 50, size=40), "exponent": 1.0})
    rows = rng.integers(0, 10**9, size=5)
    small, large = (sampler.draw(rows, *_met(lists), num=n, seed=seed).negatives for n in (num, num + more))
    assert np.array_equal(small, large[:, :num])
    for drawn, met in zip(large.tolist(), lists, strict=True):
        assert len(set(drawn)) == num + more
        assert not set(drawn) & set(met)


@pytest.mark.parametrize("cells", [1, 300, 1 << 21])
def test_neighbours_and_partitions_change_nothing(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = rng.permutation(10_000)[:60]
    lists = [rng.integers(0, 50, size=rng.integers(0, 30)).tolist() for _ in rows]
    frequency = np.ceil(1e6 / (1 + np.arange(50)) ** 3).astype(int)  # skewed: some rows end in the race

    def both(at: np.ndarray) -> np.ndarray:
        chosen = [lists[place] for place in at]
        return np.hstack([_uniform(rows[at], chosen, 18, 50), _popular(rows[at], chosen, 18, frequency)])

    whole = both(np.arange(60))
    monkeypatch.setattr(draws, "CELLS_AT_ONCE", cells)
    order = rng.permutation(60)
    parts = np.concatenate([both(order[:1]), both(order[1:24]), both(order[24:])])
    assert np.array_equal(parts, whole[order])


def test_seeds_and_rows_differ() -> None:
    one = _uniform(range(50), [[]] * 50, 5, 1000, seed=1)
    other = _uniform(range(50), [[]] * 50, 5, 1000, seed=2)
    assert (one == other).mean() < 0.05
    assert len(np.unique(one, axis=0)) == 50


def test_everything_left_is_drawn_when_everything_is_wanted() -> None:
    found = _uniform([3], [[0, 5, 5]], 18, 20)
    assert sorted(found[0].tolist()) == sorted(set(range(20)) - {0, 5})
    assert _popular([3], [[1]], 2, [0, 9, 1, 1]).tolist() in ([[2, 3]], [[3, 2]])


def _chi_square(observed: np.ndarray, expected: np.ndarray) -> float:
    """Return how many standard deviations chi-square lies above its mean."""
    kept = expected > 0
    freedom = kept.sum() - 1
    value = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    return float((value - freedom) / math.sqrt(2 * freedom))


def test_uniform_is_uniform_in_every_column() -> None:
    found = _uniform(range(40_000), [[1, 2, 30]] * 40_000, 4, 60)
    expected = np.full(60, 40_000 / 57)
    expected[[1, 2, 30]] = 0
    for column in found.T:
        assert abs(_chi_square(np.bincount(column, minlength=60), expected)) < 5


def test_consecutive_rows_and_columns_are_independent() -> None:
    found = _uniform(range(40_000), [[]] * 40_000, 2, 10)
    pairs = np.bincount(found[:-1, 0] * 10 + found[1:, 0], minlength=100)
    assert abs(_chi_square(pairs, np.full(100, 39_999 / 100))) < 5
    beside = np.bincount(found[:, 0] * 10 + found[:, 1], minlength=100)
    expected = np.where(np.eye(10, dtype=bool).reshape(-1), 0, 40_000 / 90)
    assert abs(_chi_square(beside, expected)) < 5


@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.0])
def test_popularity_is_proportional(exponent: float) -> None:
    frequency = np.array([0, 1, 2, 4, 8, 16, 32, 64])
    found = _popular(range(40_000), [[3]] * 40_000, 2, frequency, exponent)
    weights = frequency.astype(float) ** exponent
    weights[3] = 0
    first = weights / weights.sum()
    assert abs(_chi_square(np.bincount(found[:, 0], minlength=8), 40_000 * first)) < 5
    # The second without replacement: sum over the first of what is left.
    second = sum(first[i] * np.where(np.arange(8) == i, 0, weights) / (weights.sum() - weights[i]) for i in range(8))
    assert abs(_chi_square(np.bincount(found[:, 1], minlength=8), 40_000 * second)) < 5


def test_the_race_draws_by_weight_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # No draw is ever taken from chance, so everything comes from the race.
    monkeypatch.setattr(draws, "contains", lambda _, wanted: np.ones(wanted.shape, dtype=bool))
    frequency = np.array([1, 2, 4, 8])
    found = _popular(range(4000), [[]] * 4000, 2, frequency)
    first = frequency / frequency.sum()
    assert abs(_chi_square(np.bincount(found[:, 0], minlength=4), 4000 * first)) < 5
    second = sum(first[i] * np.where(np.arange(4) == i, 0, frequency) / (15 - frequency[i]) for i in range(4))
    assert abs(_chi_square(np.bincount(found[:, 1], minlength=4), 4000 * second)) < 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _uniform([12], [[0, 1, 1]], 9, 10), r"row 12: 9 negatives .* met 2 in training and 8 are left \(1"),
        (lambda: _popular([4], [[0]], 2, [3, 0, 1]), r"row 4: 2 negatives .* 3 items, 2 of which .* 1 are left"),
        (lambda: _uniform([1], [[10]], 1, 10), "items met must be 0 to 9, got 10"),
        (lambda: _uniform([1], [[-1]], 1, 10), "items met must be 0 to 9, got -1"),
        (lambda: _uniform([1], [[]], 0, 10), "at least one negative"),
        (lambda: _uniform([1, 2], [[1]], 1, 10), "2 rows need 3 offsets"),
        (lambda: _popular([1], [[]], 1, [1, 1], -0.5), "must not be negative"),
        (lambda: prepared("popular", {}), "the nearest is 'popularity'"),
        (lambda: prepared("popularity", {"num_items": 3}), "needs frequency, exponent"),
    ],
)
def test_what_can_not_be_done_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
