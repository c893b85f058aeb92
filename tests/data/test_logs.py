import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recray.config import Columns, Ingest, Synthetic
from recray.data.hashing import mix
from recray.data.logs import (
    BELOW_RATING,
    CLEANED,
    LogColumns,
    cleaned_interactions,
    cleaned_sequences,
    core,
    data_print,
    distinct,
    log_columns,
    resolve,
    sampled_users,
)
from recray.data.reading import CONTENT, FAULT, ROW, File
from recray.data.values import as_number, as_seconds, as_text
from recray.errors import DataError
from recray.schema import INTERACTIONS

FILE = File("/x/log.csv", "log.csv", 1, 1)
IDS = pa.array(["a", "b", "c"])
CLOCK = LogColumns("user_id", "item_id", "timestamp", "rating", clock=True)


def raw(**columns: list[object]) -> pa.Table:
    table = pa.table(columns)
    rows = table.num_rows
    more = {ROW: pa.array(range(rows), pa.int64()), FAULT: pa.nulls(rows, pa.string())}
    for name, values in (more | {CONTENT: pa.nulls(rows, pa.string())}).items():
        table = table.append_column(name, values)
    return table


def clean(table: pa.Table, columns: LogColumns = CLOCK, min_rating: float | None = None, seed: int = 0) -> pa.Table:
    return cleaned_interactions(table, FILE, columns, IDS, min_rating=min_rating, seed=seed)


def test_each_fault_has_its_reason() -> None:
    table = raw(
        user_id=["u", None, "", "u", "u", "u", "u", "u", "u", "u", "u"],
        item_id=["a", "a", "a", None, "zz", "b", "b", "b", "b", "c", "c"],
        timestamp=["5", "5", "5", "5", "5", "-1", "soon", None, "9999999999999", "5", "5"],
        rating=["5", "5", "5", "5", "5", "5", "5", "5", "5", "1", "?"],
    )
    cleaned = clean(table, min_rating=3.0)
    assert cleaned.schema == CLEANED
    assert cleaned["reason"].to_pylist() == [
        None, "missing user id", "missing user id", "missing item id", "item not in the catalogue",
        "impossible timestamp", "impossible timestamp", "missing timestamp", "impossible timestamp",
        BELOW_RATING, "missing or impossible rating",
    ]  # fmt: skip
    assert cleaned["row"].to_pylist() == [None, *range(1, 11)]
    assert cleaned["item"].to_pylist() == [0] + [None] * 10
    contents = cleaned["content"].to_pylist()
    assert contents[4] == '{"user_id": "u", "item_id": "zz", "timestamp": "5", "rating": "5"}'
    assert contents[9] is None  # left out by choice, not set aside
    assert set(cleaned["file"].to_pylist()) == {None, "log.csv"}


def test_the_least_rating_is_still_feedback() -> None:
    cleaned = clean(raw(user_id=["u", "u"], item_id=["a", "b"], timestamp=[1, 2], rating=[3.0, 2.5]), min_rating=3.0)
    assert cleaned["reason"].to_pylist() == [None, BELOW_RATING]


def test_without_min_rating_a_strange_rating_is_no_fault() -> None:
    cleaned = clean(raw(user_id=["u", "u"], item_id=["a", "b"], timestamp=[1, 2], rating=["?", None]))
    assert cleaned["reason"].null_count == 2
    assert cleaned["rating"].null_count == 2


def test_faults_of_reading_come_first_and_keep_the_line() -> None:
    table = raw(user_id=[None], item_id=[None], timestamp=[None])
    table = table.set_column(4, FAULT, pa.array(["broken encoding"])).set_column(5, CONTENT, pa.array(["x" * 900]))
    row = clean(table).to_pylist()[0]
    assert row["reason"] == "broken encoding"
    assert row["content"] == '"' + "x" * 499


def test_ties_are_broken_by_a_seeded_hash_of_user_and_item() -> None:
    columns = {"user_id": ["u", "u", "v"], "item_id": ["a", "b", "a"], "timestamp": [7, 7, 7]}
    one = clean(raw(**columns))["tie_break"].to_pylist()
    other_order = clean(raw(**{name: values[::-1] for name, values in columns.items()}))["tie_break"].to_pylist()
    assert one == other_order[::-1]
    assert len(set(one)) == 3
    assert min(one) >= 0
    assert clean(raw(**columns), seed=1)["tie_break"].to_pylist() != one


def test_tie_breaks_follow_neither_item_nor_row() -> None:
    rows = 2000
    ids = pa.array([f"i{number}" for number in range(rows)])
    table = raw(user_id=["u"] * rows, item_id=ids.to_pylist(), timestamp=[7] * rows)
    cleaned = cleaned_interactions(table, FILE, CLOCK, ids, min_rating=None, seed=0)
    correlation = np.corrcoef(np.argsort(cleaned["tie_break"].to_numpy()), np.arange(rows))[0, 1]
    assert abs(correlation) < 0.1


def test_positions_are_their_own_order() -> None:
    columns = LogColumns("user_id", "item_id", "position", None, clock=False)
    cleaned = clean(raw(user_id=[1.0, 2.0, 2.0], item_id=["a", "b", "c"], position=[3, 0, -1]), columns)
    assert cleaned["time"].to_pylist() == cleaned["tie_break"].to_pylist() == [3, 0, None]
    assert cleaned["user_id"].to_pylist() == ["1", "2", None]
    assert cleaned["reason"].to_pylist() == [None, None, "impossible position"]


def test_times_in_every_dress_are_seconds() -> None:
    moment = dt.datetime(2020, 2, 29, 12, 30, 15, 900_000)
    seconds = 1_582_979_415
    for unit in ("s", "ms", "us", "ns"):
        array = pa.array([moment.replace(microsecond=0)]).cast(pa.timestamp(unit))
        assert as_seconds(array)[0].to_pylist() == [seconds]
    assert as_seconds(pa.array([moment]).cast(pa.timestamp("us", tz="Europe/Berlin")))[0].to_pylist() == [seconds]
    assert as_seconds(pa.array([moment.date()]))[0].to_pylist() == [seconds - 45_015]
    texts = {
        "2020-02-29T12:30:15Z": seconds, "2020-02-29 12:30:15.999": seconds, "2020-02-29": seconds - 45_015,
        "2020-02-29T14:30:15+02:00": seconds, "2020-02-29T07:30:15-0500": seconds, "2020-02-29T12:30": seconds - 15,
        " 1582979415 ": seconds, "1.582979415e9": seconds, "1582979415.75": seconds,
        "2020-02-30": None, "2020-13-01": None, "yesterday": None, "": None, "nan": None,
    }  # fmt: skip
    assert as_seconds(pa.array(list(texts)))[0].to_pylist() == list(texts.values())
    assert as_seconds(pa.array([1.5, float("nan"), float("inf"), None]))[0].to_pylist() == [1, None, None, None]


def test_ids_and_numbers_from_text() -> None:
    assert as_text(pa.array([1, 2, None])).to_pylist() == ["1", "2", None]
    assert as_text(pa.array([1.0, float("nan")])).to_pylist() == ["1", None]
    assert as_text(pa.array(["007", ""])).to_pylist() == ["007", None]
    assert as_text(pa.array(["x"]).dictionary_encode()).to_pylist() == ["x"]
    assert (
        as_number(pa.array(["1", " -2.5", ".5", "1e3", "1,5", "", None])).to_pylist()
        == [1, -2.5, 0.5, 1000] + [None] * 3
    )
    assert as_number(pa.array([True])).to_pylist() == [None]


def test_published_sequences_are_mapped_and_named() -> None:
    table = raw(
        split=["train", "val", "test", "holdout", "test", "test", "test"],
        user_id=[None, 4, 5, 6, 7, 8, 9],
        history=[["a", "b"], ["c"], ["a"], ["a"], ["a", "zz"], [], ["a"]],
        target=["c", "a", "b", "a", "b", "b", "zz"],
        candidates=[None, ["b", "a"], None, None, None, None, None],
    )
    cleaned = cleaned_sequences(table, FILE, IDS)
    assert cleaned["reason"].to_pylist() == [
        None, None, None, "split that is not train, validation or test",
        "item of the history not in the catalogue", "missing history", "target not in the catalogue",
    ]  # fmt: skip
    assert cleaned["split"].to_pylist()[:3] == ["train", "validation", "test"]
    assert cleaned["user_id"].to_pylist()[:2] == ["row-0", "4"]
    assert cleaned["history"].to_pylist()[:2] == [[0, 1], [2]]
    assert cleaned["candidates"].to_pylist()[:3] == [None, [1, 0], None]
    assert cleaned["row"].to_pylist() == list(range(7))


def interactions(rows: list[tuple[str, int, int, float | None]]) -> pa.Table:
    users, items, times, ratings = (list(column) for column in zip(*rows, strict=True))
    ties = [int(mix(item, len(user))) >> 1 for user, item in zip(users, items, strict=True)]
    return pa.table([users, pa.array(items, pa.int32()), times, pa.array(ratings, pa.float32()), ties], INTERACTIONS)


def test_only_exact_repetitions_go() -> None:
    rows = [
        ("b", 1, 5, None),
        ("a", 2, 9, 1.0),
        ("b", 1, 5, None),
        ("a", 2, 9, 2.0),
        ("a", 2, 3, 1.0),
        ("a", 2, 9, 1.0),
    ]
    left = distinct(interactions(rows)).select(["user_id", "item", "time", "rating"]).to_pylist()
    assert [tuple(row.values()) for row in left] == [
        ("a", 2, 3, 1.0),
        ("a", 2, 9, 1.0),
        ("a", 2, 9, 2.0),
        ("b", 1, 5, None),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_core_is_the_fixed_point(pairs: list[tuple[int, int]], min_user: int, min_item: int) -> None:
    left = list(enumerate(pairs))
    while True:
        users = [user for _, (user, _) in left]
        items = [item for _, (_, item) in left]
        fewer = [(at, (u, i)) for at, (u, i) in left if users.count(u) >= min_user and items.count(i) >= min_item]
        if len(fewer) == len(left):
            break
        left = fewer
    codes = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    mask = core(codes[:, 0], codes[:, 1], min_user=min_user, min_item=min_item)
    assert np.flatnonzero(mask).tolist() == [at for at, _ in left]


def test_the_sample_of_users_follows_no_order() -> None:
    users = pa.array([f"u{number}" for number in range(1000)])
    chosen = set(sampled_users(users, 100, 0).to_pylist())
    assert len(chosen) == 100
    assert set(sampled_users(users[::-1], 100, 0).to_pylist()) == chosen
    assert set(sampled_users(users, 100, 1).to_pylist()) != chosen
    assert set(sampled_users(users, 50, 0).to_pylist()) < chosen
    assert 350 < np.mean([int(user[1:]) for user in chosen]) < 650
    assert len(sampled_users(users, 5000, 0)) == 1000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (
        "interactions.csv",
        "items.csv",
        "sequences.jsonl",
        "notes.txt",
        ".hidden.csv",
        "more/a.csv",
        "more/b.csv",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("user_id,item_id,timestamp\n")
    return tmp_path


def names(data: str, items: str | None = None) -> tuple[list[str], list[str], list[str]]:
    source = resolve(Ingest(data=data, items=items))
    return tuple([file.name for file in part] for part in (source.interactions, source.items, source.sequences))  # type: ignore[return-value]


def test_folders_files_and_globs(folder: Path) -> None:
    known = (["interactions.csv"], ["items.csv"], ["sequences.jsonl"])
    assert names(str(folder)) == known
    assert names(folder.as_uri()) == known
    assert names(str(folder / "interactions.csv")) == (["interactions.csv"], ["items.csv"], [])
    assert names(str(folder / "*" / "*.csv")) == (["more/a.csv", "more/b.csv"], ["items.csv"], [])
    assert names(str(folder / "**" / "[ab].csv"))[0] == ["more/a.csv", "more/b.csv"]
    assert names(str(folder / "more"), str(folder / "items.csv")) == (["a.csv", "b.csv"], ["items.csv"], [])
    (folder / "interactions.csv").unlink()
    (folder / "interactions").mkdir()
    (folder / "interactions" / "part-0.csv").write_text("x")
    assert names(str(folder))[0] == ["interactions/part-0.csv"]


def test_what_is_missing_is_said(folder: Path) -> None:
    with pytest.raises(DataError, match="absent: there is no such file or folder"):
        data_print(Ingest(data=str(folder / "absent")))
    with pytest.raises(DataError, match=r"expected a file that ends in \.parquet, \.csv"):
        resolve(Ingest(data=str(folder / "notes.txt")))
    with pytest.raises(DataError, match="no file there ends in"):
        resolve(Ingest(data=str(folder / "*.json5")))
    with pytest.raises(DataError, match="no catalogue lies beside the log"):
        resolve(Ingest(data=str(folder / "more")))
    (folder / "interactions.parquet").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"which is the table of interactions: interactions\.csv, interactions\.parquet"
    ):
        resolve(Ingest(data=str(folder)))


def test_the_fingerprint_changes_with_the_files(folder: Path) -> None:
    before = data_print(Ingest(data=str(folder)))
    assert data_print(Ingest(data=str(folder))) == before
    (folder / "notes.txt").write_text("not data")
    assert data_print(Ingest(data=str(folder))) == before
    (folder / "items.csv").write_text("item_id,title\n")
    assert data_print(Ingest(data=str(folder))) != before
    synthetic = {data_print(Ingest(synthetic=Synthetic(interactions=count))) for count in (1000, 1000, 2000)}
    assert len(synthetic) == 2


def test_columns_are_found_or_named() -> None:
    assert log_columns(FILE, ["user_id", "item_id", "position", "timestamp"], Columns(), None).time == "timestamp"
    by_position = log_columns(FILE, ["user_id", "item_id", "position", "rating"], Columns(), 1.0)
    assert (by_position.time, by_position.clock, by_position.rating) == ("position", False, "rating")
    with pytest.raises(
        DataError, match=r"log\.csv has no column 'user_id'; it has: userid, item_id; the nearest is 'userid'"
    ):
        log_columns(FILE, ["userid", "item_id"], Columns(), None)
    with pytest.raises(DataError, match=r"no column 'timestamp'.*ingest\.columns\.time"):
        log_columns(FILE, ["user_id", "item_id"], Columns(), None)
    with pytest.raises(DataError, match=r"'rating', which ingest\.min_rating needs"):
        log_columns(FILE, ["user_id", "item_id", "timestamp"], Columns(), 3.0)
    mapped = Columns(user="u", item="i", time="t", rating="r")
    assert log_columns(FILE, ["u", "i", "t", "r"], mapped, None) == LogColumns("u", "i", "t", "r", clock=True)


def test_cleaning_is_vectorised_enough() -> None:
    rows = 200_000
    ids = pa.array([str(number) for number in range(5000)])
    table = raw(
        user_id=list(range(rows)), item_id=[number % 5000 for number in range(rows)], timestamp=list(range(rows))
    )
    cleaned = cleaned_interactions(table, FILE, CLOCK, ids, min_rating=None, seed=0)
    assert pc.sum(pc.is_null(cleaned["reason"])).as_py() == rows
