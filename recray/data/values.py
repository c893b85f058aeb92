"""Values of columns as users write them: ids, numbers and moments, whatever type or text they come in."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EARLIEST_TIME_S = 788_918_400  # 1995-01-01: from here on, seconds, milliseconds, ... can't be taken for each other
LATEST_TIME_S = 4_133_980_800  # 2101-01-01: no log is from later
UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}  # in a second

_WHOLE = r"^-?\d+\.0*$"
_NOT_WHOLE = r"^-?(\d*\.\d+|\d+(\.\d+)?[eE][+-]\d+)$"
_EXACT = 2.0**53  # beyond, a float names several whole numbers


def as_ids(values: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, pa.Array, pa.Array]:
    """Return ids as strings, which were mended, and which can't be one; both as booleans, their ids null.

    1, "1" and 1.0 are one id: a column with a gap often comes as decimals. 1.5 is none, nor is a float beyond 2**53,
    which may be any of several numbers. The empty string and what is not a number ("NaN") are missing: null alone.
    """
    values = _one(values)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        numbers = pc.if_else(pc.is_nan(values), None, values)
        mended = pc.and_(pc.equal(numbers, pc.floor(numbers)), pc.less(pc.abs(numbers), _EXACT))
        text = pc.cast(pc.cast(pc.if_else(mended, numbers, None), pa.int64()), pa.string())
        wrong = pc.invert(mended)
    else:
        text = pc.cast(values, pa.string())
        text = pc.if_else(pc.is_in(text, value_set=pa.array(["", "nan", "NaN"])), pa.scalar(None, pa.string()), text)
        mended = pc.match_substring_regex(text, _WHOLE)
        wrong = pc.and_not(pc.match_substring_regex(text, _NOT_WHOLE), mended)
        text = pc.if_else(mended, pc.replace_substring_regex(text, r"\.0*$", ""), text)
        text = pc.if_else(wrong, pa.scalar(None, pa.string()), text)
    return text, pc.fill_null(mended, False), pc.fill_null(wrong, False)


def as_text(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return text, whole numbers without a point; the empty string and what is not a number as null."""
    values = _one(values)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_finite(values), values, None)
        if bool(pc.all(pc.equal(values, pc.floor(values)), skip_nulls=True).as_py() is not False):
            values = pc.cast(values, pa.int64(), safe=False)
    text = pc.cast(values, pa.string())
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def as_number(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return float64; null for what is no finite number."""
    values = _one(values)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        text = pc.utf8_trim_whitespace(values)
        is_number = pc.match_substring_regex(text, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$")
        values = pc.cast(pc.if_else(is_number, text, pa.scalar(None, pa.string())), pa.float64())
    elif not _is_numeric(values.type):
        return pa.nulls(len(values), pa.float64())
    values = pc.cast(values, pa.float64(), safe=False)
    return pc.if_else(pc.is_finite(values), values, pa.scalar(None, pa.float64()))


def as_seconds(values: pa.Array | pa.ChunkedArray, unit: str = "auto") -> tuple[pa.Array, pa.Array]:
    """Return int64 seconds since 1970, from numbers, timestamps, dates, or text of either; null where it is none.

    Also how many of its unit make a second, where a number was read: of `unit`, or, for auto, of the only unit in which
    it lies between 1995 and 2100; seconds where there is none. Text is ISO 8601, with a date at least; without an
    offset it is UTC.
    """
    values = _one(values)
    if pa.types.is_timestamp(values.type) or pa.types.is_date(values.type):
        whole = pc.cast(values, pa.timestamp("s"), safe=False) if pa.types.is_date(values.type) else values
        if pa.types.is_timestamp(whole.type) and whole.type.tz is not None:
            whole = pc.cast(whole, pa.timestamp(whole.type.unit))
        per_second: Any = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[whole.type.unit]
        seconds = pc.cast(pc.floor(pc.divide(pc.cast(whole, pa.int64()), per_second)), pa.int64())
        return seconds, pa.nulls(len(values), pa.int64())
    numbers = as_number(values)
    per_second = _per_second(numbers, unit)
    seconds = as_whole(pc.divide(numbers, pc.cast(per_second, pa.float64())))
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        text = pc.if_else(pc.is_null(numbers), values, pa.scalar(None, values.type))
        seconds = pc.coalesce(seconds, _iso_seconds(text))
    return seconds, per_second


def _per_second(numbers: pa.Array, unit: str) -> pa.Array:
    if unit != "auto":
        found = pa.array([UNITS[unit]] * len(numbers), pa.int64())
    else:
        found = pa.array([1] * len(numbers), pa.int64())
        for size in UNITS.values():
            inside = pc.and_(
                pc.greater_equal(numbers, float(EARLIEST_TIME_S * size)),
                pc.less(numbers, float(LATEST_TIME_S * size)),
            )
            found = pc.if_else(pc.fill_null(inside, False), size, found)
    return pc.if_else(pc.is_valid(numbers), found, pa.scalar(None, pa.int64()))


def _iso_seconds(text: pa.Array) -> pa.Array:
    if text.null_count == len(text):
        return pa.nulls(len(text), pa.int64())
    parts = pc.extract_regex(
        pc.utf8_trim_whitespace(text),
        r"^(?P<day>\d{4}-\d\d-\d\d)(?:[T ](?P<clock>\d\d:\d\d)(?P<second>:\d\d)?(?:[.,]\d+)?)?"
        r"(?P<zone>Z|(?P<sign>[+-])(?P<hours>\d\d):?(?P<minutes>\d\d))?$",
    )

    def part(name: str, default: str) -> pa.Array:
        found = pc.struct_field(parts, name)
        return pc.if_else(pc.equal(found, ""), default, found)

    whole = pc.binary_join_element_wise(part("day", ""), "T", part("clock", "00:00"), part("second", ":00"), "")
    moments = pc.strptime(whole, format="%Y-%m-%dT%H:%M:%S", unit="s", error_is_null=True)
    # strptime takes 30 February for 1 March.
    real = pc.equal(pc.day(moments), pc.cast(pc.utf8_slice_codeunits(whole, 8, 10), pa.int64()))
    seconds = pc.cast(pc.if_else(real, moments, pa.scalar(None, moments.type)), pa.int64())
    hours, minutes = (pc.cast(part(name, "0"), pa.int64()) for name in ("hours", "minutes"))
    offset = pc.add(pc.multiply(hours, 3600), pc.multiply(minutes, 60))
    return pc.subtract(seconds, pc.if_else(pc.equal(part("sign", "+"), "-"), pc.negate(offset), offset))


def _is_numeric(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def as_whole(numbers: pa.Array) -> pa.Array:
    """Return numbers as int64, rounded down; -1 for what is too large for it."""
    inside = pc.less(pc.abs(numbers), 2.0**62)
    return pc.cast(pc.floor(pc.if_else(inside, numbers, pa.scalar(-1.0))), pa.int64())


def _one(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
