"""What free generation comes to: both denominators by hand, and what is not known."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recray import schema
from recray.errors import ModelError
from recray.ranking.intervals import clustered_means
from recray.ranking.summary import Settings
from recray.ranking.validity import NO_ITEM, validity, written_rows

SETTINGS = Settings((1,), samples=300, confidence=0.9, seed=4)

# (user, target, candidates, item written, ended)
ROWS = [
    ("a", 3, [3, 4], 3, True),  # right
    ("b", 3, [3, 4], 4, True),  # another candidate
    ("a", 5, [5, 6], 9, True),  # an item, but no candidate
    ("b", 0, [0, 1], NO_ITEM, True),
    ("b", 0, [0, 1], NO_ITEM, False),
    ("c", 7, [7, 8], 7, True),
    ("c", 8, [7, 8], NO_ITEM, True),
]
TEXTS = ["three", "four", "nine", "Foo", "x" * 500, "seven", "Foo"]


def table(rows: list[tuple[Any, ...]] = ROWS) -> pa.Table:
    entries = [
        {"row": 10 + row, "user_id": user, "history": [1], "target": target, "candidates": candidates}
        for row, (user, target, candidates, _, _) in enumerate(rows)
    ]
    return pa.Table.from_pylist(entries, schema=schema.EVALUATION)


def written(rows: list[tuple[Any, ...]] = ROWS, texts: list[str] = TEXTS) -> pa.Table:
    items, ended = np.array([row[3] for row in rows]), np.array([row[4] for row in rows])
    return written_rows(table(rows), texts=texts, ended=ended, items=items, model="m")


def test_rows_say_what_was_written() -> None:
    found = written()
    assert found.schema.equals(schema.WRITTEN_ROWS)
    assert found["row"].to_pylist() == [10, 11, 12, 13, 14, 15, 16]
    assert found["item"].to_pylist() == [3, 4, 9, None, None, 7, None]
    assert found["in_candidates"].to_pylist() == [True, True, False, False, False, True, False]
    assert found["text"].to_pylist() == TEXTS


def test_both_denominators_by_hand() -> None:
    found = validity(written(), settings=SETTINGS)
    assert (found["rows"], found["users"]) == (7, 3)
    by_hand = {
        "valid_ratio": 4 / 7, "in_candidates": 3 / 7, "ended": 6 / 7, "hr@1": 2 / 7,
        "hr@1 of valid": 2 / 4, "hr@1 of candidates": 2 / 3,
    }  # fmt: skip
    assert {name: found[name]["value"] for name in by_hand} == pytest.approx(by_hand)
    assert (found["hr@1 of valid"]["rows"], found["hr@1 of candidates"]["rows"]) == (4, 3)


def test_intervals_resample_the_users_who_have_such_rows() -> None:
    found = validity(written(), settings=SETTINGS)
    asked = {"samples": 300, "confidence": 0.9, "seed": 4}
    every = clustered_means(np.array([1, 0, 0, 0, 0, 1, 0]), np.array(list("ababbcc")), **asked)
    valid = clustered_means(np.array([1, 0, 0, 1]), np.array(list("abac")), **asked)
    for name, expected in (("hr@1", every), ("hr@1 of valid", valid)):
        assert found[name]["low"] == pytest.approx(expected.low[0])
        assert found[name]["high"] == pytest.approx(expected.high[0])


def test_the_most_frequent_texts_that_are_no_item_are_shown() -> None:
    assert validity(written(), settings=SETTINGS)["invalid"] == [
        {"text": "Foo", "ended": True, "rows": 2},
        {"text": "x" * 200, "ended": False, "rows": 1},
    ]
    assert validity(written(), settings=SETTINGS, examples=1)["invalid"] == [{"text": "Foo", "ended": True, "rows": 2}]


def test_no_valid_row_leaves_its_hit_rate_unknown() -> None:
    nothing = written([(*row[:3], NO_ITEM, False) for row in ROWS])
    found = validity(nothing, settings=SETTINGS)
    assert (
        found["hr@1 of valid"] == found["hr@1 of candidates"] == {"value": None, "low": None, "high": None, "rows": 0}
    )
    assert found["hr@1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["valid_ratio"]["value"] == 0.0


def test_one_user_leaves_the_interval_unknown() -> None:
    alone = [("a", *row[1:]) for row in ROWS]
    found = validity(written(alone), settings=SETTINGS)
    assert found["hr@1"] == {"value": pytest.approx(2 / 7), "low": None, "high": None}


def test_texts_that_were_lost_are_refused() -> None:
    with pytest.raises(ModelError, match="m wrote 6 texts for 7 rows"):
        written(texts=TEXTS[:6])
