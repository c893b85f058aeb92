"""Which columns of a catalogue are other ids: distinct whole numbers, nearly all given, in any form of file."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from recray.config import Columns, Ingest
from recray.data.logs import resolve
from recray.data.other_ids import read_other_ids
from recray.schema import OTHER_IDS

ITEMS = 200


def catalogue() -> dict[str, list[Any]]:
    numbers = list(range(ITEMS))
    return {
        "item_id": numbers,
        "title": [f"T{n}" for n in numbers],
        "artist": [10 * n for n in numbers],
        "nearly": [None, None, *numbers[2:]],
        "gaps": [None] * 3 + numbers[3:],
        "year": [1990 + n % 20 for n in numbers],
        "code": [f"B{n}" for n in numbers],
        "price": [n + 0.5 for n in numbers],
        "whole": [float(n) for n in numbers],
    }


def read(folder: Path, columns: Columns | None = None) -> dict[str, dict[int, int]]:
    (folder / "interactions.csv").write_text("user_id,item_id,timestamp\na,1,5\n")
    source = resolve(Ingest(data=str(folder)))
    ids = pa.array([str(number) for number in reversed(range(ITEMS))])  # the order of items is not that of the file
    table = read_other_ids(pafs.LocalFileSystem(), source.items, columns or Columns(), ids)
    assert table.schema.equals(OTHER_IDS)
    found: dict[str, dict[int, int]] = {}
    for row in table.to_pylist():
        found.setdefault(row["column"], {})[row["item"]] = row["number"]
    return found


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_distinct_whole_numbers_are_ids(tmp_path: Path, form: str) -> None:
    table = pa.table(catalogue())
    if form == "parquet":
        pq.write_table(table, tmp_path / "items.parquet")
    else:
        pacsv.write_csv(table, tmp_path / "items.csv")
    found = read(tmp_path)
    assert set(found) == {"artist", "nearly", "whole"}
    assert found["artist"] == {ITEMS - 1 - n: 10 * n for n in range(ITEMS)}
    assert len(found["nearly"]) == ITEMS - 2


def test_what_is_named_is_no_other_id(tmp_path: Path) -> None:
    pq.write_table(pa.table(catalogue()).select(["item_id", "title", "artist"]), tmp_path / "items.parquet")
    assert read(tmp_path, Columns(genres="artist")) == {}


def test_lists_and_dates_are_passed_over(tmp_path: Path) -> None:
    table = pa.table(
        {**{name: catalogue()[name] for name in ("item_id", "title")}, "more": [[n] for n in range(ITEMS)]}
    )
    days = pa.array(range(ITEMS), pa.timestamp("s"))
    pq.write_table(table.append_column("day", days), tmp_path / "items.parquet")
    assert read(tmp_path) == {}
