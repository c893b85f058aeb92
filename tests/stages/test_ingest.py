"""Rows in = rows out, through Ray, from files as users have them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import Ingest, Pipeline, Synthetic
from recray.data.logs import PUBLISHED, TRUTH
from recray.errors import DataError, RecrayError
from recray.schema import CATALOGUE, INTERACTIONS, REJECTED
from recray.stages import ingest as stage
from recray.stages.cluster import own_error
from recray.stages.flow import run_stages
from recray.workspace import Manifest, Workspace

pytestmark = pytest.mark.usefixtures("ray_cluster")


def ingest(folder: Path, workspace: Workspace, **settings: Any) -> Manifest:
    pipeline = Pipeline(name="test", ingest=Ingest(data=str(folder), **settings))
    try:
        run_stages(pipeline, workspace, ("ingest",), force=frozenset())
    except Exception as error:
        raise own_error(error) or error from None
    return workspace.require("ingest")


def write_log(folder: Path, rows: list[tuple[Any, ...]], items: int = 30) -> Path:
    folder.mkdir(exist_ok=True)
    lines = ["user_id,item_id,timestamp,rating", *(",".join(map(str, row)) for row in rows)]
    (folder / "interactions.csv").write_text("\n".join(lines) + "\n")
    titles = [f"{number},Title {number}" for number in range(items)]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *titles]) + "\n")
    return folder


def some_rows(count: int = 300, users: int = 20, items: int = 30) -> list[tuple[Any, ...]]:
    generator = np.random.default_rng(0)
    return [
        (f"u{generator.integers(users)}", generator.integers(items), 1000 + place, generator.integers(1, 6))
        for place in range(count)
    ]


def test_every_row_is_kept_or_accounted_for(tmp_path: Path, workspace: Workspace) -> None:
    rows = some_rows()
    bad: list[tuple[Any, ...]] = [("", 1, 5, 5), ("u1", 99, 5, 5), ("u1", 1, -5, 5), ("u1", 1), ("u1", 1, 5, "")]
    folder = write_log(tmp_path / "log", [*rows, rows[0], *bad, rows[7]])
    manifest = ingest(folder, workspace, min_rating=2.0)
    low = sum(row[3] < 2 for row in rows) + (rows[0][3] < 2) + (rows[7][3] < 2)
    account = manifest.facts["rows"]
    assert account["read"] == 307
    assert account["rejected"] == 5
    assert account["below_min_rating"] == low
    assert account["repeated"] == (rows[0][3] >= 2) + (rows[7][3] >= 2)
    assert account["kept"] == 307 - 5 - low - account["repeated"]
    assert manifest.facts["rejected_by_reason"] == {
        "missing user id": 1, "item not in the catalogue": 1, "impossible timestamp": 1, "malformed row": 1,
        "missing or impossible rating": 1,
    }  # fmt: skip
    kept = workspace.table("ingest", "interactions")
    assert kept.schema.equals(INTERACTIONS)
    assert kept.num_rows == account["kept"] == manifest.counts["interactions"]
    rejected = workspace.table("ingest", "rejected")
    assert rejected.schema.equals(REJECTED)
    assert sorted(rejected["row"].to_pylist()) == [301, 302, 303, 304, 305]
    items = workspace.table("ingest", "items")
    assert items.schema.equals(CATALOGUE)
    # Dense items still mean the items of the log.
    ids = items["item_id"].to_pylist()
    found = {(row["user_id"], int(ids[row["item"]]), row["time"]) for row in kept.to_pylist()}
    assert found == {(user, int(item), time) for user, item, time, rating in rows if rating >= 2}


def test_one_log_in_any_form_and_any_pieces(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows()
    write_log(tmp_path / "csv", rows)
    parts = tmp_path / "parts"
    (parts / "interactions").mkdir(parents=True)
    names = ("user_id", "item_id", "timestamp", "rating")
    records = [dict(zip(names, (row[0], int(row[1]), row[2], int(row[3])), strict=True)) for row in rows]
    pq.write_table(pa.Table.from_pylist(records[:100]), parts / "interactions" / "a.parquet", row_group_size=30)
    (parts / "interactions" / "b.jsonl").write_text("\n".join(json.dumps(each) for each in records[:99:-1]))
    (parts / "items.csv").write_text((tmp_path / "csv" / "items.csv").read_text())
    ingest(tmp_path / "csv", workspace)
    other = Workspace(str(tmp_path / "other"))
    monkeypatch.setattr(stage, "ROWS_PER_PARTITION", 60)  # several partitions, and users in all pieces
    ingest(parts, other)
    order = [("user_id", "ascending"), ("time", "ascending")]
    one, two = (each.table("ingest", "interactions").sort_by(order) for each in (workspace, other))
    assert one.equals(two)
    assert workspace.table("ingest", "items").equals(other.table("ingest", "items"))


def test_core_and_sample_are_counted(tmp_path: Path, workspace: Workspace) -> None:
    rows = [*some_rows(), ("lonely", 3, 5, 5), *[(f"u{n}", 29, 9_000 + n, 5) for n in range(3)]]
    manifest = ingest(write_log(tmp_path / "log", rows), workspace, min_user_interactions=5, max_users=7)
    kept = workspace.table("ingest", "interactions")
    users = set(kept["user_id"].to_pylist())
    assert len(users) == 7 == manifest.facts["users"]
    assert "lonely" not in users
    account = manifest.facts["rows"]
    assert account["outside_core"] >= 1
    assert account["of_users_not_sampled"] == sum(row[0] not in users and row[0] != "lonely" for row in rows)
    assert manifest.counts["items"] == 30  # cold items stay


def test_published_sequences_are_kept_and_numbered(tmp_path: Path, workspace: Workspace) -> None:
    folder = tmp_path / "log"
    write_log(folder, []).joinpath("interactions.csv").unlink()
    rows = [
        {"split": split, "user_id": user, "history": [1, 2], "target": target, "candidates": candidates}
        for split, user, target, candidates in (
            ("train", None, 3, None), ("val", 5, 3, [4, 5, 4]), ("train_more", 5, 3, None), ("test", 6, 77, None),
            ("test", 6, 4, None),
        )
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "sequences.parquet")
    manifest = ingest(folder, workspace)
    table = workspace.table("ingest", "published")
    assert table.schema.equals(PUBLISHED)
    assert table["split"].to_pylist() == ["train", "validation", "test"]
    assert table["user_id"].to_pylist() == ["row-0", "5", "6"]
    ids = workspace.table("ingest", "items")["item_id"].to_pylist()
    assert [[ids[item] for item in items] for items in table["history"].to_pylist()] == [["1", "2"]] * 3
    assert [ids[item] for item in table["candidates"].to_pylist()[1]] == ["4", "5", "4"]
    assert manifest.facts["published_rows_with_a_candidate_twice"] == 1
    assert manifest.facts["published_rows_without_their_target"] == 1
    assert manifest.facts["published_rows"] == {
        "read": 5, "kept": 3, "rejected": 1, "of_other_splits": 1, "of_users_not_sampled": 0,
    }  # fmt: skip
    assert workspace.table("ingest", "rejected").to_pylist()[0]["row"] == 3
    assert workspace.table("ingest", "interactions").schema.equals(INTERACTIONS)


def test_json_rows_of_titles_become_sequences_and_a_catalogue(tmp_path: Path, workspace: Workspace) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    titles = [f"Title {number}" for number in range(12)]
    good = [
        {"historyList": "::".join(titles[n : n + 3]), "itemList": titles[n : n + 6], "trueSelection": titles[n + 3]}
        for n in range(6)
    ]
    bad = {**good[0], "itemList": titles[:3]}
    (folder / "my-train.json").write_text(json.dumps([*good, bad], indent=4))
    (folder / "my-val.json").write_text(json.dumps(good[:2]))
    (folder / "my-test.jsonl").write_text(
        "\n".join(map(json.dumps, [{**good[1], "itemList": titles[:5] * 2}, good[3]]))
    )
    manifest = ingest(folder, workspace)
    table = workspace.table("ingest", "published")
    assert table["split"].to_pylist() == ["test"] + ["train"] * 6 + ["validation"] * 2  # in order of the files
    assert table["user_id"].to_pylist() == ["test-1", *["train-0"] * 6, *["validation-0"] * 2]
    ids = workspace.table("ingest", "items")["item_id"].to_pylist()
    assert sorted(ids) == sorted(titles[:11])
    assert [ids[item] for item in table["history"].to_pylist()[1]] == titles[:3]
    assert manifest.facts["published_rows"]["rejected"] == 2
    assert manifest.facts["catalogue_of_titles"] is True
    assert manifest.facts["published_users"] == 3
    rejected = workspace.table("ingest", "rejected").sort_by("file").to_pylist()
    assert [(row["file"], row["row"], row["reason"]) for row in rejected] == [
        ("my-test.jsonl", 0, "target twice among the candidates"),
        ("my-train.json", 6, "target not among the candidates"),
    ]


def test_json_rows_without_one_to_use_are_refused_whole(tmp_path: Path, workspace: Workspace) -> None:
    row = {"historyList": ["1"], "itemList": ["2"], "trueSelection": "1"}
    (tmp_path / "test.json").write_text(json.dumps([row] * 3))
    (tmp_path / "items.csv").write_text("item_id,title\n1,A\n2,B\n")
    with pytest.raises(DataError, match="published sequences: no row .* used: 3 target not among the candidates"):
        ingest(tmp_path, workspace)
    assert not workspace.exists("ingest")


def test_what_had_to_be_mended_is_stated(
    tmp_path: Path, workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    moment = 1_600_000_000
    rows = [("1", 1, moment, 5), ("1.0", 2, 1000 * moment + 60_000, 5), ("2", "3.0", moment, 5), ("2.5", 3, moment, 5)]
    folder = write_log(tmp_path / "log", [*rows, ("Zoë", 4, moment, 5)])
    for name in ("interactions.csv", "items.csv"):
        text = (folder / name).read_text().replace("Title 7", "Amélie")
        (folder / name).write_bytes(text.encode("cp1252"))
    with caplog.at_level("WARNING"):
        manifest = ingest(folder, workspace)
    kept = workspace.table("ingest", "interactions").sort_by([("user_id", "ascending"), ("time", "ascending")])
    assert kept["user_id"].to_pylist() == ["1", "1", "2", "Zoë"]
    assert kept["time"].to_pylist() == [moment, moment + 60, moment, moment]
    assert "Amélie" in workspace.table("ingest", "items")["title"].to_pylist()
    assert manifest.facts["rejected_by_reason"] == {"user id that is no exact whole number": 1}
    assert manifest.facts["time_units"] == {"seconds": 3, "milliseconds": 1}
    assert manifest.facts["mended_ids"] == {"user_id": 1, "item_id": 1}
    assert manifest.facts["read_as_cp1252"] == ["interactions.csv", "items.csv"]
    assert "mix units, each row was read by its own: 3 in seconds, 1 in milliseconds" in caplog.text
    assert "items.csv is not UTF-8, it was read as cp1252; the first such row is 7: 7,Amélie" in caplog.text
    assert "the first such row is 4: Zoë,4," in caplog.text


def test_synthetic_logs_come_with_their_truth(workspace: Workspace) -> None:
    pipeline = Pipeline(name="test", ingest=Ingest(synthetic=Synthetic(interactions=2000)))
    run_stages(pipeline, workspace, ("ingest",), force=frozenset())
    kept, truth = workspace.table("ingest", "interactions"), workspace.table("ingest", "truth")
    assert kept.num_rows == 2000
    assert truth.schema.equals(TRUTH)
    met = {(row["user_id"], row["item"]) for row in kept.to_pylist()}
    liked = {(row["user_id"], item) for row in truth.to_pylist() for item in row["liked"]}
    assert liked
    assert not liked & met
    assert workspace.require("ingest").facts["synthetic"]
    assert workspace.exists("ingest", "logs", "interactions.parquet")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the log is empty"),
        ([("u", 1, 5, 5), ("u", 2, 6, 5)], "the log is of 1 user, expected at least two"),
        ([("u", 1, 100_000_000_000, 5)] * 3, "no row of the log can be used: 3 impossible timestamp; .*time_unit"),
    ],
)
def test_logs_without_use_are_refused_whole(
    tmp_path: Path, workspace: Workspace, rows: list[tuple[Any, ...]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        ingest(write_log(tmp_path / "log", rows), workspace)
    assert not workspace.exists("ingest")
    assert not workspace.exists(".partial", "ingest")


def test_damage_found_by_a_worker_still_names_the_file(tmp_path: Path, workspace: Workspace) -> None:
    folder = write_log(tmp_path / "log", [])
    (folder / "interactions.csv").unlink()
    path = folder / "interactions.parquet"
    columns = {
        "user_id": [f"u{n}" for n in range(5000)],
        "item_id": [n % 30 for n in range(5000)],
        "timestamp": range(5000),
    }
    pq.write_table(pa.table(columns), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:4000] = b"\x00" * 3800
    path.write_bytes(content)
    with pytest.raises(RecrayError, match=r"interactions\.parquet can't be read"):
        ingest(folder, workspace)
    assert not workspace.exists("ingest")


def test_a_column_that_is_missing_is_said_before_anything_is_read(tmp_path: Path, workspace: Workspace) -> None:
    folder = write_log(tmp_path / "log", some_rows())
    with pytest.raises(DataError, match=r"interactions\.csv has no column 'user'.*the nearest is 'user_id'"):
        ingest(folder, workspace, columns={"user": "user"})
