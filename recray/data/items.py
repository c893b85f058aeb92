"""The catalogue as a table: dense items in an order that says nothing, and one distinct label an item."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs as pafs

from recray.config import Columns
from recray.data.hashing import hash_strings, mix
from recray.data.logs import item_column
from recray.data.reading import (
    BROKEN_ENCODING,
    CONTENT,
    FAULT,
    ROW,
    File,
    column_names,
    field_types,
    nearest,
    pieces_of,
    read_piece,
)
from recray.data.values import as_ids, as_text
from recray.errors import DataError
from recray.schema import CATALOGUE

GENRES = ("genres", "tags")
# What RecBole's data sets call the title and the genres of an item.
ATOMIC_TITLES = ("title", "name", "movie_title", "item_title", "item_name", "product_name", "app_name", "book_title")
ATOMIC_GENRES = (*GENRES, "genre", "class", "categories", "category")


class ItemColumns(NamedTuple):
    """Which columns of a catalogue are read."""

    item: str
    title: str
    genres: str | None
    separator: str  # between genres, where they are text


def read_items(fs: pafs.FileSystem, files: Sequence[File], columns: Columns, seed: int) -> pa.Table:
    """Return rows of `CATALOGUE` in `item` order, a shuffle that depends on the seed and the ids only.

    Unlike a log, a catalogue must be sound: nothing in it is set aside.

    Raises:
        DataError: naming file and row or item, for a row that can't be read, an id missing or given twice, an empty
            title, a missing column, or fewer than two items.
    """
    parts = [part for file in files for part in _read_file(fs, file, columns)]
    return _catalogue(pa.concat_tables(parts), seed)


def items_of_titles(titles: Sequence[str], seed: int) -> pa.Table:
    """Return rows of `CATALOGUE`, one a distinct title, which is its id too.

    Raises:
        DataError: if there are fewer than two.
    """
    genres = pa.array([[]] * len(titles), pa.list_(pa.string()))
    return _catalogue(pa.table([titles, titles, genres], names=["item_id", "title", "genres"]), seed)


def _catalogue(table: pa.Table, seed: int) -> pa.Table:
    if table.num_rows < 2:
        raise DataError(f"the catalogue holds {table.num_rows} items; expected at least two")
    counts = pc.value_counts(table["item_id"])
    twice = counts.filter(pc.greater(pc.struct_field(counts, "counts"), 1))
    if len(twice):
        names = ", ".join(pc.struct_field(twice.slice(0, 5), "values").to_pylist())
        raise DataError(f"the catalogue gives {len(twice)} item ids more than once (first {names}); keep one row an id")
    hashes = mix(seed, hash_strings(table["item_id"]))
    table = table.take(np.argsort(hashes, kind="stable")).combine_chunks()
    labels = distinct_labels(table["title"].to_pylist())
    items = np.arange(table.num_rows, dtype=np.int32)
    arrays = [
        pa.array(items),
        table["item_id"],
        table["title"],
        pa.array(labels, pa.string()),
        table["genres"],
    ]
    return pa.table(arrays, schema=CATALOGUE)


def distinct_labels(titles: Sequence[str]) -> list[str]:
    """Return the titles on one line each; those that several items share get an edition letter, each item its own.

    Letters follow the place in `titles`, so they carry no order as long as the places carry none. A letter whose
    label is another item's title is passed over.

    >>> distinct_labels(["Blue", "Red", "Blue"])
    ['Blue (edition A)', 'Red', 'Blue (edition B)']
    """
    labels = [" ".join(title.split()) for title in titles]
    counts: dict[str, int] = {}
    for label in labels:
        counts[label] = counts.get(label, 0) + 1
    taken = set(labels)
    letters: dict[str, Iterator[str]] = {label: _letters() for label, count in counts.items() if count > 1}
    for place, label in enumerate(labels):
        if label in letters:
            editions = (f"{label} (edition {letter})" for letter in letters[label])
            labels[place] = next(edition for edition in editions if edition not in taken)
            taken.add(labels[place])
    return labels


def _letters() -> Iterator[str]:
    """Yield A ... Z, AA, AB, ..."""
    length = 1
    while True:
        for number in range(26**length):
            yield "".join(chr(ord("A") + number // 26**place % 26) for place in reversed(range(length)))
        length += 1


def item_columns(fs: pafs.FileSystem, file: File, columns: Columns) -> ItemColumns:
    """Return which columns of a catalogue mean what.

    Raises:
        DataError: naming the file, the setting, and the columns there are, if one is missing.
    """
    names = column_names(fs, file)
    title, separator = columns.title, "|"  # as MovieLens writes it
    genre_names: tuple[str, ...] = GENRES
    if file.form == "atomic":
        genre_names = ATOMIC_GENRES
        if title == Columns().title:
            title = next((name for name in ATOMIC_TITLES if name in names), title)
    genres = columns.genres or next((name for name in genre_names if name in names), None)
    if file.form == "atomic":
        separator = " " if field_types(fs, file).get(genres or "") == "token_seq" else "\t"  # a token is one genre
    found = ItemColumns(item_column(file, names, columns), title, genres, separator)
    for setting, name in zip(("item", "title", "genres"), found, strict=False):
        if name is not None and name not in names:
            raise DataError(
                f"catalogue {file.name} has no column {name!r}; {nearest(name, names)}. "
                f"Set ingest.columns.{setting} to the right one"
            )
    return found


def _read_file(fs: pafs.FileSystem, file: File, columns: Columns) -> Iterator[pa.Table]:
    found = item_columns(fs, file, columns)
    wanted = [name for name in found[:3] if name is not None]
    for piece in pieces_of(fs, file):
        for raw in read_piece(fs, piece, wanted):
            _refuse_faults(file, raw)
            yield _sound_part(file, raw, found)


def _refuse_faults(file: File, raw: pa.Table) -> None:
    faults = raw.filter(pc.is_valid(raw[FAULT])).slice(0, 1).to_pylist()
    if faults:
        fault = faults[0]
        hint = (
            " (neither UTF-8 nor surely cp1252: convert the file to UTF-8)" if fault[FAULT] == BROKEN_ENCODING else ""
        )
        raise DataError(f"catalogue {file.name}, row {fault[ROW]}: {fault[FAULT]}{hint}: {fault[CONTENT][:200]}")


def _sound_part(file: File, raw: pa.Table, columns: ItemColumns) -> pa.Table:
    ids, _, wrong = as_ids(raw[columns.item])
    if ids.null_count:
        place = pc.index(pc.is_null(ids), True).as_py()
        fault = f"{raw[columns.item][place]} is no exact whole number" if wrong[place].as_py() else "is missing"
        raise DataError(f"catalogue {file.name}, row {raw[ROW][place]}: the item id {fault}")
    titles = pc.fill_null(pc.utf8_normalize(as_text(raw[columns.title]), form="NFC"), "")
    empty = pc.equal(pc.utf8_trim_whitespace(titles), "")
    if pc.any(empty).as_py():
        place = pc.index(empty, True).as_py()
        raise DataError(
            f"catalogue {file.name}, row {raw[ROW][place]}: item {ids[place]} has an empty title; give it one, or take "
            "it out of the catalogue (its interactions are then set aside)"
        )
    return pa.table([ids, titles, _genre_lists(raw, columns)], names=["item_id", "title", "genres"])


def _genre_lists(raw: pa.Table, columns: ItemColumns) -> pa.Array:
    """Return lists of genres; text is split at the separator."""
    genres = columns.genres
    kind = pa.list_(pa.string())
    empty = pa.array([[]] * raw.num_rows, kind)
    if genres is None or pa.types.is_null(raw[genres].type):
        return empty
    values = raw[genres].combine_chunks()
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        values = pc.split_pattern(as_text(values), columns.separator)
    return pc.if_else(pc.is_valid(values), values.cast(kind), empty)
