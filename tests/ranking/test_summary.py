"""Summaries by hand: what is averaged, what is subtracted from what, and what JSON can hold."""

import json

import numpy as np
import pytest

from recray.ranking.genres import Genres
from recray.ranking.intervals import clustered_means
from recray.ranking.summary import Ranked, Settings, exposure, genre_exposure, measures, summaries

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
    (first, second), pairs = summaries({"one": FIRST, "two": SECOND}, [], USERS, POPULARITY, SETTINGS)
    assert pairs == []
    assert (first["model"], first["rows"], first["users"]) == ("one", 3, 2)
    assert first["hr@2"]["value"] == pytest.approx(2 / 3)
    assert first["coverage"] == 0.5
    assert first["coverage@2"] == 0.75
    assert "coverage@5" not in first
    assert (first["div_ratio"], first["div_ratio@2"]) == (2 / 3, 3 / 6)
    assert second["average_popularity"]["value"] == 0.0
    assert second["hr@2"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_differences_are_first_minus_second() -> None:
    (found,) = summaries({"one": FIRST, "two": SECOND}, [("one", "two")], USERS, POPULARITY, SETTINGS).pairs
    assert (found["model"], found["minus"]) == ("one", "two")
    assert found["hr@1"]["value"] == pytest.approx(1 / 3)
    assert found["hr@2"]["value"] == pytest.approx(-1 / 3)
    assert found["average_popularity"]["value"] == pytest.approx(20 / 3)
    assert found["hr@1"]["low"] <= found["hr@1"]["value"] <= found["hr@1"]["high"]


def test_intervals_are_those_of_each_model_and_pair_alone() -> None:
    """One resampling for all gives what `clustered_means` gives for every model, and for every difference of rows."""
    generator = np.random.default_rng(0)
    users = generator.integers(0, 40, size=150).astype(str)
    ranked = {
        name: Ranked(generator.integers(1, 9, size=150), generator.integers(0, 4, size=(150, 2)))
        for name in ("one", "two", "three")
    }
    pairs = [("three", "one"), ("one", "two")]
    found = summaries(ranked, pairs, users, POPULARITY, SETTINGS)
    own = {name: measures(each, POPULARITY, SETTINGS.ks) for name, each in ranked.items()}
    rows = [*own.values(), *({name: own[a][name] - own[b][name] for name in own[a]} for a, b in pairs)]
    for entry, values in zip([*found.models, *found.pairs], rows, strict=True):
        alone = clustered_means(np.stack(list(values.values()), axis=1), users, samples=100, confidence=0.9, seed=0)
        for column, name in enumerate(values):
            for bound, bounds in alone._asdict().items():
                assert entry[name][bound] == pytest.approx(bounds[column], abs=1e-12), (name, bound)


def test_models_that_rank_alike_differ_by_nothing_at_all() -> None:
    generator = np.random.default_rng(0)
    ranks, shown = generator.integers(1, 9, size=500), generator.integers(0, 4, size=(500, 2))
    ranked = {name: Ranked(ranks, shown) for name in ("one", "two", "three")}
    users = generator.integers(0, 90, size=500)
    for entry in summaries(ranked, [("one", "two"), ("three", "one")], users, POPULARITY, SETTINGS).pairs:
        assert all(found == {"value": 0.0, "low": 0.0, "high": 0.0} for found in entry.values() if type(found) is dict)


def test_one_user_has_bounds_that_json_can_hold() -> None:
    (found,), _ = summaries({"one": FIRST}, [], np.array(["a", "a", "a"]), POPULARITY, SETTINGS)
    assert found["mrr"]["low"] is None
    json.dumps(found, allow_nan=False)


def test_exposure_by_hand() -> None:
    found = exposure({"one": FIRST, "two": SECOND}, np.array([0, 1, 1]), POPULARITY)
    # Four items: the top 1, 5 and 20 % are one item, the next 50 % another, the rest two.
    assert found["models"]["one"] == pytest.approx([2 / 3, 0, 0, 1 / 3, 0])
    assert found["models"]["two"] == pytest.approx([0, 0, 0, 0, 1])
    assert found["chosen"] == pytest.approx([1 / 3, 0, 0, 2 / 3, 0])
    assert found["chosen_average_popularity"] == pytest.approx(16 / 3)


# Item 0 has genres a and b, 1 has b, 2 has a and c, 3 has none.
GENRES = Genres.of(np.array(["a", "b", "b", "c", "a"]), np.array([2, 1, 2, 0]))


def test_genres_of_what_is_shown_beside_those_of_the_histories() -> None:
    met = np.array([0, 0, 1, 3])  # a 1, b 2, c 0 of three that have a genre
    found = genre_exposure({"one": FIRST, "two": SECOND}, met, np.array([2, 3, 0]), GENRES, (1, 2, 5))
    assert found is not None
    assert found["genres"] == ["a", "b", "c"]
    assert found["met"] == {"items": 4, "without_genre": 1, "shares": pytest.approx([1 / 3, 2 / 3, 0])}
    assert found["catalogue"] == {"items": 4, "without_genre": 1}
    first, both = found["models"]["one"]
    # Shown first: 0, 1, 0, so a 1, b 2: as the histories.
    assert (first["k"], first["items"], first["without_genre"]) == (1, 3, 0)
    assert (first["mgu"], first["dgu"]) == (pytest.approx(0.0), pytest.approx(0.0))
    # The first two: 0 1, 1 0, 0 2, so a 2, b 3.5, c 0.5 of six.
    assert both["shares"] == pytest.approx([2 / 6, 3.5 / 6, 0.5 / 6])
    assert both["mgu"] == pytest.approx((0 + 0.5 / 6 + 0.5 / 6) / 3)
    assert both["dgu"] == pytest.approx(1 / 6)
    assert [each["k"] for each in found["models"]["one"]] == [1, 2]  # two items a row were kept
    nothing, known = found["models"]["two"]  # shows an item without genre first, always
    assert (nothing["mgu"], nothing["dgu"], nothing["without_genre"]) == (None, None, 3)
    assert (known["items"], known["without_genre"]) == (5, 3)
    # Chosen: 2 and 0, so a 1, b 0.5, c 0.5 of two, and one item without genre.
    assert found["chosen"]["mgu"] == pytest.approx((abs(1 / 2 - 1 / 3) + abs(1 / 4 - 2 / 3) + 1 / 4) / 3)
    assert (found["chosen"]["items"], found["chosen"]["without_genre"]) == (3, 1)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("met", [[], [3, 3]], ids=["no histories", "none with a genre"])
def test_without_genres_there_is_nothing_to_compare(met: list[int]) -> None:
    assert genre_exposure({"one": FIRST}, np.array(met, dtype=np.int64), np.array([0]), GENRES, (1,)) is None
    none = Genres.of(np.array([]), np.zeros(4, dtype=np.int64))
    assert genre_exposure({"one": FIRST}, np.array([0, 1]), np.array([0]), none, (1,)) is None
