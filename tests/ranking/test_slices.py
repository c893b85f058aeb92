"""Slices cut all rows, and hold what their names say."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.ranking.slices import COLD, TRAINING, slices
from recray.ranking.summary import Ranked, Settings, band_hit_rates, rank_measures, sliced

POPULARITY = np.array([9, 5, 4, 0, 0])  # head: item 0 (9 < 12 reach no third beyond it), mid: 1, tail: the rest
TARGETS = np.array([0, 1, 3, 4, 2])
USERS = np.array(["a", "a", "b", "b", "a"])
RANKED = {"one": Ranked(np.array([1, 2, 3, 1, 9]), np.array([[0], [0], [0], [3], [0]]))}
SETTINGS = Settings(ks=(1, 5), samples=100, confidence=0.9, seed=0)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 4)), min_size=1))
def test_slices_of_one_kind_hold_every_row_once(rows: list[tuple[int, int]]) -> None:
    lengths, targets = np.array(rows).T
    times: dict[str, np.ndarray] = {}
    for part in slices(lengths, targets, POPULARITY):
        assert part.chosen.any()
        times[part.by] = times.get(part.by, np.zeros(len(rows), dtype=np.int64)) + part.chosen
    assert len(times) == 3
    assert all((count == 1).all() for count in times.values())


def test_slices_by_hand() -> None:
    found = {(part.by, part.name): part.chosen.nonzero()[0].tolist() for part in slices(
        np.array([0, 1, 4, 5, 50]), TARGETS, POPULARITY)}  # fmt: skip
    assert found == {
        (TRAINING, "met"): [0, 1, 4],
        (TRAINING, COLD): [2, 3],
        ("popularity of the target", "head"): [0],
        ("popularity of the target", "mid"): [1],
        ("popularity of the target", "tail"): [2, 3, 4],
        ("history length", "0"): [0],
        ("history length", "1–4"): [1, 2],
        ("history length", "5–9"): [3],
        ("history length", "50 or more"): [4],
    }


def test_a_slice_is_summed_up_from_its_own_rows_and_users() -> None:
    parts = [part for part in slices(np.zeros(5), TARGETS, POPULARITY) if part.by == TRAINING]
    met, cold = sliced(RANKED, parts, USERS, SETTINGS)
    assert (met["rows"], met["of"], met["users"]) == (3, 5, 1)
    assert (cold["rows"], cold["of"], cold["users"]) == (2, 5, 1)
    assert met["models"]["one"]["hr@1"]["value"] == pytest.approx(1 / 3)
    assert cold["models"]["one"]["mrr"] == {"value": pytest.approx(2 / 3), "low": None, "high": None}
    json.dumps([met, cold], allow_nan=False)


def test_the_parts_add_up_to_the_whole() -> None:
    generator = np.random.default_rng(0)
    ranked = Ranked(generator.integers(1, 30, size=200), np.zeros((200, 1), dtype=np.int64))
    parts = slices(generator.integers(0, 60, size=200), generator.integers(0, 5, size=200), POPULARITY)
    found = sliced({"one": ranked}, parts, generator.integers(0, 20, size=200), SETTINGS)
    for kind in {part.by for part in parts}:
        own = [part for part in found if part["by"] == kind]
        for name, values in rank_measures(ranked, SETTINGS.ks).items():
            total = sum(part["rows"] * part["models"]["one"][name]["value"] for part in own)
            assert total == pytest.approx(values.sum(), rel=1e-12)


def test_hit_rates_by_band() -> None:
    found = band_hit_rates(RANKED, TARGETS, POPULARITY, 2)
    assert (found["items"], found["rows"]) == ([1, 1, 3], [1, 1, 3])
    assert found["models"]["one"]["hit_rates"] == pytest.approx([1.0, 1.0, 1 / 3])
    # Gini of (1/3, 1, 1): (-2/3 + 0 + 2) / (3 * 7/3) = 4/21
    assert found["models"]["one"]["balance"] == pytest.approx(1 - 4 / 21)


def test_a_band_without_targets_leaves_the_balance_unknown() -> None:
    found = band_hit_rates(RANKED, np.zeros(5, dtype=np.int64), POPULARITY, 2)["models"]["one"]
    assert found == {"hit_rates": [pytest.approx(0.6), None, None], "balance": None}
