"""What is recommended, by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.ranking.exposure import (
    average_popularity,
    balance,
    bands,
    coverage,
    div_ratio,
    gini,
    group_shares,
    popularity_groups,
    shown_counts,
)

POPULARITY = np.array([10, 4, 2, 0, 1])


def test_average_popularity_of_the_first_k() -> None:
    recommended = np.array([[0, 1, 2], [3, 4, -1]])
    assert average_popularity(recommended, POPULARITY, 1).tolist() == [10.0, 0.0]
    assert average_popularity(recommended, POPULARITY, 3).tolist() == pytest.approx([16 / 3, 0.5])


def test_a_row_without_recommendations_is_named() -> None:
    with pytest.raises(ValueError, match="row 1"):
        average_popularity(np.array([[0], [-1]]), POPULARITY, 1)


def test_coverage_counts_distinct_items() -> None:
    recommended = np.array([[0, 1], [0, 2], [0, -1]])
    assert coverage(recommended, 5, 1) == pytest.approx(0.2)
    assert coverage(recommended, 5, 2) == pytest.approx(0.6)


def test_div_ratio_is_of_all_places_not_of_the_catalogue() -> None:
    recommended = np.array([[0, 1], [0, 2], [0, -1]])
    assert div_ratio(recommended, 1) == pytest.approx(1 / 3)
    assert div_ratio(recommended, 2) == pytest.approx(3 / 6)  # an empty place counts as a place


def test_groups_follow_falling_popularity() -> None:
    popularity = np.arange(100)[::-1]  # item 0 the most popular
    groups = popularity_groups(popularity)
    assert np.bincount(groups).tolist() == [1, 4, 15, 30, 50]
    assert groups[[0, 1, 4, 5, 19, 20, 49, 50, 99]].tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_a_small_catalogue_has_a_head() -> None:
    assert popularity_groups(POPULARITY).tolist() == [0, 3, 3, 4, 4]


def test_group_shares_sum_to_one() -> None:
    groups = popularity_groups(POPULARITY)
    shares = group_shares(np.array([[0, 0, 1], [3, -1, -1]]), groups)
    assert shares.tolist() == pytest.approx([0.5, 0.0, 0.0, 0.25, 0.25])
    assert group_shares(np.array([-1]), groups).sum() == 0.0


def test_bands_cover_a_third_of_the_interactions_each() -> None:
    # 18 interactions: the first 6 are those of the most popular item, the next 6 of two, the rest is the tail.
    assert bands(np.array([3, 6, 0, 3, 3, 3])).tolist() == [1, 0, 2, 1, 2, 2]
    assert bands(np.array([2, 2, 2])).tolist() == [0, 1, 2]
    # An item that reaches over a border still counts to the band in which it begins.
    assert bands(np.array([90, 5, 5])).tolist() == [0, 2, 2]
    assert bands(np.zeros(3, dtype=np.int64)).tolist() == [2, 2, 2]


def test_bands_of_a_long_tail_hold_a_third_each() -> None:
    popularity = 10_000 // np.arange(1, 3001)
    held = np.bincount(bands(popularity), weights=popularity) / popularity.sum()
    assert held == pytest.approx([1 / 3] * 3, abs=0.06)  # the most popular items are some per cent of it


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any))
def test_gini_is_the_mean_difference_of_pairs(amounts: list[int]) -> None:
    pairs = sum(abs(first - second) for first in amounts for second in amounts)
    assert gini(np.array(amounts)) == pytest.approx(pairs / (2 * len(amounts) * sum(amounts)), abs=1e-12)


def test_gini_and_balance_at_their_ends() -> None:
    assert gini(np.array([2, 2, 2])) == 0.0
    assert gini(np.array([0, 0, 0, 7])) == 0.75
    assert np.isnan(gini(np.zeros(3)))
    assert balance(np.array([0.2, 0.2, 0.2])) == 1.0
    assert balance(np.array([0.3, 0.0, 0.0])) == pytest.approx(1 / 3)


def test_shown_counts_leave_out_padding() -> None:
    assert shown_counts(np.array([[0, 1], [0, -1]]), 3, 2).tolist() == [2, 1, 0]
