"""Logs and catalogue in, one schema out: Ray Data reads the files, row by row accounted for.

    files ── read and clean ──▶ usable rows ── by user: no repetitions ──▶ k-core, sample of users ──▶ interactions
                          └───▶ rejected rows

read = kept + rejected + below min_rating + repeated + outside the k-core + of users not sampled; asserted.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import ray
import ray.data
from pyarrow import fs as pafs

from recray.config import Ingest
from recray.data.items import items_of_titles, read_items
from recray.data.logs import (
    BELOW_RATING,
    CLEANED_SEQUENCES,
    LEFT_OUT,
    NOTES,
    OTHER_SPLIT,
    PUBLISHED,
    TRUTH,
    LogColumns,
    Source,
    cleaned_interactions,
    cleaned_selections,
    cleaned_sequences,
    core,
    distinct,
    log_columns,
    mapped_lists,
    resolve,
    sampled_users,
)
from recray.data.other_ids import read_other_ids
from recray.data.reading import DECODED, File, Piece, column_names, first_decoded, nearest, pieces_of, read_piece
from recray.data.selections import read_selections, titles_of
from recray.data.synthetic import generate
from recray.data.values import UNITS
from recray.errors import DataError
from recray.schema import INTERACTIONS, REJECTED
from recray.stages.flow import Job

logger = logging.getLogger(__name__)

ROWS_PER_PARTITION = 2_000_000
Reader = Callable[[pafs.FileSystem, Piece, Sequence[str]], Iterator[pa.Table]]
SEQUENCE_COLUMNS = ("split", "user_id", "history", "target", "candidates")


class Kept(NamedTuple):
    """Which users and items stay, after the k-core and the sample."""

    users: pa.Array
    items: Any  # bool, one an item
    num_core: int  # interactions inside the k-core
    num_items_met: int


def run(job: Job) -> None:
    """Write the tables of `ingest`, and `published` and `truth` where the data has them."""
    part: Ingest = job.part
    if part.data is None:
        part = _synthetic(job)
    source = resolve(part)
    items = _items(job, part, source)
    item_ids = items["item_id"].combine_chunks()
    told = "ingest: %d items, %d log files, %d files of sequences, %d of JSON rows"
    logger.info(told, len(items), len(source.interactions), len(source.sequences), len(source.selections))
    columns = {
        file: log_columns(file, column_names(source.fs, file), part.columns, part.min_rating)
        for file in source.interactions
    }
    clocks = {each.clock for each in columns.values()}
    if len(clocks) > 1:
        raise DataError("some files of the log have timestamps, others positions; name one kind by ingest.columns.time")
    clean = partial(_clean_log, columns=columns, min_rating=part.min_rating, seed=job.seed)
    log = _read(source.fs, source.interactions, _names(columns), clean, item_ids)
    published = _read_published(source, item_ids)
    _tell_mended(job, part, source, log)
    job.out.write_table("items", items)
    job.out.write_table("other_ids", read_other_ids(source.items_fs, source.items, part.columns, item_ids))
    _write_rejected(job, [each for each in (log, published) if each is not None])
    users = _write_interactions(job, part, log, num_items=len(items))
    _write_published(job, part, published, users)
    if job.part.data is None:
        _write_truth(job, item_ids)
    job.out.facts["clock"] = clocks == {True}
    job.out.facts["synthetic"] = job.part.data is None


def _synthetic(job: Job) -> Ingest:
    """Generate logs into the stage's folder, where every node can read them, and return settings that name them."""
    part: Ingest = job.part
    with tempfile.TemporaryDirectory(prefix="recray-") as folder:
        generate(Path(folder), part.synthetic, job.seed)
        job.out.write_folder("logs", Path(folder))
    uri = job.workspace.uri
    return part.model_copy(update={"data": "/".join([uri.rstrip("/"), ".partial", "ingest", "logs"])})


def _items(job: Job, part: Ingest, source: Source) -> pa.Table:
    """Return the catalogue: of its files, or of the titles of the JSON rows where there is no file."""
    if source.items:
        return read_items(source.items_fs, source.items, part.columns, job.seed)
    items = items_of_titles(titles_of(source.fs, source.selections), job.seed)
    told = "ingest: the catalogue is made of the %d titles in the rows; items that share a title are one item"
    logger.info(told, len(items))
    job.out.facts["catalogue_of_titles"] = True
    return items


def _read_published(source: Source, item_ids: pa.Array) -> ray.data.Dataset | None:
    if source.selections:
        read: Reader = partial(_read_selections, known=frozenset(item_ids.to_pylist()))
        return _read(source.fs, source.selections, (), cleaned_selections, item_ids, read)
    return _read(source.fs, _checked(source), SEQUENCE_COLUMNS, cleaned_sequences, item_ids)


def _read_selections(
    fs: pafs.FileSystem, piece: Piece, columns: Sequence[str], *, known: frozenset[str]
) -> Iterator[pa.Table]:
    del columns  # a row is read as a whole
    return read_selections(fs, piece.file, known)


def _names(columns: dict[File, LogColumns]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for each in columns.values() for name in each.names))


def _checked(source: Source) -> tuple[File, ...]:
    for file in source.sequences:
        names = column_names(source.fs, file)
        for name in ("split", "history", "target"):
            if name not in names:
                raise DataError(f"published sequences {file.name} have no column {name!r}; {nearest(name, names)}")
    return source.sequences


def _clean_log(
    raw: pa.Table,
    file: File,
    item_ids: pa.Array,
    *,
    columns: dict[File, LogColumns],
    min_rating: float | None,
    seed: int,
) -> pa.Table:
    return cleaned_interactions(raw, file, columns[file], item_ids, min_rating=min_rating, seed=seed)


def _read(
    fs: pafs.FileSystem,
    files: tuple[File, ...],
    columns: tuple[str, ...],
    clean: Callable[[pa.Table, File, pa.Array], pa.Table],
    item_ids: pa.Array,
    read_rows: Reader = read_piece,
) -> ray.data.Dataset | None:
    """Return the cleaned rows of all files, one task a piece; None without files."""
    if not files:
        return None
    pieces = [piece for file in files for piece in pieces_of(fs, file)]
    if not pieces:
        raise DataError(f"{', '.join(file.name for file in files[:5])}: the log is empty")
    catalogue = ray.put(item_ids)

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        known = ray.get(catalogue)
        for place in batch["id"]:
            piece: Piece = pieces[int(place)]
            for raw in read_rows(fs, piece, columns):
                yield clean(raw, piece.file, known)

    places = ray.data.range(len(pieces), override_num_blocks=len(pieces))
    cleaned = places.map_batches(read, batch_size=1, batch_format="numpy")
    return cleaned.materialize()


def _write_rejected(job: Job, parts: list[ray.data.Dataset]) -> None:
    """Write what was set aside; count all rows by reason."""
    path = job.out.path("rejected")
    total = 0
    for part in parts:
        rejected = part.map_batches(_set_aside, batch_format="pyarrow", batch_size=None).materialize()
        if rejected.count():
            rejected.write_parquet(path, filesystem=job.out.fs)
            total += rejected.count()
    if total == 0:
        job.out.write_table("rejected", REJECTED.empty_table())
    job.out.counts["rejected"] = total


def _tell_mended(job: Job, part: Ingest, source: Source, log: ray.data.Dataset | None) -> None:
    """State what was read in a way that a user should know of: units of time, ids, text that is not UTF-8."""
    notes = _notes(log) if log is not None else {}
    units = {name: notes[name] for name in UNITS if notes.get(name)}
    if len(units) > 1:
        told = ", ".join(f"{count:,} in {name}" for name, count in units.items())
        logger.warning("ingest: the times of the log mix units, each row was read by its own: %s", told)
    if part.columns.time_unit != "auto" and log is not None and not units:
        logger.warning("ingest: ingest.columns.time_unit has no effect: no time of the log is a number")
    ids = {name: notes.get(name, 0) for name in ("user_id", "item_id")}
    if any(ids.values()):
        told = ", ".join(f"{count:,} rows by {name}" for name, count in ids.items() if count)
        logger.info("ingest: ids written as decimals are whole numbers, 1.0 is 1: %s", told)
    files = [*((source.items_fs, file) for file in source.items)]
    if notes.get(DECODED):
        files += [(source.fs, file) for file in source.interactions]
    decoded = {file.name: found for fs, file in files if (found := first_decoded(fs, file)) is not None}
    for name, (row, text) in decoded.items():
        logger.warning("ingest: %s is not UTF-8, it was read as cp1252; the first such row is %d: %s", name, row, text)
    job.out.facts |= {"time_units": units, "mended_ids": ids, "read_as_cp1252": sorted(decoded)}


def _notes(log: ray.data.Dataset) -> dict[str, int]:
    """Return to how many usable rows each of `NOTES` applies."""
    counts = dict.fromkeys(NOTES, 0)
    for batch in log.map_batches(_count_notes, batch_format="pyarrow", batch_size=None).iter_batches(
        batch_format="pyarrow", batch_size=None
    ):
        for value, rows in zip(batch["notes"].to_pylist(), batch["rows"].to_pylist(), strict=True):
            for name, bit in NOTES.items():
                counts[name] += rows if value & bit else 0
    return counts


def _count_notes(rows: pa.Table) -> pa.Table:
    counts = pc.value_counts(rows["notes"])
    return pa.table({"notes": pc.struct_field(counts, "values"), "rows": pc.struct_field(counts, "counts")})


def _set_aside(rows: pa.Table) -> pa.Table:
    aside = pc.and_(pc.is_valid(rows["reason"]), pc.invert(pc.is_in(rows["reason"], value_set=pa.array(LEFT_OUT))))
    return rows.filter(aside).select(REJECTED.names)


def _reasons(cleaned: ray.data.Dataset) -> dict[str, int]:
    """Return how many rows left for each reason; usable ones under the empty one."""
    counts: dict[str, int] = {}
    for batch in cleaned.map_batches(_count_reasons, batch_format="pyarrow", batch_size=None).iter_batches(
        batch_format="pyarrow", batch_size=None
    ):
        for reason, rows in zip(batch["reason"].to_pylist(), batch["rows"].to_pylist(), strict=True):
            counts[reason] = counts.get(reason, 0) + rows
    return counts


def _count_reasons(rows: pa.Table) -> pa.Table:
    counts = pc.value_counts(pc.fill_null(rows["reason"], ""))
    return pa.table({"reason": pc.struct_field(counts, "values"), "rows": pc.struct_field(counts, "counts")})


def _usable(rows: pa.Table, names: list[str]) -> pa.Table:
    return rows.filter(pc.is_null(rows["reason"])).select(names)


def _write_interactions(job: Job, part: Ingest, log: ray.data.Dataset | None, *, num_items: int) -> pa.Array | None:
    """Write `interactions` with its account; return the users that stayed, or None without a log."""
    if log is None:
        job.out.write_table("interactions", INTERACTIONS.empty_table())
        return None
    reasons = _reasons(log)
    usable = reasons.pop("", 0)
    if usable == 0:
        raise DataError(_nothing_usable(reasons))
    partitions = -(-usable // ROWS_PER_PARTITION)
    rows = log.map_batches(_usable, fn_args=(INTERACTIONS.names,), batch_format="pyarrow", batch_size=None)
    rows = rows.repartition(partitions, keys=["user_id"]) if partitions > 1 else rows.repartition(1)
    unique = rows.map_batches(distinct, batch_format="pyarrow", batch_size=None).materialize()
    num_distinct = unique.count()
    kept = _kept(unique, part, num_items=num_items, seed=job.seed)
    final = unique.map_batches(_of_kept, fn_args=(kept,), batch_format="pyarrow", batch_size=None).materialize()
    num_final = final.count()
    below = reasons.pop(BELOW_RATING, 0)
    account = {
        "kept": num_final,
        "rejected": sum(reasons.values()),
        "below_min_rating": below,
        "repeated": usable - num_distinct,
        "outside_core": num_distinct - kept.num_core,
        "of_users_not_sampled": kept.num_core - num_final,
    }
    _require_users(len(kept.users), account)
    read = log.count()
    assert read == sum(account.values()), f"read {read} rows, but can account for {account}"
    final.write_parquet(job.out.path("interactions"), filesystem=job.out.fs)
    job.out.counts["interactions"] = num_final
    job.out.facts |= {
        "rows": {"read": read, **account},
        "rejected_by_reason": reasons,
        "users": len(kept.users),
        "items": num_items,
        "items_met": kept.num_items_met,
    }
    return kept.users


def _nothing_usable(reasons: dict[str, int]) -> str:
    if not reasons:
        return "the log is empty: no file of it holds a row"
    told = ", ".join(f"{rows:,} {reason}" for reason, rows in sorted(reasons.items(), key=lambda each: -each[1]))
    hint = ""
    if max(reasons, key=lambda reason: reasons[reason]) == "impossible timestamp":
        hint = (
            "; recray reads ISO 8601, and numbers since 1970 in the unit in which they lie in 1995 to 2100: set "
            "ingest.columns.time_unit for others"
        )
    return f"no row of the log can be used: {told}{hint}"


def _require_users(num_users: int, account: dict[str, int]) -> None:
    if num_users < 2:
        told = ", ".join(f"{name} {rows:,}" for name, rows in account.items() if rows)
        raise DataError(
            f"the log is of {num_users} user{'s' * (num_users != 1)}, expected at least two (rows: {told}); "
            "name more data, or lower ingest.min_rating and the k-core"
        )


def _kept(unique: ray.data.Dataset, part: Ingest, *, num_items: int, seed: int) -> Kept:
    """Decide on the driver, over two integers an interaction, which users and items stay."""
    names: list[pa.Array] = []
    codes: list[Any] = []
    items: list[Any] = []
    num_users = 0
    # After the partition by user no user is in two batches, so codes can be counted up from batch to batch.
    for batch in unique.iter_batches(batch_format="pyarrow", batch_size=None):
        users = batch["user_id"].combine_chunks().dictionary_encode()
        names.append(users.dictionary)
        codes.append(users.indices.to_numpy(zero_copy_only=False).astype(np.int32) + np.int32(num_users))
        items.append(batch["item"].to_numpy())
        num_users += len(users.dictionary)
    all_users, all_codes, all_items = pa.concat_arrays(names), np.concatenate(codes), np.concatenate(items)
    inside = core(all_codes, all_items, min_user=part.min_user_interactions, min_item=part.min_item_interactions)
    item_stays = np.bincount(all_items[inside], minlength=num_items) > 0
    stays = np.flatnonzero(np.bincount(all_codes[inside], minlength=num_users) > 0)
    left = all_users.take(stays)
    if part.max_users is not None:
        left = sampled_users(left, part.max_users, seed)
    return Kept(left, item_stays, int(inside.sum()), int(item_stays.sum()))


def _of_kept(rows: pa.Table, kept: Kept) -> pa.Table:
    stays = pc.is_in(rows["user_id"], value_set=kept.users).to_numpy()
    return rows.filter(stays & kept.items[rows["item"].to_numpy()])


def _write_published(job: Job, part: Ingest, published: ray.data.Dataset | None, users: pa.Array | None) -> None:
    """Write `published` and its account, with rows numbered in the order of the file."""
    if published is None:
        return
    reasons = _reasons(published)
    usable = reasons.pop("", 0)
    if usable == 0:
        raise DataError(f"published sequences: {_nothing_usable(reasons)}")
    batches = published.map_batches(
        _usable, fn_args=(CLEANED_SEQUENCES.names,), batch_format="pyarrow", batch_size=None
    ).iter_batches(batch_format="pyarrow", batch_size=None)
    rows = pa.concat_tables(list(batches)).sort_by([("file", "ascending"), ("row", "ascending")])
    if part.max_users is not None:
        chosen = users if users is not None else sampled_users(pc.unique(rows["user_id"]), part.max_users, job.seed)
        rows = rows.filter(pc.is_in(rows["user_id"], value_set=chosen))
    rows = rows.drop_columns(["file", "row"]).add_column(0, "row", pa.array(np.arange(rows.num_rows)))
    job.out.write_table("published", rows.select(PUBLISHED.names).cast(PUBLISHED))
    account = {
        "kept": rows.num_rows,
        "rejected": sum(reasons.values()) - reasons.get(OTHER_SPLIT, 0),
        "of_other_splits": reasons.pop(OTHER_SPLIT, 0),
        "of_users_not_sampled": usable - rows.num_rows,
    }
    job.out.facts["published_users"] = len(pc.unique(rows["user_id"]))
    job.out.facts |= _odd_candidates(rows)
    read = published.count()
    assert read == sum(account.values()), f"read {read} published rows, but can account for {account}"
    job.out.facts |= {"published_rows": {"read": read, **account}, "published_rejected_by_reason": reasons}


def _odd_candidates(rows: pa.Table) -> dict[str, int]:
    """Return how many lists hold an item more than once, which is ranked once, and how many get their target put in."""
    lists = rows.filter(pc.is_valid(rows["candidates"]))
    counts = pc.list_value_length(lists["candidates"]).to_numpy()
    owners = np.repeat(np.arange(len(counts)), counts)
    items = pc.list_flatten(lists["candidates"]).to_numpy()
    distinct_items = np.unique(np.stack([owners, items]), axis=1)[0]
    holds = np.unique(owners[items == lists["target"].to_numpy()[owners]])
    return {
        "published_rows_with_a_candidate_twice": int(
            (np.bincount(distinct_items, minlength=len(counts)) < counts).sum()
        ),
        "published_rows_without_their_target": len(counts) - len(holds),
    }


def _write_truth(job: Job, item_ids: pa.Array) -> None:
    """Write which items a synthetic user would like but never met, as dense items."""
    truth = pads.dataset(job.out.path("logs", "truth.parquet"), filesystem=job.out.fs).to_table()
    liked, _ = mapped_lists(truth["liked"], item_ids)
    job.out.write_table("truth", pa.table([truth["user_id"].cast(pa.string()), liked], schema=TRUTH))
