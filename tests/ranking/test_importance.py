"""What a setting explains of a result, against values by hand and against chance."""

import numpy as np
import pytest

from recray.ranking.importance import importance


def test_a_share_by_hand() -> None:
    # Means 1 and 3 around 2: between 4 * 1 = 4, within 4 * 0.25 = 1.
    found = importance({"a": ["x", "x", "y", "y"]}, np.array([0.5, 1.5, 2.5, 3.5]), seed=0)
    assert found["a"].share == pytest.approx(4 / 5)


def test_a_setting_that_decides_explains_all_and_one_that_does_nothing_what_chance_does() -> None:
    rng = np.random.default_rng(0)
    decides = np.repeat([1, 3, 7], 20).tolist()
    nothing = rng.uniform(size=60).tolist()
    found = importance({"decides": decides, "nothing": nothing}, np.array(decides, dtype=float), seed=0)
    assert found["decides"].share == pytest.approx(1.0)
    assert found["decides"].p < 0.001
    assert found["nothing"].share < 0.15
    assert found["nothing"].p > 0.05
    # Dealt at random, L levels explain (L - 1) / (P - 1) of the variance.
    assert found["nothing"].by_chance == pytest.approx(2 / 59, rel=0.15)


def test_numbers_are_cut_into_thirds_of_the_points() -> None:
    values = [0.01 * n for n in range(9)]
    result = np.array([0.0] * 3 + [5.0] * 3 + [1.0] * 3)  # best in the middle: no line would see it
    assert importance({"a": values}, result, seed=0)["a"].share == pytest.approx(1.0)


def test_true_is_not_one_and_a_setting_that_a_point_lacks_is_a_level() -> None:
    result = np.array([0.0, 1.0, 0.0, 1.0])
    assert importance({"a": [True, 1, True, 1]}, result, seed=0)["a"].share == pytest.approx(1.0)
    assert importance({"a": [None, 0.5, None, 0.7]}, result, seed=0)["a"].share == pytest.approx(1.0)
    many = [None, 0.1, 0.2, 0.3, 0.4]
    assert importance({"a": many}, np.array([9.0, 0, 0, 0, 0]), seed=0)["a"].share == pytest.approx(1.0)


def test_nothing_is_explained_where_nothing_differs() -> None:
    flat = importance({"a": [1, 2, 3, 4]}, np.full(4, 0.1), seed=0)["a"]
    assert flat.share == 0.0
    assert flat.p == 1.0
    assert importance({"a": [1, 1, 1, 1]}, np.arange(4.0), seed=0)["a"].share == 0.0
    assert importance({"a": [1, 2]}, np.arange(2.0), seed=0) == {}
