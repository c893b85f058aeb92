"""The same rows in every form that is read: the tables that come out are those of the Parquet of the same content."""

import bz2
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import Columns, Ingest
from recray.data import reading
from recray.data.items import read_items
from recray.data.logs import CLEANED, NOTES, Source, cleaned_interactions, log_columns, resolve
from recray.data.reading import column_names, first_decoded, form_of, is_western, pieces_of, read_piece
from recray.errors import DataError

IDS = pa.array([str(number) for number in range(7)])
LOG: list[dict[str, Any]] = [
    {"user_id": f"u{n % 5}", "item_id": n % 7, "timestamp": 1_600_000_000 + 60 * n, "rating": 0.5 + n % 5}
    for n in range(40)
]
ITEMS: list[dict[str, Any]] = [
    {"item_id": n, "title": f'The "{n}" of Zoë', "genres": ["Drama", "Sci-Fi"][: n % 3]} for n in range(7)
]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda text: pa.compress(text, "zstd", asbytes=True),
}
TYPES = {"user_id": "token", "item_id": "token", "timestamp": "float", "rating": "float"}


def text_of(rows: list[dict[str, Any]], form: str) -> bytes:
    """The rows as a file of one form holds them; lists as text, as the form has it."""
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    tab = "," if form == "csv" else "\t"
    atomic = form in ("inter", "item")
    types = TYPES | {"title": "token_seq", "genres": "token_seq"}

    def field(value: object) -> str:
        if isinstance(value, list):
            value = (" " if atomic else "|").join(value)
        text = str(value)
        return '"' + text.replace('"', '""') + '"' if '"' in text and not atomic else text

    header = [f"{name}:{types[name]}" if atomic else name for name in rows[0]]
    return "\n".join(tab.join(line) for line in [header, *([field(v) for v in row.values()] for row in rows)]).encode()


def write_log(folder: Path, form: str, compression: str = "") -> Path:
    """A folder with the log and its catalogue in one form."""
    folder.mkdir()
    names = ("x.inter", "x.item") if form == "atomic" else (f"interactions.{form}", f"items.{form}")
    for name, rows in zip(names, (LOG, ITEMS), strict=True):
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / name)
        else:
            text = COMPRESS[compression](text_of(rows, name.rsplit(".")[-1]))
            (folder / (name + compression)).write_bytes(text)
    return folder


def cleaned(source: Source, columns: Columns | None = None) -> pa.Table:
    """All rows of the log of a source, cleaned."""

    def parts() -> Iterator[pa.Table]:
        yield CLEANED.empty_table()
        for file in source.interactions:
            found = log_columns(file, column_names(source.fs, file), columns or Columns(), None)
            for piece in pieces_of(source.fs, file):
                for raw in read_piece(source.fs, piece, found.names):
                    yield cleaned_interactions(raw, file, found, IDS, min_rating=None, seed=0)

    return pa.concat_tables(list(parts())).combine_chunks()


@pytest.fixture(scope="module")
def as_parquet(tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, pa.Table]:
    source = resolve(Ingest(data=str(write_log(tmp_path_factory.mktemp("as") / "parquet", "parquet"))))
    return cleaned(source), read_items(source.items_fs, source.items, Columns(), 0)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "atomic"])
def test_every_form_gives_the_tables_of_parquet(
    tmp_path: Path, as_parquet: tuple[pa.Table, pa.Table], form: str, compression: str
) -> None:
    source = resolve(Ingest(data=str(write_log(tmp_path / "log", form, compression))))
    log, items = as_parquet
    assert log["reason"].null_count == len(LOG)
    assert cleaned(source).equals(log)
    assert read_items(source.items_fs, source.items, Columns(), 0).equals(items)


def test_small_blocks_of_a_compressed_file_are_the_same_rows(
    tmp_path: Path, as_parquet: tuple[pa.Table, pa.Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", 100)
    source = resolve(Ingest(data=str(write_log(tmp_path / "log", "tsv", ".gz"))))
    assert cleaned(source).equals(as_parquet[0])


def test_a_compressed_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", "csv", ".gz")
    path = folder / "interactions.csv.gz"
    path.write_bytes(b"user_id,item_id")
    source = resolve(Ingest(data=str(folder)))
    with pytest.raises(DataError, match=r"interactions\.csv\.gz can't be read"):
        column_names(source.fs, source.interactions[0])
    text = "user_id,item_id,timestamp\n" + "".join(f"{hash(n)},{n % 7},{n * 7919 % 104729}\n" for n in range(90_000))
    path.write_bytes(gzip.compress(text.encode())[:-2000])
    with pytest.raises(DataError, match=r"interactions\.csv\.gz can't be read .*cut off"):
        cleaned(resolve(Ingest(data=str(folder))))


def test_a_name_that_says_nothing_is_refused_with_what_is_known(tmp_path: Path) -> None:
    assert form_of("x.parquet.gz") is None
    (tmp_path / "ratings.dat").write_text("1::2::3\n")
    known = r"\.parquet, \.csv, \.tsv, \.jsonl, .*\.gz, \.bz2, \.zst"
    with pytest.raises(DataError, match=rf"ratings\.dat: expected a file that ends in {known}"):
        resolve(Ingest(data=str(tmp_path / "ratings.dat")))
    with pytest.raises(DataError, match=rf"no file there ends in {known}.*it has: ratings\.dat"):
        resolve(Ingest(data=str(tmp_path)))


def atomic(folder: Path, inter: str, item: str, name: str = "x") -> Source:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.inter").write_text(inter)
    (folder / f"{name}.item").write_text(item)
    (folder / f"{name}.user").write_text("user_id:token\tage:float\nu\t5\n")
    return resolve(Ingest(data=str(folder)))


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu\t1\t4\t881250949\nu\t2\t\t8.8e8\nu\t3\n"


def test_atomic_files_are_found_by_their_names(tmp_path: Path) -> None:
    source = atomic(tmp_path, INTER, "item_id:token\ttitle:token\n1\tA\n2\tB\n")
    assert [file.name for file in (*source.interactions, *source.items)] == ["x.inter", "x.item"]
    assert resolve(Ingest(data=str(tmp_path / "x.inter"))) == source
    (tmp_path / "x.inter").rename(tmp_path / "x.train.inter")
    (tmp_path / "x.test.inter").write_text(INTER)
    (tmp_path / "y.item").write_text("")
    source = resolve(Ingest(data=str(tmp_path)))
    assert [file.name for file in (*source.interactions, *source.items)] == ["x.test.inter", "x.train.inter", "x.item"]
    (tmp_path / "y.inter").write_text(INTER)
    with pytest.raises(DataError, match=r"which is the log: x\.inter, y\.inter\?"):
        resolve(Ingest(data=str(tmp_path)))


def test_atomic_columns_are_mapped_by_themselves_and_by_settings(tmp_path: Path) -> None:
    item = (
        "movie_id:token\tmovie_title:token_seq\tyear:token\tclass:token_seq\n1\tToy Story\t1995\tDrama War\n2\tA\t1\t\n"
    )
    source = atomic(tmp_path, INTER, item)
    items = read_items(source.items_fs, source.items, Columns(), 0).sort_by("item_id")
    assert items["title"].to_pylist() == ["Toy Story", "A"]
    assert items["genres"].to_pylist() == [["Drama", "War"], []]
    by_name = Columns(item="movie_id", title="year", genres="movie_title")
    items = read_items(source.items_fs, source.items, by_name, 0).sort_by("item_id")
    assert items["title"].to_pylist() == ["1995", "1"]
    assert items["genres"].to_pylist() == [["Toy", "Story"], ["A"]]
    one_genre = atomic(tmp_path, INTER, item.replace("class:token_seq", "genre:token"))
    items = read_items(one_genre.items_fs, one_genre.items, Columns(), 0).sort_by("item_id")
    assert items["genres"].to_pylist() == [["Drama War"], []]


def test_quotes_in_an_atomic_file_are_characters(tmp_path: Path) -> None:
    titles = ['"Weird" Al', '7" single', '"whole"']
    item = "item_id:token\ttitle:token\n" + "".join(f"{row}\t{title}\n" for row, title in enumerate(titles))
    source = atomic(tmp_path, INTER, item)
    items = read_items(source.items_fs, source.items, Columns(), 0).sort_by("item_id")
    assert items["title"].to_pylist() == titles


def test_atomic_rows_that_are_short_are_set_aside_and_floats_are_times(tmp_path: Path) -> None:
    source = atomic(tmp_path, INTER, "item_id:token\ttitle:token\n1\tA\n2\tB\n")
    rows = cleaned(source).to_pylist()
    assert [row["time"] for row in rows] == [881250949, 880000000, None]
    assert [row["rating"] for row in rows] == [4.0, None, None]
    assert [(row["file"], row["row"], row["reason"], row["content"]) for row in rows[2:]] == [
        ("x.inter", 2, "malformed row", '"u\\t3"')
    ]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("user_id:token\titem_id\ttimestamp:float", r"x\.inter has field 'item_id' in its header; expected NAME:TYPE"),
        ("user_id:token\titem_id:int\ttimestamp:float", r"field 'item_id:int'.*token, float, token_seq, float_seq"),
        ("user_id:token\tuser_id:token", "a field twice"),
        ("user_id:token\titem_id:token", r"x\.inter has no column 'timestamp'.*ingest\.columns\.time"),
        ("user_id:token\ta_id:token\tb_id:token\ttimestamp:float", r"no column 'item_id'.*ingest\.columns\.item"),
    ],
)
def test_atomic_headers_that_say_too_little_are_refused(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cleaned(atomic(tmp_path, header + "\nu\t1\t5\n", "item_id:token\ttitle:token\n1\tA\n"))


WESTERN = ["Am\u00e9lie", "Stra\u00dfe", "Citt\u00e0 dell\u2019amore", "El ni\u00f1o", "plain"]


def titles_as(folder: Path, encoding: str, titles: list[str], name: str = "items.csv") -> Source:
    folder.mkdir(exist_ok=True)
    header, tab = ("item_id:token\ttitle:token", "\t") if name.endswith(".item") else ("item_id,title", ",")
    lines = [header, *(f"{row}{tab}{title}" for row, title in enumerate(titles))]
    (folder / name).write_bytes("\n".join(lines).encode(encoding))
    log = "x.inter" if name.endswith(".item") else "interactions.csv"
    (folder / log).write_text("user_id:token\titem_id:token\ttimestamp:float\n" if log == "x.inter" else "user_id\n")
    return resolve(Ingest(data=str(folder)))


@pytest.mark.parametrize("block_bytes", [16, 8 * 1024**2])
@pytest.mark.parametrize("name", ["items.csv", "x.item"])
def test_western_text_is_read_as_it_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block_bytes: int
) -> None:
    monkeypatch.setattr(reading, "BLOCK_BYTES", block_bytes)
    source = titles_as(tmp_path, "cp1252", WESTERN, name)
    items = read_items(source.items_fs, source.items, Columns(), 0)
    assert sorted(items["title"].to_pylist()) == sorted(WESTERN)
    row, text = first_decoded(source.fs, source.items[0]) or (None, "")
    assert (row, text[2:]) == (0, WESTERN[0])


@pytest.mark.parametrize("titles", [WESTERN, ["Am\u00e9lie", "\u00e9t\u00e9", "plain", "plain", "\u00e0"]])
def test_utf8_is_never_taken_for_western_text(tmp_path: Path, titles: list[str]) -> None:
    source = titles_as(tmp_path, "utf-8", titles)
    assert first_decoded(source.fs, source.items[0]) is None
    path = Path(source.items[0].path)
    path.write_bytes(path.read_bytes() + b"\n9,broken \xe9")
    assert not is_western(source.fs, source.items[0])
    with pytest.raises(DataError, match=r"items\.csv, row 5: broken encoding \(neither UTF-8 nor surely cp1252"):
        read_items(source.items_fs, source.items, Columns(), 0)


@pytest.mark.parametrize(
    ("encoding", "titles"),
    [
        ("cp1251", ["\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440", "\u0421\u043b\u043e\u0432\u043e"]),
        ("gbk", ["\u5317\u51fa\u83dc\u5948", "\u4e2d\u6587\u7535\u5f71"]),
        ("shift_jis", ["\u5317\u51fa\u83dc\u5948", "\u6620\u753b"]),
    ],
)
def test_other_encodings_are_refused_not_garbled(tmp_path: Path, encoding: str, titles: list[str]) -> None:
    source = titles_as(tmp_path, encoding, titles)
    with pytest.raises(DataError, match=r"items\.csv, row 0: broken encoding .*convert the file to UTF-8"):
        read_items(source.items_fs, source.items, Columns(), 0)


def test_what_was_mended_is_noted_of_usable_rows_alone(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", "csv")
    rows = [
        "user_id,item_id,timestamp",
        "1.0,2,1600000000",
        "u,3.0,1600000000000",
        "u,99.0,1600000000",
        "Zo\u00eb,1,2020-01-01",
    ]
    (folder / "interactions.csv").write_bytes(("\n".join(rows) + "\n").encode("latin-1"))
    noted = cleaned(resolve(Ingest(data=str(folder))))["notes"].to_pylist()
    decoded = NOTES["decoded"]
    wanted = [NOTES["user_id"] + NOTES["seconds"], NOTES["item_id"] + NOTES["milliseconds"], -decoded, 0]
    assert noted == [bits + decoded for bits in wanted]


def test_ids_of_mixed_types_are_one_in_every_form(tmp_path: Path) -> None:
    found = {}
    for form, values in (("jsonl", [1, "1", 1.0, 1.5]), ("csv", ["1", "1", "1.0", "1.5"])):
        rows = [{"user_id": value, "item_id": 1, "timestamp": 5} for value in values]
        folder = write_log(tmp_path / form, form)
        (folder / f"interactions.{form}").write_bytes(text_of(rows, form))
        table = cleaned(resolve(Ingest(data=str(folder))))
        found[form] = [(row["user_id"], row["reason"], row["notes"] & NOTES["user_id"]) for row in table.to_pylist()]
    wrong = (None, "user id that is no exact whole number", 0)
    assert found["csv"] == [("1", None, 0), ("1", None, 0), ("1", None, 1), wrong]
    assert found["jsonl"] == found["csv"]
