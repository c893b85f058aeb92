import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from recray.data import reading
from recray.data.reading import CONTENT, FAULT, ROW, File, column_names, form_of, pieces_of, read_piece
from recray.errors import DataError

LOCAL = pafs.LocalFileSystem()


def as_file(path: Path) -> File:
    return File(str(path), path.name, path.stat().st_size, 0)


def read(path: Path, columns: list[str]) -> list[dict[str, object]]:
    file = as_file(path)
    tables = [part for piece in pieces_of(LOCAL, file) for part in read_piece(LOCAL, piece, columns)]
    rows = [row for table in tables for row in table.to_pylist()]
    return sorted(rows, key=lambda row: row[ROW])


def test_forms_go_by_the_end_of_the_name() -> None:
    assert [form_of(name) for name in ("a.parquet", "b/c.CSV", "x.jsonl.gz", "x.tsv", "x.txt", "parquet", "x.gz")] == [
        "parquet", "csv", "jsonl", "tsv", None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("block_bytes", [16, 64, 8 * 1024**2])
@pytest.mark.parametrize("ending", ["csv", "csv.gz"])
def test_csv_keeps_row_numbers_around_faults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, ending: str
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    lines = [b"user_id,item_id,x", b"u1,007,a", b"u2,2", b"", b'u3,"3,4",c', b'"u4,5,d', b"u\xff,6,e", b"u6,7,NA"]
    content = b"\xef\xbb\xbf" + b"\r\n".join(lines)
    path = tmp_path / f"log.{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    rows = read(path, ["user_id", "item_id", "x"])
    assert [row[ROW] for row in rows] == [0, 1, 3, 4, 5, 6]
    assert [row.get(FAULT) for row in rows] == [None, "malformed row", None, "malformed row", "broken encoding", None]
    good = [(row["user_id"], row["item_id"], row["x"]) for row in rows if not row.get(FAULT)]
    assert good == [("u1", "007", "a"), ("u3", "3,4", "c"), ("u6", "7", "NA")]
    assert rows[1][CONTENT] == "u2,2"
    assert rows[4][CONTENT] == "u\\xff,6,e"
    assert column_names(LOCAL, as_file(path)) == ["user_id", "item_id", "x"]


@pytest.mark.parametrize("block_bytes", [16, 8 * 1024**2])
def test_jsonl_survives_mixed_types_and_broken_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "log.jsonl"
    path.write_bytes(
        b'{"user_id": 1, "item_id": "7", "t": 5}\n{"user_id": "x", "item_id": 8}\nnot json\n[1]\n\n'
        b'{"user_id": "\xff", "item_id": 8}\n{"item_id": 2.0, "user_id": "2020-01-01T00:00:00", "t": null}\n'
    )
    rows = read(path, ["user_id", "item_id", "t"])
    assert [row[ROW] for row in rows] == [0, 1, 2, 3, 5, 6]
    faults = [row.get(FAULT) for row in rows]
    assert faults == [None, None, "malformed row", "malformed row", "broken encoding", None]
    assert [str(row["user_id"]) for row in rows if not row.get(FAULT)] == ["1", "x", "2020-01-01T00:00:00"]
    assert column_names(LOCAL, as_file(path)) == ["user_id", "item_id", "t"]


def test_parquet_pieces_cover_all_row_groups_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_ROWS", 7)
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": range(23), "more": range(23)}), path, row_group_size=3)
    pieces = pieces_of(LOCAL, as_file(path))
    assert [(piece.first_row, piece.row_groups) for piece in pieces] == [(0, (0, 1, 2)), (9, (3, 4, 5)), (18, (6, 7))]
    rows = read(path, ["user_id", "absent"])
    assert [(row[ROW], row["user_id"]) for row in rows] == [(place, place) for place in range(23)]
    assert "more" not in rows[0]


def test_a_cut_off_parquet_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": range(1000)}), path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=r"log\.parquet is no whole Parquet file .*cut off"):
        pieces_of(LOCAL, as_file(path))


def test_damage_inside_a_parquet_file_names_it_too(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user_id": [f"u{number}" for number in range(5000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:4000] = b"\x00" * 3800
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"log\.parquet can't be read"):
        read(path, ["user_id"])


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"log\.csv is empty; expected a header"):
        column_names(LOCAL, as_file(path))
