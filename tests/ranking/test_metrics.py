"""Ranks and metrics against hand values and the definition in loops."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.ranking.metrics import best_first, hit_rate, ndcg, ranks, reciprocal_rank


def test_hand_values() -> None:
    scores = np.array([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]], dtype=np.float32)
    valid = np.ones((3, 3), dtype=bool)
    found = ranks(scores, np.array([0, 1, 2]), valid)
    assert found.tolist() == [1, 2, 3]
    assert found.dtype == np.int64
    assert hit_rate(found, 2).tolist() == [1.0, 1.0, 0.0]
    assert ndcg(found, 2).tolist() == pytest.approx([1.0, 1.0 / math.log2(3), 0.0])
    assert reciprocal_rank(found).tolist() == pytest.approx([1.0, 0.5, 1.0 / 3.0])
    assert {metric.dtype for metric in (hit_rate(found, 2), ndcg(found, 2), reciprocal_rank(found))} == {
        np.dtype(np.float64)
    }


def test_ties_count_against_the_target() -> None:
    assert ranks(np.zeros((1, 5)), np.array([0]), np.ones((1, 5), dtype=bool)).tolist() == [5]


def test_padding_is_never_read() -> None:
    scores = np.array([[0.5, np.nan, np.inf, 0.7]])
    valid = np.array([[True, False, False, True]])
    assert ranks(scores, np.array([0]), valid).tolist() == [2]


@given(
    table=st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=8),
    target=st.integers(0, 3),
    holes=st.sets(st.integers(0, 3)),
)
def test_ranks_follow_the_definition(table: list[list[int]], target: int, holes: set[int]) -> None:
    valid = np.ones((len(table), 4), dtype=bool)
    valid[:, list(holes - {target})] = False
    found = ranks(np.array(table, dtype=np.float32), np.full(len(table), target), valid)
    for row, scores in enumerate(table):
        better = [c for c in range(4) if c != target and valid[row, c] and scores[c] >= scores[target]]
        assert found[row] == 1 + len(better)


def test_infinite_scores_are_ranked() -> None:
    scores = np.array([[-np.inf, 0.0, 1.0], [np.inf, 0.0, 1.0]])
    assert ranks(scores, np.array([0, 0]), np.ones((2, 3), dtype=bool)).tolist() == [3, 1]


@pytest.mark.parametrize(
    ("scores", "target", "valid", "message"),
    [
        ([[1.0, 2.0], [np.nan, 1.0]], [0, 1], [[1, 1], [1, 1]], "row 1 .*NaN"),
        ([[1.0, 2.0], [3.0, 1.0]], [0, 2], [[1, 1], [1, 1]], "row 1 .*outside"),
        ([[1.0, 2.0], [3.0, 1.0]], [0, -1], [[1, 1], [1, 1]], "row 1 .*outside"),
        ([[1.0, 2.0], [3.0, 1.0]], [1, 0], [[1, 0], [1, 1]], "row 0 .*not a valid candidate"),
        ([[1.0, 2.0], [3.0, 1.0]], [1], [[1, 1], [1, 1]], "expected scores"),
    ],
)
def test_rows_that_cannot_be_ranked_are_named(
    scores: list[list[float]], target: list[int], valid: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ranks(np.array(scores), np.array(target), np.array(valid, dtype=bool))


def test_no_rows_give_no_ranks() -> None:
    assert ranks(np.zeros((0, 3)), np.zeros(0, dtype=int), np.zeros((0, 3), dtype=bool)).tolist() == []


def test_best_first_by_hand() -> None:
    scores = np.array([[0.1, 0.9, 0.9, 0.5], [3.0, np.nan, -np.inf, 1.0]])
    valid = np.array([[True, True, True, True], [True, False, True, True]])
    columns = best_first(scores, np.array([1, 2]), valid, 4)
    assert columns.tolist() == [[2, 1, 3, 0], [0, 3, 2, -1]]
    assert best_first(scores, np.array([1, 2]), valid, 1).tolist() == [[2], [0]]


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=12), st.data())
def test_the_targets_place_is_its_rank(scores: list[int], data: st.DataObject) -> None:
    target = np.array([data.draw(st.integers(0, len(scores) - 1))])
    table, valid = np.array([scores], dtype=np.float32), np.ones((1, len(scores)), dtype=bool)
    columns = best_first(table, target, valid, len(scores))
    assert columns[0, ranks(table, target, valid)[0] - 1] == target[0]
    assert sorted(columns[0].tolist()) == list(range(len(scores)))
