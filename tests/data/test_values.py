"""Ids and moments in every type and text they come in."""

import datetime as dt
import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.data.values import EARLIEST_TIME_S, LATEST_TIME_S, UNITS, as_ids, as_seconds

MOMENTS = st.integers(EARLIEST_TIME_S, LATEST_TIME_S - 1)


@given(st.lists(st.integers(-(2**52), 2**52), min_size=1))
def test_a_whole_number_is_one_id_in_every_type(numbers: list[int]) -> None:
    texts = [str(number) for number in numbers]
    types: list[tuple[list[Any], pa.DataType]] = [
        (numbers, pa.int64()),
        (texts, pa.string()),
        (texts, pa.large_string()),
        ([float(number) for number in numbers], pa.float64()),
        ([f"{number}.0" for number in numbers], pa.string()),
        ([f"{number}." for number in numbers], pa.string()),
    ]
    for place, (values, kind) in enumerate(types):
        ids, mended, wrong = as_ids(pa.array(values, kind))
        assert ids.to_pylist() == texts
        assert mended.to_pylist() == [place > 2] * len(numbers)
        assert not any(wrong.to_pylist())


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_a_float_is_an_id_only_where_it_is_exactly_whole(number: float) -> None:
    ids, mended, wrong = (each.to_pylist()[0] for each in as_ids(pa.array([number, 1.0])))
    if math.isnan(number):
        assert (ids, mended, wrong) == (None, False, False)
    elif number.is_integer() and abs(number) < 2**53:
        assert (ids, mended, wrong) == (str(int(number)), True, False)
    else:
        assert (ids, mended, wrong) == (None, False, True)


def test_texts_that_are_ids_and_that_are_not() -> None:
    texts = [
        "007",
        "1.50",
        "1.000",
        "-3.0",
        "B00X1",
        "1.0.2",
        "v1.5",
        "1e5",
        "1.5e+3",
        "12E-4",
        ".5",
        "",
        "NaN",
        "nan",
        None,
    ]
    ids, mended, wrong = (each.to_pylist() for each in as_ids(pa.array(texts)))
    assert ids == ["007", None, "1", "-3", "B00X1", "1.0.2", "v1.5", "1e5"] + [None] * 7
    assert [text for text, is_so in zip(texts, mended, strict=True) if is_so] == ["1.000", "-3.0"]
    assert [text for text, is_so in zip(texts, wrong, strict=True) if is_so] == ["1.50", "1.5e+3", "12E-4", ".5"]


def test_decimal_and_dictionary_columns_are_ids_too() -> None:
    decimals = pa.array([1, 2]).cast(pa.decimal128(22, 2))
    assert as_ids(decimals)[0].to_pylist() == ["1", "2"]
    assert as_ids(pa.array(["x", "y"]).dictionary_encode())[0].to_pylist() == ["x", "y"]


@given(st.lists(st.tuples(MOMENTS, st.sampled_from(list(UNITS))), min_size=1), st.booleans())
def test_every_number_is_read_by_the_unit_in_which_it_is_a_moment(rows: list[tuple[int, str]], text: bool) -> None:
    numbers = [moment * UNITS[unit] for moment, unit in rows]
    values = pa.array([str(number) for number in numbers] if text else numbers)
    seconds, per_second = as_seconds(values)
    assert seconds.to_pylist() == [moment for moment, _ in rows]
    assert per_second.to_pylist() == [UNITS[unit] for _, unit in rows]


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_that_is_set_holds_for_every_number(unit: str) -> None:
    numbers = [0, 1000 * UNITS[unit], 1_600_000_000, 1_600_000_000_000]
    seconds, per_second = as_seconds(pa.array(numbers), unit)
    assert seconds.to_pylist() == [number // UNITS[unit] for number in numbers]
    assert per_second.to_pylist() == [UNITS[unit]] * 4


def test_what_lies_in_no_unit_stays_seconds_and_text_of_dates_has_none() -> None:
    seconds, per_second = as_seconds(pa.array(["1000", "100000000000", "2020-01-01", "x", None]))
    midnight = int(dt.datetime(2020, 1, 1, tzinfo=dt.UTC).timestamp())
    assert seconds.to_pylist() == [1000, 100_000_000_000, midnight, None, None]
    assert per_second.to_pylist() == [1, 1, None, None, None]
