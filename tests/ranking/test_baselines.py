"""Popularity and co-occurrence against counting in plain loops."""

import itertools
import math

import numpy as np
import pytest

from recray.ranking import baselines
from recray.ranking.baselines import Cooccurrence, Popularity, item_popularity
from recray.ranking.ragged import concatenated

ITEMS = 30


def _histories(seed: int, users: int = 40) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, ITEMS, size=generator.integers(0, 12)).astype(np.int32) for _ in range(users)]


def _cosine_by_loops(histories: list[np.ndarray]) -> np.ndarray:
    """The definition: for every user, every pair of distinct items."""
    together, alone = np.zeros((ITEMS, ITEMS)), np.zeros(ITEMS)
    for history in histories:
        met = sorted(set(history.tolist()))
        for item in met:
            alone[item] += 1
        for first, second in itertools.combinations(met, 2):
            together[first, second] += 1
            together[second, first] += 1
    cosine = np.zeros((ITEMS, ITEMS))
    for first, second in itertools.product(range(ITEMS), repeat=2):
        if together[first, second]:
            cosine[first, second] = together[first, second] / math.sqrt(alone[first] * alone[second])
    return cosine


def _random_rows(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    generator = np.random.default_rng(seed)
    histories = _histories(seed, users=25)
    candidates = [generator.permutation(ITEMS)[: generator.integers(1, 9)].astype(np.int32) for _ in histories]
    return histories, candidates


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("at_once", [1, 50, 2_000_000])
def test_cooccurrence_follows_the_definition(seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_PAIRS_AT_ONCE", at_once)
    monkeypatch.setattr(baselines, "_LOOKUPS_AT_ONCE", at_once)
    training = _histories(seed)
    cosine = _cosine_by_loops(training)
    histories, candidates = _random_rows(seed + 100)
    found = Cooccurrence.of(*concatenated(training), ITEMS)(histories, candidates)
    assert len(found) == len(candidates)
    for history, asked, scores in zip(histories, candidates, found, strict=True):
        expected = [sum(cosine[h, c] for h in set(history.tolist())) for c in asked]
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_cooccurrence_by_hand() -> None:
    training = [np.array([0, 1]), np.array([0, 1, 2]), np.array([2])]
    model = Cooccurrence.of(*concatenated(training), 4)
    (scores,) = model([np.array([0])], [np.array([0, 1, 2, 3])])
    # 0 and 1 share both of their users; 0 and 2 one of two each; nobody pairs an item with itself.
    assert scores.tolist() == pytest.approx([0.0, 1.0, 0.5, 0.0])


def test_only_the_latest_items_of_a_long_history_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "LATEST_ITEMS", 2)
    # Item 1 was met first and again last: it is the latest.
    model = Cooccurrence.of(*concatenated([np.array([1, 0, 2, 1])]), 6)
    assert model.pairs.tolist() == [1 * 6 + 2]


def test_a_repeat_counts_once_and_users_do_not_mix() -> None:
    model = Cooccurrence.of(*concatenated([np.array([0, 1, 0, 1]), np.array([2])]), 3)
    assert model.pairs.tolist() == [1]
    assert model.cosine.tolist() == [1.0]


def test_nothing_met_scores_zero() -> None:
    empty = Cooccurrence.of(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int64), 3)
    (scores,) = empty([np.array([0, 1])], [np.array([1, 2])])
    assert scores.tolist() == [0.0, 0.0]
    assert empty([], []) == []


def test_popularity_is_the_training_count() -> None:
    counts = item_popularity(np.array([0, 2, 2, 2, 1]), 5)
    assert counts.tolist() == [1, 1, 3, 0, 0]
    scores = Popularity(counts)([np.array([4]), np.array([0])], [np.array([2, 4]), np.array([0])])
    assert [row.tolist() for row in scores] == [[3.0, 0.0], [1.0]]
    assert scores[0].dtype == np.float32
