"""The permutation test against its definition over all flips, its rate under the null, and Holm by hand."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.ranking.paired import holm, sign_flip_p_values


def _exact(by_user: list[float]) -> float:
    """p over all 2^U flips."""
    sums = [
        abs(sum(s * d for s, d in zip(signs, by_user, strict=True))) for signs in product((-1, 1), repeat=len(by_user))
    ]
    return float(np.mean([found >= abs(sum(by_user)) - 1e-9 for found in sums]))


def test_agrees_with_all_flips_of_users() -> None:
    differences = np.array([0.5, 0.1, 0.3, -0.2, 0.4, 0.1, 0.1, -0.05])
    users = np.array(["a", "a", "b", "c", "c", "d", "e", "f"])
    expected = _exact([0.6, 0.3, 0.2, 0.1, 0.1, -0.05])
    assert expected == 4 / 64
    (found,) = sign_flip_p_values(differences, users, seed=0, flips=40_000)
    assert found == pytest.approx(expected, abs=4 * np.sqrt(expected / 40_000))  # four standard deviations
    (rows,) = sign_flip_p_values(differences, np.arange(8), seed=0, flips=40_000)
    assert abs(rows - found) > 0.01  # rows flipped alone tell another story


def test_rejects_at_its_level_where_users_differ_and_rows_alone_would_not() -> None:
    generator, rounds, level = np.random.default_rng(3), 400, 0.05
    by_user = by_row = 0
    for round_ in range(rounds):
        owner = np.repeat(np.arange(40), generator.integers(1, 12, size=40))
        values = generator.normal(0.0, 1.0, size=40)[owner] + generator.normal(0.0, 0.3, size=len(owner))
        by_user += sign_flip_p_values(values, owner, seed=round_, flips=199)[0] <= level
        by_row += sign_flip_p_values(values, np.arange(len(owner)), seed=round_, flips=199)[0] <= level
    # Binomial(400, 0.05): 20 +- 4.4; four standard deviations either way.
    assert 3 <= by_user <= 38
    assert by_row > 120


def test_a_real_difference_is_found_and_none_is_not() -> None:
    generator = np.random.default_rng(0)
    owner = np.repeat(np.arange(100), 5)
    noise = generator.normal(0.0, 1.0, size=500)
    found = sign_flip_p_values(np.stack([noise + 0.5, np.zeros(500)], axis=1), owner, seed=1)
    assert found[0] == 1e-4  # the smallest that 9,999 flips can give
    assert found[1] == 1.0


def test_either_sign_is_as_sure_and_one_user_shows_nothing() -> None:
    values = np.random.default_rng(0).normal(0.2, 1.0, size=60)
    owner = np.arange(60) // 2
    there, back = sign_flip_p_values(np.stack([values, -values], axis=1), owner, seed=0)
    assert there == back
    assert sign_flip_p_values(values, np.zeros(60), seed=0).tolist() == [1.0]


def test_seeded_and_independent_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(0.2, 1.0, size=24)
    whole = sign_flip_p_values(values, np.arange(24), seed=0, flips=500)
    other = sign_flip_p_values(values, np.arange(24), seed=1, flips=500)
    monkeypatch.setattr("recray.ranking.paired._SIGNS_AT_ONCE", 24 * 4)
    assert sign_flip_p_values(values, np.arange(24), seed=0, flips=500) == whole
    assert whole != other


@pytest.mark.parametrize(("values", "users"), [([], []), ([1.0], ["a", "b"])])
def test_rows_and_users_must_agree(values: list[float], users: list[str]) -> None:
    with pytest.raises(ValueError, match="as many users as rows"):
        sign_flip_p_values(np.array(values), np.array(users), seed=0)


def test_holm_by_hand() -> None:
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, and none below the one before it.
    assert holm(np.array([0.04, 0.01, 0.03, 0.02])) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm(np.array([0.6, 0.9])).tolist() == [1.0, 1.0]
    assert holm(np.array([])).tolist() == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_steps_reject(p_values: list[float], level: float) -> None:
    corrected = holm(np.array(p_values))
    rejected = set()
    for step, place in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[place] * (len(p_values) - step) > level:
            break
        rejected.add(int(place))
    assert set(np.flatnonzero(corrected <= level).tolist()) == rejected
    assert (corrected >= p_values).all()
