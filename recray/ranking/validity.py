"""Free generation as numbers: how often what a model writes is an item, and how often it is the right one.

Two denominators are in use for HR@1. S-DPO divides by all rows. LLaRA divides by its valid rows, so a model that seldom
writes a title is judged on few. Both releases call a row valid if exactly one of its candidates stands somewhere inside
the text, letters' case aside in LLaRA's, which gives 0 where no row is valid. Here a text is an item whole or not at
all, and what can't be known is None.

Sources: https://github.com/chenyuxin1999/S-DPO, evaluate_batch.py; https://github.com/ljy0ustc/LLaRA, calculate_hr1.

Axes: R rows.
"""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recray.errors import ModelError
from recray.ranking.intervals import clustered_means
from recray.ranking.rows import lists
from recray.ranking.summary import Settings
from recray.schema import WRITTEN_ROWS

NO_ITEM = -1
SHOWN_LETTERS = 200  # of a text that is shown as an example


def written_rows(
    table: pa.Table, *, texts: list[str], ended: NDArray[np.bool_], items: NDArray[Any], model: str
) -> pa.Table:
    """Return `schema.WRITTEN_ROWS` of evaluation rows and what a model wrote for each.

    Args:
        table: [R] rows of `schema.EVALUATION`.
        texts: [R] what was written, without the end token.
        ended: [R] whether the end token was written.
        items: [R] the item that each text is, -1 where it is none.
        model: Its name.

    Raises:
        ModelError: if there are not as many texts as rows.
    """
    if not table.num_rows == len(texts) == len(ended) == len(items):
        raise ModelError(f"{model} wrote {len(texts)} texts for {table.num_rows} rows")
    candidates = lists(table["candidates"])
    columns = {
        "model": pa.array([model] * table.num_rows, pa.string()),
        "row": table["row"],
        "user_id": table["user_id"],
        "target": table["target"],
        "text": pa.array(texts, pa.string()),
        "ended": pa.array(ended),
        "item": pa.array(items, pa.int32(), mask=items == NO_ITEM),
        "in_candidates": pa.array([item in own for item, own in zip(items, candidates, strict=True)], pa.bool_()),
    }
    return pa.table(columns).cast(WRITTEN_ROWS)


def validity(written: pa.Table, *, settings: Settings, examples: int = 5) -> dict[str, Any]:
    """Return what rows of `schema.WRITTEN_ROWS` of one model come to: shares of rows as {value, low, high}.

        valid_ratio         texts that are an item of the catalogue
        in_candidates       texts that are one of the row's candidates
        ended               texts with an end token in time
        hr@1                texts that are the target, of all rows
        hr@1 of valid       of the rows whose text is an item
        hr@1 of candidates  of the rows whose text is one of their candidates

    The last two also say of how many `rows`; their value is None where there are none. Intervals resample the users who
    have such rows. `invalid` holds the most frequent texts that are no item, and how often each was written.
    """
    users = written["user_id"].to_numpy(zero_copy_only=False).astype(str)
    item = pc.fill_null(written["item"], NO_ITEM).to_numpy()
    is_item, in_candidates, ended = item != NO_ITEM, _flags(written["in_candidates"]), _flags(written["ended"])
    hit = item == written["target"].to_numpy()
    every = np.ones(len(users), dtype=bool)
    shares = {"valid_ratio": is_item, "in_candidates": in_candidates, "ended": ended, "hr@1": hit}
    subsets = {"hr@1 of valid": is_item, "hr@1 of candidates": in_candidates}
    wrong = written.filter(pa.array(~is_item))
    return {
        "rows": len(users),
        "users": len(np.unique(users)),
        **{name: _share(flags, users, every, settings) for name, flags in shares.items()},
        **{name: {**_share(hit, users, rows, settings), "rows": int(rows.sum())} for name, rows in subsets.items()},
        "invalid": _most_frequent(wrong, examples),
    }


def _share(
    flags: NDArray[np.bool_], users: NDArray[Any], rows: NDArray[np.bool_], settings: Settings
) -> dict[str, float | None]:
    """Return the share of `rows` where there is a flag, with its interval; None where it is not known."""
    if not rows.any():
        return {"value": None, "low": None, "high": None}
    found = clustered_means(
        flags[rows], users[rows], samples=settings.samples, confidence=settings.confidence, seed=settings.seed
    )
    bounds = {name: float(values[0]) for name, values in found._asdict().items()}
    return {name: None if np.isnan(value) else value for name, value in bounds.items()}


def _most_frequent(wrong: pa.Table, count: int) -> list[dict[str, Any]]:
    found = Counter(zip(wrong["text"].to_pylist(), wrong["ended"].to_pylist(), strict=True))
    return [{"text": text[:SHOWN_LETTERS], "ended": ended, "rows": n} for (text, ended), n in found.most_common(count)]


def _flags(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = column.to_numpy(zero_copy_only=False).astype(bool)
    return found
