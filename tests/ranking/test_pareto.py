"""The Pareto front against its definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recray.ranking.pareto import front

POINTS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12)


def test_a_front_by_hand() -> None:
    #        best NDCG  both      beaten    least popular  beaten by the last in one goal alone
    points = [[0.5, -9.0], [0.4, -5.0], [0.4, -6.0], [0.1, -1.0], [0.05, -1.0]]
    assert front(np.array(points)).tolist() == [True, True, False, True, False]


@given(POINTS)
def test_nobody_on_the_front_is_beaten_and_all_others_are(points: list[tuple[int, int]]) -> None:
    expected = [
        not any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in points)
        for mine in points
    ]
    assert front(np.array(points, dtype=np.float64)).tolist() == expected


def test_points_that_are_alike_share_their_place() -> None:
    assert front(np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])).tolist() == [True, True, False]


def test_what_is_not_known_is_not_on_the_front_and_beats_nobody() -> None:
    values = np.array([[np.nan, 9.0], [1.0, 1.0], [9.0, np.nan]])
    assert front(values).tolist() == [False, True, False]
