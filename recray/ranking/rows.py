"""Evaluation rows in, ranked rows out: what every model does alike once it has scored.

Axes: R rows, C candidates of the longest row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recray.errors import DataError, ModelError
from recray.ranking.metrics import best_first, ranks
from recray.ranking.ragged import concatenated, padded
from recray.schema import RANKED_ROWS


class Batch(NamedTuple):
    """What a model may see of some evaluation rows: everything but the target."""

    rows: NDArray[np.int64]
    histories: list[NDArray[Any]]
    candidates: list[NDArray[Any]]


Scorer = Callable[[Batch], list[NDArray[Any]]]


class DotProducts(NamedTuple):
    """Scores by the dot product of a row's user vector and the candidate's item vector."""

    rows: NDArray[np.int64]  # [rows], ascending
    user_vectors: NDArray[np.float32]  # [rows, dim]
    item_vectors: NDArray[np.float32]  # [items, dim]

    @classmethod
    def of(cls, users: pa.Table, items: pa.Table) -> "DotProducts":
        """Take tables of `schema.ROW_VECTORS` and `schema.ITEM_VECTORS`."""
        users, items = users.sort_by("row"), items.sort_by("item")
        return cls(users["row"].to_numpy(), _matrix(users["vector"]), _matrix(items["vector"]))

    def __call__(self, batch: Batch) -> list[NDArray[Any]]:
        """Return the scores of every row's candidates.

        Raises:
            DataError: if a row has no user vector.
        """
        place = np.searchsorted(self.rows, batch.rows)
        known = np.take(self.rows, place, mode="clip") == batch.rows if len(self.rows) else batch.rows < batch.rows
        if not known.all():
            missing = int(batch.rows[~known][0])
            raise DataError(f"row {missing} has no user vector; run `recray users --force users` again")
        vectors = self.user_vectors[place]
        return [self.item_vectors[items] @ vector for vector, items in zip(vectors, batch.candidates, strict=True)]


def refuse_faulty(table: pa.Table, num_items: int, name: str) -> None:
    """Raise `DataError` for the first row that no model can be judged by, naming it and its fault.

    Faults are an item that the catalogue lacks, candidates that do not hold the target exactly once, and a missing
    value. An empty history is none: every model has an answer to it.

    Args:
        table: rows of `schema.EVALUATION`, or those of its columns that are used.
        num_items: items of the catalogue.
        name: of the table, for the message.
    """
    for column in table.column_names:
        if table[column].null_count:
            raise _fault(table, pc.index(table[column].is_null(), True).as_py(), name, f"it has no {column}")
    target = table["target"].to_numpy()
    candidates, lengths = flat_lists(table["candidates"])
    _refuse_unknown(table, "target", target, np.ones_like(target), num_items, name)
    _refuse_unknown(table, "candidates", candidates, lengths, num_items, name)
    _refuse_unknown(table, "history", *flat_lists(table["history"]), num_items, name)
    place = np.repeat(np.arange(table.num_rows), lengths)
    times = np.bincount(place[candidates == target[place]], minlength=table.num_rows)
    if (times != 1).any():
        wrong = int((times != 1).argmax())
        raise _fault(table, wrong, name, f"its candidates hold the target {times[wrong]} times, expected once")


def _refuse_unknown(
    table: pa.Table, column: str, items: NDArray[Any], lengths: NDArray[Any], num_items: int, name: str
) -> None:
    known = (items >= 0) & (items < num_items)  # not where one is missing, which is NaN here
    if not known.all():
        first = int(known.argmin())
        place = int(np.searchsorted(np.cumsum(lengths), first, side="right"))
        told = f"item {items[first]} of its {column} is unknown, the catalogue has items 0 to {num_items - 1}"
        raise _fault(table, place, name, told)


def _fault(table: pa.Table, place: int, name: str, told: str) -> DataError:
    row = table["row"][place].as_py()
    return DataError(f"{name}, row {row}: {told}; make the table again with `recray sequences --force sequences`")


def batch_of(table: pa.Table) -> Batch:
    """Return the rows of a `schema.EVALUATION` table without their targets."""
    return Batch(table["row"].to_numpy(), lists(table["history"]), lists(table["candidates"]))


def rank_rows(table: pa.Table, scores: list[NDArray[Any]], *, model: str, keep: int) -> pa.Table:
    """Return `schema.RANKED_ROWS` of evaluation rows and the scores of their candidates.

    Raises:
        DataError: if a row's candidates don't hold its target exactly once.
        ModelError: if scores are missing, too many, or NaN; names model and row.
    """
    if table.num_rows == 0:
        return RANKED_ROWS.empty_table()
    rows, target = table["row"].to_numpy(), table["target"].to_numpy()
    items, lengths = concatenated(lists(table["candidates"]))
    flat, scored = concatenated(scores)
    if not np.array_equal(lengths, scored):
        raise ModelError(
            f"{model} returned {scored.sum()} scores for the {lengths.sum()} candidates of {len(rows)} rows"
        )
    candidates, valid = padded(items, lengths, fill=-1)
    is_target = (candidates == target[:, None]) & valid
    times = is_target.sum(axis=1)
    if (times != 1).any():
        row = int(np.flatnonzero(times != 1)[0])
        raise DataError(f"row {rows[row]}: its candidates hold the target {times[row]} times; expected once")
    table_of_scores, _ = padded(flat, lengths, fill=0.0)
    if np.isnan(table_of_scores).any():
        row = int(np.flatnonzero(np.isnan(table_of_scores).any(axis=1))[0])
        raise ModelError(f"{model} scores a candidate of row {rows[row]} NaN; its weights are broken, fit it again")
    column = is_target.argmax(axis=1)
    best = best_first(table_of_scores, column, valid, keep)
    columns = {
        "model": pa.array([model] * len(rows)),
        "row": table["row"],
        "user_id": table["user_id"],
        "target": table["target"],
        "num_candidates": lengths.astype(np.int32),
        "rank": ranks(table_of_scores, column, valid).astype(np.int32),
        "ranked": _list_array(np.take_along_axis(candidates, best, axis=1), best >= 0),
    }
    return pa.table(columns).cast(RANKED_ROWS)


def target_ranks(
    scores: list[NDArray[Any]], candidates: list[NDArray[Any]], targets: NDArray[Any]
) -> NDArray[np.int64]:
    """Return the rank of each row's target among its candidates, ties against us; [R].

    Raises:
        ValueError: if a row has no target among its candidates, or a score is NaN; names the row's place.
    """
    items, lengths = concatenated(candidates)
    of_candidates, valid = padded(items, lengths, fill=-1)
    table, _ = padded(concatenated(scores)[0], lengths, fill=0.0)
    is_target = (of_candidates == targets[:, None]) & valid
    if not is_target.any(axis=1).all():
        row = int(np.flatnonzero(~is_target.any(axis=1))[0])
        raise ValueError(f"row {row}: its candidates do not hold its target, {targets[row]}")
    return ranks(table, is_target.argmax(axis=1), valid)


def best_candidates(
    scores: list[NDArray[Any]], candidates: list[NDArray[Any]], targets: NDArray[Any], keep: int
) -> NDArray[np.int64]:
    """Return the items ranked first in every row, best first, with ties against the target; [R, keep], -1 where fewer.

    The target's place agrees with `target_ranks`.
    """
    items, lengths = concatenated(candidates)
    of_candidates, valid = padded(items, lengths, fill=-1)
    table, _ = padded(concatenated(scores)[0], lengths, fill=0.0)
    columns = best_first(table, ((of_candidates == targets[:, None]) & valid).argmax(axis=1), valid, keep)
    found: NDArray[np.int64] = np.where(columns >= 0, np.take_along_axis(of_candidates, columns, axis=1), -1)
    return found.astype(np.int64)


def lists(column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """Return a list column as one array a row."""
    flat, lengths = flat_lists(column)
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def flat_lists(column: pa.ChunkedArray) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return (values end to end, length of each list) of a list column."""
    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    return pc.list_flatten(column).to_numpy(), lengths


def _matrix(column: pa.ChunkedArray) -> NDArray[np.float32]:
    flat, lengths = flat_lists(column)
    if len(np.unique(lengths)) > 1:
        raise DataError(f"vectors of {lengths.min()} to {lengths.max()} numbers; expected one length")
    matrix: NDArray[np.float32] = flat.astype(np.float32).reshape(len(lengths), lengths[:1].sum())
    return matrix


def _list_array(table: NDArray[Any], valid: NDArray[np.bool_]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(valid.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, table[valid].astype(np.int32))
