"""Alignment examples as memory-mapped Arrow shards, so that any rows can be read at once in bounded memory.

A shard is one Arrow IPC file of one record batch: taking 64 scattered rows of one batch costs a fraction of a
millisecond, of several batches many times that.

Axes:
    R  rows taken
    N  negatives
    K  candidates: the positive, then the negatives
    D  width of user vectors
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from recray.errors import DataError

SHARD_ROWS = 65536


class Examples(NamedTuple):
    """Rows of alignment examples."""

    row: Int[ndarray, " R"]
    user: Int[ndarray, " R"]  # number of the row's user
    histories: list[Int[ndarray, " H"]]
    items: Int[ndarray, "R K"]  # the positive, then the negatives
    reference: Float[ndarray, "R K"]  # nats
    vector: Float[ndarray, "R D"]
    met: list[Int[ndarray, " M"]]  # sorted: what the row's user met in training
    # Where confidences are cross-fitted: the fold of the row's user, and its vector by the model fitted without it.
    fold: Int[ndarray, " R"] | None = None
    judge_vector: Float[ndarray, "R D"] | None = None


def join_examples(
    examples: pa.Table,
    negatives: pa.Table,
    reference: pa.Table | None,
    vectors: pa.Table,
    met: Mapping[str, ndarray],
    crossfit: pa.Table | None = None,
) -> pa.Table:
    """Return one table of examples with all that is known of each, joined by row and, for scores, by item.

    Args:
        examples: recray.schema.EXAMPLES.
        negatives: recray.schema.NEGATIVES.
        reference: recray.schema.REFERENCE; may hold more items a row than are drawn here, in any order. None: the
            scores are made in training, and stand as NaN until then.
        vectors: recray.schema.ROW_VECTORS.
        met: For each user id, the sorted items met in training.
        crossfit: recray.schema.CROSSFIT_ROWS, where users.folds is 2.

    Raises:
        DataError: if a row lacks its negatives, vector or a reference score, or has its positive among the negatives,
            naming it.
    """
    examples = examples.sort_by("row")
    rows = examples["row"].to_numpy()
    drawn = aligned(rows, negatives, "negatives")
    vector = matrix(aligned(rows, vectors, "user vectors")["vector"])
    negative = matrix(drawn["negatives"])
    items = np.column_stack([examples["target"].to_numpy(), negative]).astype(np.int32)
    _refuse_own_positive(rows, items)
    if reference is None:
        scores = np.full(items.shape, np.nan, dtype=np.float32)
    else:
        scores = _scores_of(rows, items, aligned(rows, reference, "reference scores"))
    user_ids = examples["user_id"].combine_chunks().dictionary_encode()
    known = [met[user] for user in user_ids.dictionary.to_pylist()]
    codes = user_ids.indices.to_numpy().astype(np.int64)
    judged = {} if crossfit is None else _judged(aligned(rows, crossfit, "cross-fitted user vectors"))
    return pa.table(
        {
            "row": rows,
            "user": codes,
            "history": examples["history"].combine_chunks(),
            "items": _fixed(items),
            "reference": _fixed(scores),
            "vector": _fixed(vector.astype(np.float32)),
            "met": _ragged([known[code] for code in codes]),
            **judged,
        }
    )


def write_shards(folder: Path, table: pa.Table, *, shard_rows: int = SHARD_ROWS) -> int:
    """Write the joined table as shards; return how many. Row r must be the r-th of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, -(-int(table.num_rows) // shard_rows))
    for number in range(count):
        part = table.slice(number * shard_rows, shard_rows).combine_chunks()
        with (
            pa.OSFile(str(folder / f"{number:06d}.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, part.schema) as out,
        ):
            for batch in part.to_batches():
                out.write_batch(batch)
    return count


class ExampleShards:
    """Reads scattered rows from the shards of a folder."""

    def __init__(self, folder: Path, *, shard_rows: int = SHARD_ROWS) -> None:
        self._shard_rows = shard_rows
        self._shards = [
            pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in sorted(folder.glob("*.arrow"))
        ]
        self.num_rows = sum(shard.num_rows for shard in self._shards)
        self.crossfitted = bool(self._shards) and "fold" in self._shards[0].column_names

    def take(self, rows: Int[ndarray, " R"]) -> Examples:
        """Return these rows, in this order; a row may be asked for twice."""
        shard = rows // self._shard_rows
        pieces, places = [], []
        for number in np.unique(shard).tolist():
            inside = np.flatnonzero(shard == number)
            pieces.append(self._shards[number].take(pa.array(rows[inside] - number * self._shard_rows)))
            places.append(inside)
        back = np.argsort(np.concatenate(places), kind="stable")
        table = pa.concat_tables(pieces).take(pa.array(back)).combine_chunks()
        return Examples(
            row=table["row"].to_numpy().copy(),
            user=table["user"].to_numpy().copy(),
            histories=list_arrays(table["history"]),
            items=matrix(table["items"]),
            reference=matrix(table["reference"]),
            vector=matrix(table["vector"]),
            met=list_arrays(table["met"]),
            fold=table["fold"].to_numpy().copy() if "fold" in table.column_names else None,
            judge_vector=matrix(table["judge_vector"]) if "judge_vector" in table.column_names else None,
        )


def met_in_training(histories: pa.Table, examples: pa.Table) -> dict[str, Int[ndarray, " M"]]:
    """Return for each user id the sorted items that any of the user's training rows holds."""
    users, items = [], []
    for table, column in ((histories, "items"), (examples, "history")):
        lists = table[column].combine_chunks()
        users.append(table["user_id"].combine_chunks().take(pc.list_parent_indices(lists)))
        items.append(lists.flatten())
    users.append(examples["user_id"].combine_chunks())
    items.append(examples["target"].combine_chunks())
    pairs = pa.table({"user": pa.concat_arrays(users), "item": pa.concat_arrays(items)})
    grouped = pairs.group_by("user").aggregate([("item", "distinct")])
    found = list_arrays(grouped["item_distinct"])
    return {user: np.sort(own) for user, own in zip(grouped["user"].to_pylist(), found, strict=True)}


def sample_of(table: pa.Table, count: int, seed: int) -> pa.Table:
    """Return at most `count` seeded rows of a table, by rising row number."""
    table = table.sort_by("row")
    if table.num_rows <= count:
        return table
    return table.take(pa.array(np.sort(np.random.default_rng(seed).choice(table.num_rows, count, replace=False))))


def aligned(rows: Int[ndarray, " R"], table: pa.Table, what: str) -> pa.Table:
    """Return the table's rows in the order of `rows`."""
    have = table["row"].to_numpy()
    order = np.argsort(have, kind="stable")
    place = np.searchsorted(have, rows, sorter=order)
    inside = place < have.size
    missing = ~inside
    missing[inside] = have[order[place[inside]]] != rows[inside]
    if missing.any():
        raise DataError(
            f"{what}: row {rows[missing][0]} is missing ({missing.sum()} of {rows.size} rows are); run that stage again"
        )
    return table.take(pa.array(order[place])).combine_chunks()


def _judged(crossfit: pa.Table) -> dict[str, ndarray | pa.Array]:
    """Return the columns that only cross-fitted confidences need."""
    vector = matrix(crossfit["vector"]).astype(np.float32)
    return {"fold": crossfit["fold"].to_numpy(), "judge_vector": _fixed(vector)}


def _refuse_own_positive(rows: Int[ndarray, " R"], items: Int[ndarray, "R K"]) -> None:
    same = (items[:, 1:] == items[:, :1]).any(axis=1)
    if same.any():
        row = int(np.argmax(same))
        raise DataError(
            f"negatives: row {rows[row]} has its own positive, item {items[row, 0]}, among its negatives ({same.sum()} "
            f"of {rows.size} rows do): nothing is learnt from preferring an item to itself; run `negatives` again"
        )


def find_scores(
    rows: Int[ndarray, " R"], items: Int[ndarray, "R K"], reference: pa.Table
) -> tuple[Float[ndarray, "R K"], Bool[ndarray, "R K"]]:
    """Return the score of each (row, item), found by both and never by position, and whether there is one (else NaN).

    Args:
        rows: Row ids.
        items: Those asked for.
        reference: recray.schema.REFERENCE; rows in any order, and as often as they like with other items.
    """
    lists = reference["items"].combine_chunks()
    have_item = list_values(lists)
    if not have_item.size:
        return np.full(items.shape, np.nan, dtype=np.float32), np.zeros(items.shape, dtype=bool)
    owner = reference["row"].to_numpy()[pc.list_parent_indices(lists).to_numpy()]
    width = max(int(items.max(initial=0)), int(have_item.max())) + 1
    have = owner * width + have_item
    want = rows[:, None] * width + items
    order = np.argsort(have, kind="stable")
    place = order[np.minimum(np.searchsorted(have, want, sorter=order), have.size - 1)]
    found = have[place] == want
    scores = list_values(reference["scores"].combine_chunks())[place]
    return np.where(found, scores, np.nan).astype(np.float32), found


def _scores_of(rows: Int[ndarray, " R"], items: Int[ndarray, "R K"], reference: pa.Table) -> Float[ndarray, "R K"]:
    """Return the reference score of each (row, item); raise `DataError` naming one that is missing."""
    scores, found = find_scores(rows, items, reference)
    if not found.all():
        row, column = np.argwhere(~found)[0]
        raise DataError(
            f"reference scores: row {rows[row]} has none for item {items[row, column]}; run `reference` again"
        )
    return scores


def matrix(column: pa.ChunkedArray) -> ndarray:
    """Return a column of equally long lists as a matrix."""
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = lists.chunk(0) if lists.num_chunks else pa.array([], column.type)
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    rows: ndarray = flat.reshape(len(lists), -1).copy() if len(lists) else flat.reshape(0, 0)
    return rows


def list_values(lists: pa.ListArray) -> ndarray:
    """Return the values of all lists, one after the other."""
    values: ndarray = lists.flatten().to_numpy(zero_copy_only=False)
    return values


def list_arrays(column: pa.ChunkedArray) -> list[ndarray]:
    """Return a column of ragged lists as arrays."""
    lists = column.combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    ends = np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False))
    return np.split(flat, ends[:-1]) if len(lists) else []


def _fixed(matrix: ndarray) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.reshape(-1)), matrix.shape[1])


def _ragged(arrays: list[ndarray]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([array.size for array in arrays])]).astype(np.int32)
    flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.astype(np.int32)))
