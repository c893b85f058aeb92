"""Ragged lists against plain lists."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from recray.users.ragged import Ragged, from_arrow, from_lengths, latest, padded, take, windows

LISTS = st.lists(st.lists(st.integers(0, 99), max_size=7), max_size=6)


def _ragged(lists: list[list[int]]) -> Ragged:
    flat = np.array([item for each in lists for item in each], dtype=np.int32)
    return from_lengths(flat, np.array([len(each) for each in lists], dtype=np.int64))


def _lists(ragged: Ragged) -> list[list[int]]:
    return [ragged.items[a:b].tolist() for a, b in zip(ragged.offsets[:-1], ragged.offsets[1:], strict=True)]


def test_windows_by_hand() -> None:
    assert _lists(windows(_ragged([[1, 2, 3, 4, 5], [], [6], [7, 8]]), 2)) == [[1], [2, 3], [4, 5], [6], [7, 8]]


@given(LISTS, st.integers(1, 5))
def test_windows_hold_every_item_once_and_only_the_first_is_short(lists: list[list[int]], width: int) -> None:
    wanted = []
    for each in lists:
        cuts = list(range(len(each), 0, -width))[::-1]
        wanted += [each[max(0, cut - width) : cut] for cut in cuts]
    assert _lists(windows(_ragged(lists), width)) == wanted


@given(LISTS, st.integers(1, 5))
def test_latest_are_the_last(lists: list[list[int]], most: int) -> None:
    assert _lists(latest(_ragged(lists), most)) == [each[-most:] for each in lists]


@given(LISTS, st.data())
def test_take_and_padded(lists: list[list[int]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=5)) if lists else []
    taken = take(_ragged(lists), np.array(chosen, dtype=np.int64))
    wanted = [lists[at] for at in chosen]
    assert _lists(taken) == wanted
    table, valid = padded(taken)
    assert [row[inside].tolist() for row, inside in zip(table, valid, strict=True)] == wanted
    assert not table[~valid].any()


def test_arrow_columns_sliced_chunked_and_null() -> None:
    column = pa.chunked_array([pa.array([[9], [1, 2]]).slice(1), pa.array([None, [], [3]], pa.list_(pa.int64()))])
    assert _lists(from_arrow(column)) == [[1, 2], [], [], [3]]
    assert _lists(from_arrow(pa.chunked_array([], pa.list_(pa.int32())))) == []
