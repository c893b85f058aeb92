from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import fs as pafs

from recray.config import Columns
from recray.data.items import distinct_labels, read_items
from recray.data.reading import File
from recray.errors import DataError
from recray.schema import CATALOGUE

LOCAL = pafs.LocalFileSystem()


def items_of(path: Path, seed: int = 0, columns: Columns | None = None) -> pa.Table:
    return read_items(LOCAL, [File(str(path), path.name, 0, 0)], columns or Columns(), seed)


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_the_order_is_a_shuffle_of_ids_alone(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"item_id": number, "title": f"T{number}"} for number in range(500)]
    one = items_of(write(tmp_path / "items.parquet", rows))
    assert one.schema == CATALOGUE
    assert one["item"].to_pylist() == list(range(500))
    ids = [int(each) for each in one["item_id"].to_pylist()]
    assert sorted(ids) == list(range(500))
    assert abs(np.corrcoef(ids, np.arange(500))[0, 1]) < 0.15
    assert items_of(write(tmp_path / "items.parquet", rows[::-1])).equals(one)
    assert not items_of(tmp_path / "items.parquet", seed=1).equals(one)


def test_csv_and_parquet_are_one_catalogue(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text('item_id,title,genres\n1,"A, b",x|y\n2,B\u00e9,\n')
    rows: list[dict[str, object]] = [
        {"item_id": 1, "title": "A, b", "tags": ["x", "y"]},
        {"item_id": 2, "title": "Be\u0301", "tags": None},
    ]
    assert items_of(tmp_path / "items.csv").equals(items_of(write(tmp_path / "items.parquet", rows)))


def test_labels_stay_distinct_even_against_real_titles() -> None:
    titles = ["Blue", "Blue (edition A)", "Blue", " Blue\n", "Blue (edition B)", "Red"]
    assert distinct_labels(titles) == [
        "Blue (edition C)", "Blue (edition A)", "Blue (edition D)", "Blue (edition E)", "Blue (edition B)", "Red",
    ]  # fmt: skip
    many = distinct_labels(["x"] * 1000)
    assert len(set(many)) == 1000
    assert many[26:28] == ["x (edition AA)", "x (edition AB)"]


@given(
    st.lists(
        st.sampled_from(["a", "a (edition A)", "a (edition A) (edition A)", "b", "a ", "a  (edition B)"]), max_size=30
    )
)
def test_labels_are_unique_whatever_the_titles(titles: list[str]) -> None:
    labels = distinct_labels(titles)
    assert len(set(labels)) == len(titles)
    assert all(label.startswith(" ".join(title.split())) for label, title in zip(labels, titles, strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("item_id,title\n1,A\n1,B\n2,C\n", "gives 1 item ids more than once .first 1."),
        ("item_id,title\n1,A\n2,  \n", r"items\.csv, row 1: item 2 has an empty title"),
        ("item_id,title\n1,A\n,B\n", r"row 1: the item id is missing"),
        ("item_id,title\n1,A\n", "holds 1 items; expected at least two"),
        ("item_id,name\n1,A\n", r"no column 'title'; it has: item_id, name.*ingest\.columns\.title"),
        ("item_id,title\n1,A\n2\n3,C\n", r"items\.csv, row 1: malformed row: 2"),
    ],
)
def test_an_unsound_catalogue_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "items.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        items_of(tmp_path / "items.csv")
