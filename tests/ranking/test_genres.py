"""Shares of genres, MGU and DGU: by hand, and against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.ranking.genres import Genres, dgu, genre_shares, mgu, without_genre

CATALOGUE = [["Drama"], ["Comedy", "Drama"], [], ["Comedy", "Crime", "Drama", "War"]]


def _genres(catalogue: list[list[str]]) -> Genres:
    flat = [name for names in catalogue for name in names]
    return Genres.of(np.array(flat, dtype=object), np.array([len(names) for names in catalogue]))


def test_an_item_of_several_genres_counts_a_part_for_each() -> None:
    genres = _genres(CATALOGUE)
    assert genres.names == ["Comedy", "Crime", "Drama", "War"]
    # Item 0 twice, 1 once, 3 once: Comedy 1/2 + 1/4, Crime 1/4, Drama 2 + 1/2 + 1/4, War 1/4, of four.
    shares = genre_shares(np.array([[0, 1], [0, 3], [2, -1]]), genres)
    assert shares == pytest.approx([0.75 / 4, 0.25 / 4, 2.75 / 4, 0.25 / 4])
    assert without_genre(np.array([[2, 0], [2, -1]]), genres) == 2


def test_gaps_by_hand() -> None:
    shown, met = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.4, 0.4])
    assert mgu(shown, met) == pytest.approx((0.3 + 0.1 + 0.2) / 3)
    assert dgu(shown, met) == pytest.approx(0.3 - -0.2)
    assert (mgu(met, met), dgu(met, met)) == (0.0, 0.0)


def test_what_names_no_genre_is_none_and_a_genre_named_twice_counts_once() -> None:
    genres = _genres([["(no genres listed)"], ["", "Drama", "Drama"], ["War", "Drama"]])
    assert genres.names == ["Drama", "War"]
    assert genres.has_one.tolist() == [False, True, True]
    assert genre_shares(np.array([1, 2]), genres) == pytest.approx([0.75, 0.25])


def test_nothing_shown_has_no_shares() -> None:
    genres = _genres(CATALOGUE)
    for items in ([], [-1], [2, 2]):
        assert np.isnan(genre_shares(np.array(items, dtype=np.int64), genres)).all()
    assert genre_shares(np.array([0]), _genres([[], []])).tolist() == []


NAMES = st.lists(st.sampled_from("abcde"), max_size=4)


@given(st.lists(NAMES, min_size=1, max_size=6), st.data())
def test_agrees_with_plain_loops(catalogue: list[list[str]], data: st.DataObject) -> None:
    items = data.draw(st.lists(st.integers(-1, len(catalogue) - 1), max_size=12))
    expected = dict.fromkeys(sorted({name for names in catalogue for name in names}), 0.0)
    for item in items:
        own = set(catalogue[item]) if item >= 0 else set()
        for name in own:
            expected[name] += 1 / len(own)
    total = sum(expected.values())
    genres = _genres(catalogue)
    assert genres.names == list(expected)
    found = genre_shares(np.array(items, dtype=np.int64), genres)
    if total == 0:
        assert np.isnan(found).all()
    else:
        assert found == pytest.approx([value / total for value in expected.values()], abs=1e-12)
        assert found.sum() == pytest.approx(1.0)
