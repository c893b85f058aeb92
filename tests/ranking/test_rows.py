"""Evaluation rows to ranked rows, and the vectors that score them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recray import schema
from recray.errors import DataError, ModelError
from recray.ranking.ragged import concatenated, padded
from recray.ranking.rows import Batch, DotProducts, batch_of, flat_lists, lists, rank_rows, refuse_faulty


def _table(rows: list[tuple[int, list[int], int, list[int]]]) -> pa.Table:
    entries = [
        {"row": row, "user_id": f"u{row}", "history": history, "target": target, "candidates": candidates}
        for row, history, target, candidates in rows
    ]
    return pa.Table.from_pylist(entries, schema=schema.EVALUATION)


TABLE = _table([(7, [1], 5, [4, 5, 6]), (9, [], 2, [2, 3])])
SCORES = [np.array([1.0, 2.0, 3.0], dtype=np.float32), np.array([0.5, 0.5], dtype=np.float32)]


def test_rows_are_ranked_by_item_number() -> None:
    ranked = rank_rows(TABLE, SCORES, model="m", keep=2)
    assert ranked.schema.equals(schema.RANKED_ROWS)
    assert ranked.to_pylist() == [
        {
            "model": "m", "row": 7, "user_id": "u7", "target": 5, "num_candidates": 3, "rank": 2, "ranked": [6, 5],
        },
        {
            "model": "m", "row": 9, "user_id": "u9", "target": 2, "num_candidates": 2, "rank": 2, "ranked": [3, 2],
        },
    ]  # fmt: skip


def test_scores_below_the_padding_are_still_ranked() -> None:
    ranked = rank_rows(TABLE, [-SCORES[0] - 50, -SCORES[1] - 50], model="m", keep=5)
    assert ranked["ranked"].to_pylist() == [[4, 5, 6], [3, 2]]
    assert ranked["rank"].to_pylist() == [2, 2]


def test_no_rows_in_no_rows_out() -> None:
    assert rank_rows(TABLE.slice(0, 0), [], model="m", keep=2).num_rows == 0


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([SCORES[0], np.array([np.nan, 1.0])], "m scores a candidate of row 9 NaN"),
        ([SCORES[0]], "3 scores for the 5 candidates"),
        ([SCORES[0], SCORES[0]], "6 scores for the 5 candidates"),
        ([SCORES[1], SCORES[0]], "5 scores for the 5 candidates"),
    ],
)
def test_broken_scores_are_refused(scores: list[np.ndarray], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        rank_rows(TABLE, scores, model="m", keep=2)


@pytest.mark.parametrize(("candidates", "times"), [([4, 6], 0), ([5, 5], 2)])
def test_the_target_must_be_a_candidate_once(candidates: list[int], times: int) -> None:
    table = _table([(1, [], 3, [3, 4]), (2, [], 5, candidates)])
    with pytest.raises(DataError, match=f"row 2: .*target {times} times"):
        rank_rows(table, [np.zeros(2), np.zeros(2)], model="m", keep=2)


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        (([1], 5, [4, 6]), "its candidates hold the target 0 times, expected once"),
        (([1], 5, []), "its candidates hold the target 0 times, expected once"),
        (([1], 5, [5, 4, 5]), "its candidates hold the target 2 times, expected once"),
        (([1, 7], 5, [4, 5]), "item 7 of its history is unknown, the catalogue has items 0 to 6"),
        (([1], 7, [7, 5]), "item 7 of its target is unknown"),
        (([1], 5, [5, -1]), "item -1 of its candidates is unknown"),
        (([1], 5, [5, None]), "item nan of its candidates is unknown"),
        ((None, 5, [5]), "it has no history"),
        (([1], None, [5]), "it has no target"),
        (([1], 5, None), "it has no candidates"),
    ],
)
def test_a_row_that_no_model_can_be_judged_by_is_named(row: Any, fault: str) -> None:
    sound: Any = [(9, [], 2, [2, 3]), (8, [6, 6], 0, [0])]
    refuse_faulty(_table(sound), 7, "sequences/test")
    for place in range(3):
        rows = [*sound[:place], (12, *row), *sound[place:]]
        with pytest.raises(DataError, match=f"sequences/test, row 12: {fault}.*; make the table again"):
            refuse_faulty(_table(rows), 7, "sequences/test")


def test_a_batch_holds_no_target() -> None:
    batch = batch_of(TABLE)
    assert "target" not in Batch._fields
    assert batch.rows.tolist() == [7, 9]
    assert [row.tolist() for row in batch.histories] == [[1], []]


def test_dot_products_join_by_row() -> None:
    users = pa.table({"row": [9, 7], "vector": [[0.0, 1.0], [1.0, 0.0]]}, schema=schema.ROW_VECTORS)
    vectors = [[float(item), 10.0 * item] for item in range(7)]
    items = pa.table({"item": range(7), "vector": vectors}, schema=schema.ITEM_VECTORS)
    shuffled = items.take([3, 1, 0, 2, 6, 5, 4])
    found = DotProducts.of(users, shuffled)(batch_of(TABLE))
    assert [row.tolist() for row in found] == [[4.0, 5.0, 6.0], [20.0, 30.0]]


@pytest.mark.parametrize("known", [[7], [10], []])
def test_a_row_without_a_vector_is_named(known: list[int]) -> None:
    vectors = [[1.0]] * len(known)
    users = pa.table({"row": known, "vector": vectors}, schema=schema.ROW_VECTORS)
    items = pa.table({"item": range(7), "vector": [[1.0]] * 7}, schema=schema.ITEM_VECTORS)
    with pytest.raises(DataError, match=f"row {9 if 7 in known else 7} has no user vector"):
        DotProducts.of(users, items)(batch_of(TABLE))


def test_lists_survive_slices_and_chunks() -> None:
    column = pa.chunked_array([pa.array([[1, 2], [3]], schema.ITEMS), pa.array([[], [4]], schema.ITEMS)])
    assert [row.tolist() for row in lists(column.slice(1))] == [[3], [], [4]]
    flat, lengths = flat_lists(column.slice(1, 2))
    assert (flat.tolist(), lengths.tolist()) == ([3], [1, 0])


def test_padding_there_and_back() -> None:
    rows = [np.array([1, 2]), np.array([], dtype=np.int64), np.array([3])]
    table, valid = padded(*concatenated(rows), fill=-1)
    assert table.tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert valid.tolist() == [[True, True], [False, False], [True, False]]
    with pytest.raises(ValueError, match="add up to 3"):
        padded(np.array([1, 2]), np.array([3]), fill=0)
