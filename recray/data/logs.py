"""Interaction logs as users have them: where the files are, and rows of files to rows of recray's one schema.

What can't be used is never dropped in silence: it leaves `cleaned_*` with a reason, and the counts add up.
"""

import fnmatch
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import fs as pafs

from recray.config import Columns, Ingest
from recray.data.hashing import hash_strings, mix
from recray.data.reading import CONTENT, DECODED, FAULT, ROW, File, form_of, known_endings, nearest
from recray.data.selections import FIELDS, holds_selections, split_of
from recray.data.values import LATEST_TIME_S, UNITS, as_ids, as_number, as_seconds, as_text, as_whole
from recray.errors import DataError
from recray.schema import INTERACTIONS, ITEMS, REJECTED

CONTENT_CHARACTERS = 500

# What is noted of a usable row of a log, as bits: which id was mended, whether its block of text was decoded from
# cp1252, and the unit in which its time was read.
NOTES = {name: 1 << bit for bit, name in enumerate(("user_id", "item_id", DECODED, *UNITS))}
# Rows of a log after cleaning: usable ones have no reason, the others nothing but their place.
CLEANED = pa.schema([*INTERACTIONS, *REJECTED, ("notes", pa.int16())])
# Rows of published sequences, as `ingest/published` holds them.
PUBLISHED = pa.schema(
    [
        ("row", pa.int64()),
        ("split", pa.string()),
        ("user_id", pa.string()),
        ("history", ITEMS),
        ("target", pa.int32()),
        ("candidates", ITEMS),
    ]
)
CLEANED_SEQUENCES = pa.schema(
    [
        *PUBLISHED.remove(0),
        ("file", pa.string()),
        *list(REJECTED)[1:],
    ]  # file and row are where it comes from until it is kept
)
TRUTH = pa.schema([("user_id", pa.string()), ("liked", ITEMS)])  # items a synthetic user would like, but never met

NOT_WHOLE = "that is no exact whole number"
BELOW_RATING = "below min_rating"  # not a fault: counted, not set aside
OTHER_SPLIT = "split that is not train, validation or test"
LEFT_OUT = (BELOW_RATING, OTHER_SPLIT)
SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
}
SPLITS |= {"test": "test"}


ReadNames = Callable[[pa.Array], pa.Array]  # what a list or a target holds → ids


class Source(NamedTuple):
    """The files of a user."""

    fs: pafs.FileSystem
    interactions: tuple[File, ...]
    items_fs: pafs.FileSystem
    items: tuple[File, ...]
    sequences: tuple[File, ...]
    selections: tuple[File, ...] = ()  # without `items`, the catalogue is made of their titles


class LogColumns(NamedTuple):
    """Which columns of one log file are read; without a clock, `time` is a position."""

    user: str
    item: str
    time: str
    rating: str | None
    clock: bool
    unit: str = "auto"  # of a time given as a number

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return [name for name in (self.user, self.item, self.time, self.rating) if name is not None]


def data_print(ingest: Ingest) -> str:
    """Return a fingerprint of the data named: names, sizes and times of its files, or the synthetic settings.

    Raises:
        DataError: if the data, or its catalogue, is not there.
    """
    if ingest.data is None:
        named: Any = ["synthetic", ingest.synthetic.model_dump(mode="json")]
    else:
        source = resolve(ingest)
        parts = (source.interactions, source.items, source.sequences, source.selections)
        named = [[list(file[1:]) for file in part] for part in parts]
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]


def resolve(ingest: Ingest) -> Source:
    """Return the files that `ingest.data` and `ingest.items` name.

    A folder that holds `interactions`, `items` or `sequences` (a file, or a folder of files) needs no mapping, nor do
    RecBole's NAME.inter and NAME.item, nor JSON rows of titles, which are found by what they hold. In any other folder
    every file is part of the log, except `items`.

    Raises:
        DataError: if nothing is there, nothing is readable, or there is no catalogue.
    """
    if ingest.data is None:
        raise ValueError("no data is named: synthetic logs are generated first")
    fs, base, files, is_folder = _find(ingest.data, "ingest.data")
    interactions = _named(files, "interactions") if is_folder else []
    sequences = _named(files, "sequences") if is_folder else []
    selections = _selections(fs, files)
    if sequences and selections:
        both = ", ".join(file.name for file in (*sequences[:1], *selections[:1]))
        raise DataError(f"ingest.data {ingest.data}: which are the published rows: {both}? Keep one kind there")
    if not interactions and not sequences and not selections:
        interactions = _log_files(files)
    if not interactions and not sequences and not selections:
        raise DataError(
            f"ingest.data {ingest.data}: no log in it; expected files that end in {known_endings()}; .json only with "
            f"rows of {', '.join(FIELDS)}"
        )
    if ingest.items is not None:
        items_fs, _, items, _ = _find(ingest.items, "ingest.items")
    else:
        items_fs, items = fs, _catalogue(files if is_folder else _files_below(fs, base), interactions)
    if not items and (interactions or not selections):
        raise DataError(
            f"ingest.data {ingest.data}: no catalogue lies beside the log; expected items.parquet, .csv, .tsv or "
            ".jsonl with an id and a title an item there (NAME.item beside NAME.inter), or set ingest.items to where "
            "it is"
        )
    return Source(fs, tuple(interactions), items_fs, tuple(items), tuple(sequences), tuple(selections))


def log_columns(file: File, names: Sequence[str], columns: Columns, min_rating: float | None) -> LogColumns:
    """Return which columns of a log file mean what.

    Raises:
        DataError: naming the file, the setting, and the columns there are, if one is missing.
    """
    item = item_column(file, names, columns)
    for setting, name in (("user", columns.user), ("item", item)):
        _require(file, names, name, f"ingest.columns.{setting}")
    time = columns.time
    if time is None:
        time = next((name for name in ("timestamp", "position") if name in names), "timestamp")
    _require(file, names, time, "ingest.columns.time")
    rating = columns.rating or ("rating" if "rating" in names else None)
    if rating is not None:
        _require(file, names, rating, "ingest.columns.rating")
    elif min_rating is not None:
        raise DataError(
            f"{file.name} has no column 'rating', which ingest.min_rating needs; set ingest.columns.rating "
            f"or leave min_rating out ({nearest('rating', names)})"
        )
    return LogColumns(columns.user, item, time, rating, clock=time != "position", unit=columns.time_unit)


def item_column(file: File, names: Sequence[str], columns: Columns) -> str:
    """Return the column of item ids: as the settings name it; in an atomic file without `item_id` its one other id.

    RecBole lets a data set call its items as it likes: movie_id, artist_id, business_id.
    """
    if file.form != "atomic" or columns.item in names or columns.item != Columns().item:
        return columns.item
    others = [name for name in names if name.endswith("_id") and name != columns.user]
    return others[0] if len(others) == 1 else columns.item


def cleaned_interactions(
    raw: pa.Table, file: File, columns: LogColumns, item_ids: pa.Array, *, min_rating: float | None, seed: int
) -> pa.Table:
    """Return rows of `CLEANED`, one a row of `raw` and in its order.

    Args:
        raw: what `read_piece` yields.
        item_ids: the catalogue's ids as strings; their places are the dense items.
        min_rating: rows rated lower are left out, rows without a rating set aside.
    """
    users, user_mended, no_user = as_ids(_column(raw, columns.user))
    item_names, item_mended, no_item = as_ids(_column(raw, columns.item))
    items = pc.index_in(item_names, value_set=item_ids)
    if columns.clock:
        time, per_second = as_seconds(_column(raw, columns.time), columns.unit)
        ceiling = LATEST_TIME_S
    else:
        time, per_second = as_whole(as_number(_column(raw, columns.time))), pa.nulls(raw.num_rows, pa.int64())
        ceiling = 2**62
    rating = pc.cast(as_number(_column(raw, columns.rating)), pa.float32(), safe=False)
    impossible = pc.fill_null(pc.or_(pc.less(time, 0), pc.greater_equal(time, ceiling)), True)
    named = "timestamp" if columns.clock else "position"
    reasons: list[tuple[pa.Array, str | pa.Array]] = [
        (pc.is_valid(raw[FAULT]), raw[FAULT]),
        (no_user, f"user id {NOT_WHOLE}"),
        (no_item, f"item id {NOT_WHOLE}"),
        (pc.is_null(users), "missing user id"),
        (pc.is_null(item_names), "missing item id"),
        (pc.is_null(_column(raw, columns.time)), f"missing {named}"),
        (impossible, f"impossible {named}"),
        (pc.is_null(items), "item not in the catalogue"),
    ]
    if min_rating is not None:
        reasons.append((pc.is_null(rating), "missing or impossible rating"))
        reasons.append((pc.less(rating, min_rating), BELOW_RATING))
    reason = _first_reason(reasons)
    if columns.clock:
        numbers = pc.fill_null(items, -1).to_numpy(zero_copy_only=False)
        tie_break = pa.array((mix(seed, hash_strings(users), numbers) >> np.uint64(1)).astype(np.int64))
    else:
        tie_break = time
    decoded = pa.scalar(DECODED.encode() in (raw.schema.metadata or {}))
    notes = _notes({"user_id": user_mended, "item_id": item_mended, DECODED: decoded}, per_second)
    values = [users, items, time, rating, tie_break]
    places = _rejected_columns(raw, file, reason)
    kept = [pc.if_else(pc.is_null(reason), value, pa.scalar(None, value.type)) for value in values]
    kept_notes = pc.if_else(pc.is_null(reason), notes, pa.scalar(0, pa.int16()))
    arrays = zip([*kept, *places, kept_notes], CLEANED, strict=True)
    return pa.table([pc.cast(each, field.type) for each, field in arrays], CLEANED)


def _notes(applies: dict[str, Any], per_second: pa.Array) -> pa.Array:
    """Return the sum of the bits of `NOTES` that apply to each row."""
    total = pa.array(np.zeros(len(per_second), dtype=np.int16))
    applies |= {name: pc.fill_null(pc.equal(per_second, size), False) for name, size in UNITS.items()}
    for name, where in applies.items():
        total = pc.add(total, pc.if_else(where, pa.scalar(NOTES[name], pa.int16()), pa.scalar(0, pa.int16())))
    return total


def cleaned_sequences(raw: pa.Table, file: File, item_ids: pa.Array) -> pa.Table:
    """Return rows of `CLEANED_SEQUENCES`, one a row of `raw` and in its order.

    A user without an id becomes `row-N`, N being the row of the file. Candidates may be missing, as a column or in a
    row; a row that names an unknown item anywhere is set aside.
    """
    return _cleaned_sequences(raw, file, item_ids, _ids)


def cleaned_selections(raw: pa.Table, file: File, item_ids: pa.Array) -> pa.Table:
    """Return the same of rows that name items by title: 9.0 is a film, no number."""
    return _cleaned_sequences(raw, file, item_ids, as_text)


def _cleaned_sequences(raw: pa.Table, file: File, item_ids: pa.Array, read_names: ReadNames) -> pa.Table:
    raw_split = as_text(_column(raw, "split"))
    split = pc.index_in(raw_split, value_set=pa.array(list(SPLITS)))
    split = pc.take(pa.array(list(SPLITS.values())), split)
    history, unknown_history = mapped_lists(_column(raw, "history"), item_ids, read_names)
    candidates, unknown_candidates = mapped_lists(_column(raw, "candidates"), item_ids, read_names)
    target_names = read_names(_column(raw, "target"))
    user_ids, _, no_user = as_ids(_column(raw, "user_id"))
    target = pc.index_in(target_names, value_set=item_ids)
    reason = _first_reason(
        [
            (pc.is_valid(raw[FAULT]), raw[FAULT]),
            (pc.is_null(raw_split), "missing split"),
            (pc.is_null(split), OTHER_SPLIT),
            (no_user, f"user id {NOT_WHOLE}"),
            (pc.equal(pc.fill_null(pc.list_value_length(history), 0), 0), "missing history"),
            (pc.is_null(target_names), "missing target"),
            (pc.is_null(target), "target not in the catalogue"),
            (unknown_history, "item of the history not in the catalogue"),
            (unknown_candidates, "candidate not in the catalogue"),
        ]
    )
    nameless = pc.binary_join_element_wise("row", pc.cast(raw[ROW], pa.string()), "-")
    users = pc.coalesce(user_ids, nameless)
    columns = [split, users, history, target, candidates, *_rejected_columns(raw, file, reason)]
    arrays = [_one(column).cast(field.type) for column, field in zip(columns, CLEANED_SEQUENCES, strict=True)]
    arrays[5] = pa.array([file.name] * raw.num_rows, pa.string())
    arrays[6] = _one(raw[ROW])
    return pa.table(arrays, CLEANED_SEQUENCES)


def distinct(interactions: pa.Table) -> pa.Table:
    """Return the interactions in order of user and time, exact repetitions dropped."""
    if interactions.num_rows == 0:
        return interactions
    users = _one(interactions["user_id"]).dictionary_encode()
    order = pc.rank(users.dictionary, tiebreaker="dense").to_numpy(zero_copy_only=False)
    codes = order[users.indices.to_numpy(zero_copy_only=False)]
    keys = [codes, *(interactions[name].to_numpy() for name in ("time", "tie_break", "item"))]
    rating = pc.fill_null(interactions["rating"], -np.inf).to_numpy()
    sorted_by = np.lexsort([rating, *reversed(keys)])
    same = np.ones(len(codes) - 1, dtype=bool)
    for key in (*keys, rating):
        ordered = key[sorted_by]
        same &= ordered[1:] == ordered[:-1]
    return interactions.take(sorted_by[np.concatenate([[True], ~same])])


def core(
    users: NDArray[np.integer[Any]], items: NDArray[np.integer[Any]], *, min_user: int, min_item: int
) -> NDArray[np.bool_]:
    """Return which interactions are left when too short users and too rare items go, until none is left to go.

    Args:
        users, items: codes from 0, one pair an interaction.
        min_user, min_item: least interactions.
    """
    kept = np.arange(len(users))
    while len(kept):
        enough_users = np.bincount(users[kept]) >= min_user
        enough_items = np.bincount(items[kept]) >= min_item
        stays = enough_users[users[kept]] & enough_items[items[kept]]
        if stays.all():
            break
        kept = kept[stays]
    mask = np.zeros(len(users), dtype=bool)
    mask[kept] = True
    return mask


def sampled_users(users: pa.Array, most: int, seed: int) -> pa.Array:
    """Return at most `most` of these distinct users: those whose seeded hash is smallest, whatever their order."""
    hashes = mix(seed, hash_strings(users))
    return users.take(np.sort(np.argsort(hashes, kind="stable")[:most]))


def _ids(values: pa.Array) -> pa.Array:
    return as_ids(values)[0]


def mapped_lists(
    values: pa.Array | pa.ChunkedArray, item_ids: pa.Array, read_names: ReadNames = _ids
) -> tuple[pa.Array, pa.Array]:
    """Return lists of dense items, and which rows name an item that is not in the catalogue."""
    values = _one(values)
    if not (pa.types.is_list(values.type) or pa.types.is_large_list(values.type)):
        return pa.nulls(len(values), ITEMS), pa.array(np.zeros(len(values), dtype=bool))
    lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
    items = pc.index_in(read_names(values.flatten()), value_set=item_ids)
    owners = np.repeat(np.arange(len(values)), lengths)
    unknown = np.zeros(len(values), dtype=bool)
    unknown[owners[pc.is_null(items).to_numpy(zero_copy_only=False)]] = True
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    nothing = pc.is_null(values)
    lists = pa.ListArray.from_arrays(pa.array(offsets), pc.fill_null(items, -1), mask=nothing)
    return lists, pa.array(unknown)


def _first_reason(reasons: Sequence[tuple[Any, Any]]) -> pa.Array:
    """Return the first reason that applies to each row; null where none does."""
    reason: Any = pa.scalar(None, pa.string())
    for applies, text in reversed(reasons):
        reason = pc.if_else(pc.fill_null(applies, False), text, reason)
    return _one(reason)


def _rejected_columns(raw: pa.Table, file: File, reason: pa.Array) -> list[pa.Array]:
    """Return file, row, reason and content, null where there is no reason. What is only left out keeps no content."""
    gone = pc.is_valid(reason)
    names = pc.if_else(gone, file.name, pa.scalar(None, pa.string()))
    rows = pc.if_else(gone, raw[ROW], pa.scalar(None, pa.int64()))
    aside = np.flatnonzero(
        pc.and_not(gone, pc.is_in(reason, value_set=pa.array(LEFT_OUT))).to_numpy(zero_copy_only=False)
    )
    texts = np.full(len(reason), None, dtype=object)
    texts[aside] = [_content(row) for row in raw.take(aside).to_pylist()]
    return [_one(names), _one(rows), reason, pa.array(texts, pa.string())]


def _content(row: dict[str, Any]) -> str:
    content = row.pop(CONTENT)
    if content is None:
        content = {name: value for name, value in row.items() if name not in (ROW, FAULT)}
    return json.dumps(content, default=str, ensure_ascii=False)[:CONTENT_CHARACTERS]


def _column(table: pa.Table, name: str | None) -> pa.Array:
    if name is None or name not in table.column_names:
        return pa.nulls(table.num_rows, pa.string())
    return _one(table[name])


def _one(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    return values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values


def _require(file: File, names: Sequence[str], name: str, setting: str) -> None:
    if name not in names:
        raise DataError(f"{file.name} has no column {name!r}; {nearest(name, names)}. Set {setting} to the right one")


def _find(named: str, setting: str) -> tuple[pafs.FileSystem, str, list[File], bool]:
    """Return the file system, the folder, the readable files, and whether the folder itself was named."""
    wild = "*[" if "://" in named else "*?["
    steps = named.split("/")
    first_wild = next((place for place, step in enumerate(steps) if any(sign in step for sign in wild)), None)
    fs, path = _file_system("/".join(steps[:first_wild]) if first_wild is not None else named, setting)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise DataError(f"{setting} {named}: there is no such file or folder")
    if info.type == pafs.FileType.File:
        if form_of(path) is None:
            raise DataError(f"{setting} {named}: expected a file that ends in {known_endings()}")
        return fs, path.rsplit("/", 1)[0], [_file(info, path.rsplit("/", 1)[0])], False
    files = _files_below(fs, path)
    if first_wild is not None:
        files = [file for file in files if _matches(file.name.split("/"), steps[first_wild:])]
    if not files:
        others = [info.base_name for info in _all_below(fs, path)][:5]
        raise DataError(
            f"{setting} {named}: no file there ends in {known_endings()}; it has: {', '.join(others) or 'no file'}"
        )
    return fs, path, files, first_wild is None


def _file_system(path: str, setting: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in path:
        return pafs.LocalFileSystem(), str(Path(path or "/").expanduser().resolve())
    try:
        fs, root = pafs.FileSystem.from_uri(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{setting} {path}: expected a path, or a URI that can be opened ({error})") from None
    return fs, root.rstrip("/")


def _all_below(fs: pafs.FileSystem, base: str) -> list[pafs.FileInfo]:
    found = fs.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
    return sorted((info for info in found if info.type == pafs.FileType.File), key=lambda info: info.path)


def _files_below(fs: pafs.FileSystem, base: str) -> list[File]:
    files = [_file(info, base) for info in _all_below(fs, base) if form_of(info.path)]
    visible = [file for file in files if not any(step[0] in "._" for step in file.name.split("/"))]
    return sorted(visible, key=lambda file: file.name)


def _file(info: pafs.FileInfo, base: str) -> File:
    return File(info.path, info.path.removeprefix(base).lstrip("/"), int(info.size or 0), int(info.mtime_ns or 0))


def _is_named(file: File, stem: str) -> bool:
    first = file.name.split("/")[0]
    return first == stem or first.split(".")[0] == stem


def _named(files: Sequence[File], stem: str) -> list[File]:
    found = [file for file in files if _is_named(file, stem) and file.form != "json"]
    tops = sorted({file.name.split("/")[0] for file in found})
    if len(tops) > 1:
        raise DataError(f"which is the table of {stem}: {', '.join(tops)}? Keep one of them there")
    return found


def _selections(fs: pafs.FileSystem, files: Sequence[File]) -> list[File]:
    """Return the files of JSON rows of titles; JSON lines are opened only where the name tells a split."""
    possible = (file for file in files if file.form == "json" or (file.form == "jsonl" and split_of(file) is not None))
    return [file for file in possible if holds_selections(fs, file)]


def _log_files(files: Sequence[File]) -> list[File]:
    """Return the log of a folder without `interactions`: its atomic files, or every file that is no catalogue."""
    atomic = [file for file in files if file.ending == "inter"]
    names = sorted({_stem(file) for file in atomic})
    if len(names) > 1:
        raise DataError(
            f"which is the log: {', '.join(f'{name}.inter' for name in names)}? Name one of them, or its folder"
        )
    others = (file for file in files if file.form != "json" and file.ending != "item")
    return atomic or [file for file in others if not _is_named(file, "items")]


def _catalogue(files: Sequence[File], log: Sequence[File]) -> list[File]:
    """Return the files named `items`, else the atomic file of items that goes with the log."""
    atomic = [file for file in files if file.ending == "item"]
    if log and log[0].ending == "inter":
        atomic = [file for file in atomic if _stem(file) == _stem(log[0])]
    found = _named(files, "items")
    if len(atomic) > 1 and not found:
        raise DataError(f"which is the catalogue: {', '.join(file.name for file in atomic)}? Set ingest.items to one")
    return found or atomic


def _stem(file: File) -> str:
    """Return the NAME of NAME.inter, NAME.train.inter.gz and NAME.item."""
    return file.name.rsplit("/", 1)[-1].split(".")[0]


def _matches(steps: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not steps
    if pattern[0] == "**":
        return any(_matches(steps[place:], pattern[1:]) for place in range(len(steps) + 1))
    return bool(steps) and fnmatch.fnmatchcase(steps[0], pattern[0]) and _matches(steps[1:], pattern[1:])
