"""Joined examples: by row and by item, never by position."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recray import schema
from recray.data.examples import ExampleShards, find_scores, join_examples, met_in_training, write_shards
from recray.errors import DataError

ROWS = 7


def tables() -> dict[str, pa.Table]:
    rng = np.random.default_rng(0)
    targets = list(range(10, 10 + ROWS))
    negatives = [rng.permutation(10)[:3].tolist() for _ in range(ROWS)]
    items = [[target, *own] for target, own in zip(targets, negatives, strict=True)]
    return {
        "examples": pa.table(
            [list(range(ROWS)), [f"u{row // 2}" for row in range(ROWS)], [[row, 0] for row in range(ROWS)], targets],
            schema=schema.EXAMPLES,
        ),
        "negatives": pa.table([list(range(ROWS)), negatives], schema=schema.NEGATIVES),
        # A score that names its row and item.
        "reference": pa.table(
            [list(range(ROWS)), items, [[row + item / 100 for item in own] for row, own in enumerate(items)]],
            schema=schema.REFERENCE,
        ),
        "vectors": pa.table([list(range(ROWS)), [[row, -row] for row in range(ROWS)]], schema=schema.ROW_VECTORS),
    }


def crossfitted(found: dict[str, pa.Table]) -> dict[str, pa.Table]:
    """The same with vectors of two folds: that of row r is (fold, r / 2)."""
    folds = [row // 2 % 2 for row in range(ROWS)]
    vectors = [[fold, row / 2] for row, fold in enumerate(folds)]
    return {**found, "crossfit": pa.table([list(range(ROWS)), folds, vectors], schema=schema.CROSSFIT_ROWS)}


def joined(found: dict[str, pa.Table]) -> pa.Table:
    histories = pa.table([[0, 1], ["u0", "u3"], [[5, 3], [90]]], schema=schema.HISTORIES)
    met = met_in_training(histories, found["examples"])
    return join_examples(
        found["examples"], found["negatives"], found["reference"], found["vectors"], met, found.get("crossfit")
    )


def test_scores_are_found_by_row_and_item_in_any_file_and_order() -> None:
    first = pa.table([[7, 3], [[4, 1], [2]], [[0.74, 0.71], [0.32]]], schema=schema.REFERENCE)
    second = pa.table([[3, 7], [[4], [9]], [[0.34], [0.79]]], schema=schema.REFERENCE)
    rows, items = np.array([3, 7, 5]), np.array([[4, 1, 2], [9, 2, 1], [4, 1, 2]])
    scores, found = find_scores(rows, items, pa.concat_tables([first, second]))
    assert found.tolist() == [[True, False, True], [True, False, True], [False, False, False]]
    np.testing.assert_array_equal(scores[found], np.array([0.34, 0.32, 0.79, 0.71], dtype=np.float32))
    assert np.isnan(scores[~found]).all()
    assert not find_scores(rows, items, schema.REFERENCE.empty_table())[1].any()


def test_a_positive_among_its_own_negatives_is_refused() -> None:
    found = tables()
    drawn = found["negatives"]["negatives"].to_pylist()
    drawn[3][1] = 13
    found["negatives"] = pa.table([list(range(ROWS)), drawn], schema=schema.NEGATIVES)
    with pytest.raises(DataError, match=r"row 3 has its own positive, item 13"):
        joined(found)


def test_without_a_table_scores_are_nan_until_training_makes_them() -> None:
    table = joined({**tables(), "reference": None})
    assert np.isnan(np.array(table["reference"].to_pylist())).all()


def test_met_is_everything_in_any_training_row_of_the_user() -> None:
    histories = pa.table([[0, 1], ["u0", "u3"], [[5, 3], [90]]], schema=schema.HISTORIES)
    met = met_in_training(histories, tables()["examples"])
    assert met["u0"].tolist() == [0, 1, 3, 5, 10, 11]
    assert met["u3"].tolist() == [0, 6, 16, 90]


def test_tables_in_any_order_and_scores_in_any_order_join_to_the_same(tmp_path: Path) -> None:
    found = tables()
    rng = np.random.default_rng(1)
    shuffled = {name: table.take(pa.array(rng.permutation(ROWS))) for name, table in found.items()}
    order = rng.permutation(4)
    reference = shuffled["reference"]
    shuffled["reference"] = pa.table(
        [
            reference["row"],
            [[row[k] for k in order] for row in reference["items"].to_pylist()],
            [[row[k] for k in order] for row in reference["scores"].to_pylist()],
        ],
        schema=schema.REFERENCE,
    )
    assert joined(shuffled).equals(joined(found))

    write_shards(tmp_path, joined(found), shard_rows=3)
    shards = ExampleShards(tmp_path, shard_rows=3)
    taken = shards.take(np.array([6, 0, 4, 6]))
    assert shards.num_rows == ROWS
    assert taken.row.tolist() == [6, 0, 4, 6]
    np.testing.assert_allclose(taken.reference, taken.row[:, None] + taken.items / 100, rtol=1e-6)
    np.testing.assert_array_equal(taken.vector[:, 0], taken.row)
    assert [history.tolist() for history in taken.histories] == [[6, 0], [0, 0], [4, 0], [6, 0]]
    assert taken.met[1].tolist() == [0, 1, 3, 5, 10, 11]
    assert taken.user[0] == taken.user[3] != taken.user[1]


def test_cross_fitted_vectors_stand_beside_the_others_where_there_are_any(tmp_path: Path) -> None:
    found = crossfitted(tables())
    shuffled = {**found, "crossfit": found["crossfit"].take(pa.array([4, 6, 0, 1, 5, 3, 2]))}
    assert joined(shuffled).equals(joined(found))
    assert joined(found).drop_columns(["fold", "judge_vector"]).equals(joined(tables()))
    for number, table in enumerate((joined(found), joined(tables()))):
        write_shards(tmp_path / str(number), table, shard_rows=3)
    with_folds, without = (ExampleShards(tmp_path / str(number), shard_rows=3) for number in range(2))
    assert (with_folds.crossfitted, without.crossfitted) == (True, False)
    taken, plain = (shards.take(np.array([6, 0, 3, 6])) for shards in (with_folds, without))
    assert taken.fold is not None
    assert taken.judge_vector is not None
    assert taken.fold.tolist() == [1, 0, 1, 1]
    assert taken.judge_vector.tolist() == [[1, 3], [0, 0], [1, 1.5], [1, 3]]
    assert taken.vector.tolist() == plain.vector.tolist() == [[6, -6], [0, 0], [3, -3], [6, -6]]
    assert plain.fold is plain.judge_vector is None


@pytest.mark.parametrize("name", ["negatives", "reference", "vectors", "crossfit"])
def test_a_missing_row_is_named(name: str) -> None:
    found = crossfitted(tables())
    found[name] = found[name].filter(pa.array([row != 4 for row in range(ROWS)]))
    with pytest.raises(DataError, match="row 4 is missing"):
        joined(found)


def test_a_missing_reference_score_is_named() -> None:
    found = tables()
    rows = found["reference"].to_pylist()
    gone = rows[2]["items"].pop()
    rows[2]["scores"].pop()
    found["reference"] = pa.Table.from_pylist(rows, schema=schema.REFERENCE)
    with pytest.raises(DataError, match=f"row 2 has none for item {gone}"):
        joined(found)
