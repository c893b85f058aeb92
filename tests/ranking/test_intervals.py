"""The clustered bootstrap: its values, what it assumes, and that it covers the truth."""

import numpy as np
import pytest

from recray.ranking.intervals import clustered_means


def _clusters(generator: np.random.Generator, users: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of users who differ: their mean is 0.5 in expectation, less surely than rows suggest."""
    rows = generator.integers(1, 12, size=users)
    level = generator.normal(0.5, 1.0, size=users)
    owner = np.repeat(np.arange(users), rows)
    return level[owner] + generator.normal(0.0, 0.1, size=len(owner)), owner


def test_value_is_the_mean_over_rows() -> None:
    found = clustered_means(
        np.array([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]),
        np.array(["a", "a", "b"]),
        samples=50,
        confidence=0.9,
        seed=0,
    )
    assert found.value.tolist() == [3.0, 1.0]


def test_resamples_take_whole_users() -> None:
    # Two users: a resample holds a twice, b twice, or both, so only three means can occur: 1.5, 6 and 3.
    found = clustered_means(np.array([1.0, 2.0, 6.0]), np.array(["a", "a", "b"]), samples=4000, confidence=0.98, seed=0)
    assert (found.low.tolist(), found.high.tolist()) == ([1.5], [6.0])
    quartiles = clustered_means(
        np.array([1.0, 2.0, 6.0]), np.array(["a", "a", "b"]), samples=4000, confidence=0.4, seed=0
    )
    assert (quartiles.low.tolist(), quartiles.high.tolist()) == ([3.0], [3.0])


def test_intervals_cover_clustered_truth_and_rows_alone_would_not() -> None:
    generator = np.random.default_rng(7)
    by_user, by_row, rounds = 0, 0, 150
    for round_ in range(rounds):
        values, owner = _clusters(generator, users=60)
        clustered = clustered_means(values, owner, samples=300, confidence=0.95, seed=round_)
        naive = clustered_means(values, np.arange(len(values)), samples=300, confidence=0.95, seed=round_)
        by_user += bool(clustered.low[0] <= 0.5 <= clustered.high[0])
        by_row += bool(naive.low[0] <= 0.5 <= naive.high[0])
    assert 0.88 <= by_user / rounds <= 0.99
    assert by_row / rounds < 0.75


def test_paired_difference_is_surer_than_its_parts() -> None:
    values, owner = _clusters(np.random.default_rng(1), users=80)
    better = values + 0.05 + np.random.default_rng(2).normal(0.0, 0.02, size=len(values))
    alone = clustered_means(values, owner, samples=500, confidence=0.95, seed=0)
    pair = clustered_means(better - values, owner, samples=500, confidence=0.95, seed=0)
    assert 0.0 < pair.low[0] < 0.05 < pair.high[0] + 0.01
    assert (pair.high - pair.low)[0] < 0.1 * (alone.high - alone.low)[0]


def test_difference_of_resampled_means_is_the_resampled_difference() -> None:
    """Measures see the same resamples, so the interval of x and of x + 1 differ by 1 exactly."""
    values, owner = _clusters(np.random.default_rng(3), users=30)
    both = clustered_means(np.stack([values, values + 1.0], axis=1), owner, samples=200, confidence=0.9, seed=4)
    np.testing.assert_allclose(np.diff(both.low), 1.0, atol=1e-12)
    np.testing.assert_allclose(np.diff(both.high), 1.0, atol=1e-12)


def test_seeded_and_independent_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values, owner = _clusters(np.random.default_rng(5), users=20)
    whole = clustered_means(values, owner, samples=100, confidence=0.9, seed=1)
    monkeypatch.setattr("recray.ranking.intervals._WEIGHTS_AT_ONCE", 7)
    cut = clustered_means(values, owner, samples=100, confidence=0.9, seed=1)
    other = clustered_means(values, owner, samples=100, confidence=0.9, seed=2)
    np.testing.assert_allclose(whole.low, cut.low)
    assert whole.low[0] != other.low[0]


def test_one_user_has_no_interval() -> None:
    found = clustered_means(np.array([0.0, 1.0]), np.array(["a", "a"]), samples=10, confidence=0.9, seed=0)
    assert found.value.tolist() == [0.5]
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()


@pytest.mark.parametrize(("values", "users"), [([], []), ([1.0], ["a", "b"])])
def test_rows_and_users_must_agree(values: list[float], users: list[str]) -> None:
    with pytest.raises(ValueError, match="as many users as rows"):
        clustered_means(np.array(values), np.array(users), samples=10, confidence=0.9, seed=0)


# Kinds of users: their shares, rows each, and the chance of a hit.
KINDS, ROWS, EASE = np.array([0.6, 0.3, 0.1]), np.array([1, 3, 30]), np.array([0.2, 0.4, 0.6])


def _hits(generator: np.random.Generator, users: int) -> tuple[np.ndarray, np.ndarray]:
    """Hits of two models: a tenth of the users have two thirds of the rows, and are served better than the others."""
    kind = generator.choice(3, size=users, p=KINDS)
    ease = generator.beta(2 * EASE[kind], 2 * (1 - EASE[kind]))
    owner = np.repeat(np.arange(users), ROWS[kind])
    first = generator.random(len(owner)) < ease[owner]
    second = np.where(generator.random(len(owner)) < 0.5, first, generator.random(len(owner)) < ease[owner])
    return np.stack([first, first.astype(np.float64) - second], axis=1), owner


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_intervals_cover_at_their_nominal_rate(confidence: float) -> None:
    """400 worlds of 300 users: a hit rate and a paired difference, each within four binomial deviations."""
    truth = np.array([KINDS * ROWS @ EASE / (KINDS @ ROWS), 0.0])
    generator, rounds, covered = np.random.default_rng(11), 400, np.zeros(2)
    for round_ in range(rounds):
        values, owner = _hits(generator, users=300)
        found = clustered_means(values, owner, samples=300, confidence=confidence, seed=round_)
        covered += (found.low <= truth) & (truth <= found.high)
    deviation = np.sqrt(confidence * (1 - confidence) / rounds)
    assert (covered / rounds >= confidence - 4 * deviation).all()
    assert (covered / rounds <= confidence + 4 * deviation).all()
