"""What is recommended, by hand."""

import numpy as np
import pytest

from recray.ranking.exposure import average_popularity, coverage, group_shares, popularity_groups

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
