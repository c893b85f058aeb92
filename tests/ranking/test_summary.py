"""Summaries by hand: what is averaged, what is subtracted from what, and what JSON can hold."""

import json

import numpy as np
import pytest

from recray.ranking.summary import Ranked, Settings, differences, exposure, measures, summaries

POPULARITY = np.array([8, 4, 2, 0])
USERS = np.array(["a", "a", "b"])
FIRST = Ranked(np.array([1, 2, 4]), np.array([[0, 1], [1, 0], [0, 2]]))
SECOND = Ranked(np.array([2, 2, 2]), np.array([[3, 0], [3, 1], [3, -1]]))
SETTINGS = Settings(ks=(1, 2, 5), samples=100, confidence=0.9, seed=0)


def test_measures_by_hand() -> None:
    found = measures(FIRST, POPULARITY, (1, 2, 5))
    assert list(found) == [
        "hr@1", "hr@2", "hr@5", "ndcg@1", "ndcg@2", "ndcg@5", "mrr", "average_popularity", "average_popularity@2",
    ]  # fmt: skip
    assert found["hr@2"].tolist() == [1, 1, 0]
    assert found["mrr"].tolist() == [1.0, 0.5, 0.25]
    assert found["average_popularity"].tolist() == [8, 4, 8]
    assert found["average_popularity@2"].tolist() == [6, 6, 5]


def test_one_object_a_model() -> None:
    first, second = summaries({"one": FIRST, "two": SECOND}, USERS, POPULARITY, SETTINGS)
    assert (first["model"], first["rows"], first["users"]) == ("one", 3, 2)
    assert first["hr@2"]["value"] == pytest.approx(2 / 3)
    assert first["coverage"] == 0.5
    assert first["coverage@2"] == 0.75
    assert "coverage@5" not in first
    assert second["average_popularity"]["value"] == 0.0
    assert second["hr@2"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_differences_are_first_minus_second() -> None:
    (found,) = differences({"one": FIRST, "two": SECOND}, [("one", "two")], USERS, POPULARITY, SETTINGS)
    assert (found["model"], found["minus"]) == ("one", "two")
    assert found["hr@1"]["value"] == pytest.approx(1 / 3)
    assert found["hr@2"]["value"] == pytest.approx(-1 / 3)
    assert found["average_popularity"]["value"] == pytest.approx(20 / 3)
    assert found["hr@1"]["low"] <= found["hr@1"]["value"] <= found["hr@1"]["high"]


def test_one_user_has_bounds_that_json_can_hold() -> None:
    (found,) = summaries({"one": FIRST}, np.array(["a", "a", "a"]), POPULARITY, SETTINGS)
    assert found["mrr"]["low"] is None
    json.dumps(found, allow_nan=False)


def test_exposure_by_hand() -> None:
    found = exposure({"one": FIRST, "two": SECOND}, np.array([0, 1, 1]), POPULARITY)
    # Four items: the top 1, 5 and 20 % are one item, the next 50 % another, the rest two.
    assert found["models"]["one"] == pytest.approx([2 / 3, 0, 0, 1 / 3, 0])
    assert found["models"]["two"] == pytest.approx([0, 0, 0, 0, 1])
    assert found["chosen"] == pytest.approx([1 / 3, 0, 0, 2 / 3, 0])
    assert found["chosen_average_popularity"] == pytest.approx(16 / 3)
