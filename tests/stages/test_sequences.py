"""Splits through Ray: what every split must keep, and that partitions decide nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import Ingest, Pipeline, Sequences, Synthetic
from recray.errors import DataError
from recray.schema import EVALUATION, EXAMPLES, HISTORIES
from recray.stages import sequences as stage
from recray.stages.flow import run_stages
from recray.workspace import Workspace

pytestmark = pytest.mark.usefixtures("ray_cluster")

TABLES = {"histories": HISTORIES, "train": EXAMPLES, "validation": EVALUATION, "test": EVALUATION}


def run(workspace: Workspace, ingest: Ingest, **settings: Any) -> dict[str, pa.Table]:
    pipeline = Pipeline(name="test", ingest=ingest, sequences=Sequences(**settings))
    run_stages(pipeline, workspace, ("ingest", "sequences"), force=frozenset({"sequences"}))
    return {name: workspace.table("sequences", name) for name in TABLES}


def check_shapes(workspace: Workspace, tables: dict[str, pa.Table], *, most_candidates: int) -> None:
    """What holds of every split, whatever it is."""
    num_items = workspace.require("ingest").counts["items"]
    for name, table in tables.items():
        assert table.schema.equals(TABLES[name])
        assert table["row"].to_pylist() == list(range(table.num_rows)), f"{name} is not in order of row"
        assert table.num_rows == workspace.require("sequences").counts[name] > 0
    for name in ("validation", "test"):
        for row in tables[name].to_pylist():
            assert len(row["history"]) >= 1
            assert row["candidates"].count(row["target"]) == 1
            assert len(set(row["candidates"])) == len(row["candidates"]) <= most_candidates
            assert all(0 <= item < num_items for item in row["candidates"])


@pytest.mark.parametrize("split", ["time_cut", "leave_last_n"])
def test_a_split_is_one_whatever_the_partitions(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    ingest = Ingest(synthetic=Synthetic(interactions=4000))
    settings = {"split": split, "leave_last": 2, "num_candidates": 20, "max_validation_rows": 60, "max_test_rows": 70}
    one = run(workspace, ingest, **settings)
    check_shapes(workspace, one, most_candidates=20)
    account = workspace.require("sequences").facts["rows"]
    train = account["train"]
    held_out = account["validation"]["held_out"] + account["test"]["held_out"]
    assert train["interactions"] + train["interactions_of_users_below_two"] + held_out == 4000
    for name in ("validation", "test"):
        lost = ("without_history", "beyond_targets_per_user", "beyond_max_rows", "written")
        assert account[name]["held_out"] == sum(account[name][reason] for reason in lost)
    monkeypatch.setattr(stage, "ROWS_PER_PARTITION", 1500)
    several = run(workspace, ingest, **settings)
    for name, table in one.items():
        assert several[name].combine_chunks().equals(table.combine_chunks()), name
    if split == "time_cut":
        check_no_future(workspace, one)


def check_no_future(workspace: Workspace, tables: dict[str, pa.Table]) -> None:
    """Of a log in which nobody meets an item twice: training lies before the cut, histories before their target."""
    log = workspace.table("ingest", "interactions").to_pylist()
    when = {(row["user_id"], row["item"]): (row["time"], row["tie_break"]) for row in log}
    moments = workspace.require("sequences").facts["cut_times"]
    for row in tables["histories"].to_pylist():
        times = [when[row["user_id"], item] for item in row["items"]]
        assert times == sorted(times)
        assert times[-1][0] < moments["validation_from"]
    for name, first in (("validation", moments["validation_from"]), ("test", moments["test_from"])):
        for row in tables[name].to_pylist():
            times = [when[row["user_id"], item] for item in (*row["history"], row["target"])]
            assert times == sorted(times)
            assert times[-1][0] >= first
            if name == "validation":
                assert times[-1][0] < moments["test_from"]
    for row in tables["train"].to_pylist():
        times = [when[row["user_id"], item] for item in (*row["history"], row["target"])]
        assert times == sorted(times)
        assert times[-1][0] < moments["validation_from"]


def publish(folder: Path, sequences: list[dict[str, Any]], log: list[tuple[str, int, int]] | None = None) -> Ingest:
    folder.mkdir()
    pq.write_table(pa.table({"item_id": range(40), "title": [f"T{n}" for n in range(40)]}), folder / "items.parquet")
    pq.write_table(pa.Table.from_pylist(sequences), folder / "sequences.parquet")
    if log is not None:
        columns = dict(zip(("user_id", "item_id", "position"), map(list, zip(*log, strict=True)), strict=True))
        pq.write_table(pa.table(columns), folder / "interactions.parquet")
    return Ingest(data=str(folder))


def by_id(workspace: Workspace, items: list[int]) -> list[int]:
    ids = workspace.table("ingest", "items")["item_id"].to_pylist()
    return [int(ids[item]) for item in items]


def test_published_without_training_rows_takes_the_log_before_the_targets(tmp_path: Path, workspace: Workspace) -> None:
    log = [(f"u{user}", (3 * user + place) % 40, place) for user in range(6) for place in range(6)]
    sequences = [
        {"split": split, "user_id": f"u{user}", "history": items[:at], "target": items[at], "candidates": candidates}
        for user in range(6)
        for items in [[(3 * user + place) % 40 for place in range(6)]]
        for split, at, candidates in (("val", 4, None), ("test", 5, [38, 39] if user < 2 else None))
    ]
    tables = run(workspace, publish(tmp_path / "log", sequences, log), split="published", num_candidates=9)
    check_shapes(workspace, tables, most_candidates=9)
    histories = [by_id(workspace, items) for items in tables["histories"]["items"].to_pylist()]
    assert histories == [[(3 * user + place) % 40 for place in range(4)] for user in range(6)]
    sizes = [len(each) for each in tables["test"]["candidates"].to_pylist()]
    assert sizes == [3] * 6  # the published two and the target; the others drawn to the same size
    first = set(by_id(workspace, tables["test"]["candidates"].to_pylist()[0]))
    assert first == {38, 39, 5}
    assert {len(each) for each in tables["validation"]["candidates"].to_pylist()} == {9}
    few = run(workspace, Ingest(data=str(tmp_path / "log")), split="published", max_test_rows=2)
    assert few["test"]["user_id"].to_pylist() == ["u0", "u1"]  # those with candidates stay
    fresh = run(
        workspace, Ingest(data=str(tmp_path / "log")), split="published", num_candidates=9, fresh_candidates=True
    )
    assert {len(each) for each in fresh["test"]["candidates"].to_pylist()} == {9}


def test_published_training_rows_are_the_examples(tmp_path: Path, workspace: Workspace) -> None:
    rows = [("train", [1, 2], 3), ("train", [4, 5], 6), ("val", [1], 2), ("test", [2], 3)]
    sequences = [
        {"split": split, "user_id": None, "history": history, "target": target} for split, history, target in rows
    ]
    tables = run(workspace, publish(tmp_path / "log", sequences), split="published", num_candidates=5)
    check_shapes(workspace, tables, most_candidates=5)
    examples = tables["train"].to_pylist()
    assert [(by_id(workspace, row["history"]), by_id(workspace, [row["target"]])) for row in examples] == [
        ([1, 2], [3]),
        ([4, 5], [6]),
    ]
    assert tables["train"]["user_id"].to_pylist() == ["row-0", "row-1"]


def test_a_split_that_the_data_lacks_is_refused(tmp_path: Path, workspace: Workspace) -> None:
    rows = [{"split": "train", "user_id": "u", "history": [1, 2], "target": 3}]
    ingest = publish(tmp_path / "only", rows)
    with pytest.raises(DataError, match="no interactions, which sequences.split time_cut needs"):
        run(workspace, ingest, split="time_cut")
    with pytest.raises(DataError, match="leaves no row to use for validation"):
        run(workspace, ingest, split="published")
    log = [(f"u{user}", user + place, place) for user in range(4) for place in range(5)]
    by_position = publish(tmp_path / "positions", rows, log)
    other = Workspace(str(tmp_path / "other"))
    with pytest.raises(DataError, match="positions but no timestamps.*leave_one_out"):
        run(other, by_position, split="time_cut")
    with pytest.raises(DataError, match="nothing to train on"):
        run(other, by_position, split="leave_last_n", leave_last=2)
    synthetic = Workspace(str(tmp_path / "synthetic"))
    with pytest.raises(DataError, match="the data publishes no sequences"):
        run(synthetic, Ingest(synthetic=Synthetic(interactions=1000)), split="published")
    assert not synthetic.exists("sequences")


def test_a_small_catalogue_gives_what_it_has(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    ingest = Ingest(synthetic=Synthetic(interactions=1000, items=30, genres=3))
    tables = run(workspace, ingest, split="leave_one_out", num_candidates=60)
    check_shapes(workspace, tables, most_candidates=30)
    assert "fewer than 60 candidates" in caplog.text


def test_movielens_is_cut_in_time(recray_data: Path, workspace: Workspace) -> None:
    tables = run(workspace, Ingest(data=str(recray_data / "ml-latest-small")), split="time_cut")
    check_shapes(workspace, tables, most_candidates=100)
    check_no_future(workspace, tables)
    facts = workspace.require("ingest").facts
    assert facts["rows"]["kept"] == facts["rows"]["read"] == 100_836
    account = workspace.require("sequences").facts["rows"]
    assert account["test"]["held_out"] == pytest.approx(10_084, rel=0.01)
    items = workspace.table("ingest", "items")
    assert len(set(items["label"].to_pylist())) == 9742
    # Neighbours at one moment follow neither the catalogue's numbers nor the rows of the file.
    log = workspace.table("ingest", "interactions")
    users, times = log["user_id"].to_numpy(zero_copy_only=False), log["time"].to_numpy()
    numbers = items["item_id"].to_numpy(zero_copy_only=False).astype(np.int64)[log["item"].to_numpy()]
    tied = np.flatnonzero((users[1:] == users[:-1]) & (times[1:] == times[:-1]))
    assert len(tied) > 10_000
    assert abs((numbers[tied + 1] > numbers[tied]).mean() - 0.5) < 0.02


def test_amazon_keeps_its_published_split(recray_data: Path, workspace: Workspace) -> None:
    tables = run(workspace, Ingest(data=str(recray_data / "amazon_games")), split="published")
    check_shapes(workspace, tables, most_candidates=101)
    assert workspace.require("sequences").counts == {
        "histories": 50_546, "train": tables["train"].num_rows, "validation": 2000, "test": 10_000,
    }  # fmt: skip
    log = workspace.table("ingest", "interactions").sort_by([("user_id", "ascending"), ("time", "ascending")])
    users = log.group_by("user_id", use_threads=False).aggregate([("item", "list")])
    whole = dict(zip(users["user_id"].to_pylist(), users["item_list"].to_pylist(), strict=True))
    for row in tables["histories"].to_pylist():
        assert row["items"] == whole[row["user_id"]][:-2]
    for row in tables["test"].to_pylist():
        assert row["target"] == whole[row["user_id"]][-1]
        assert row["history"] == whole[row["user_id"]][:-1][-20:]
    published = workspace.table("ingest", "published")
    with_candidates = published.filter(pa.compute.is_valid(published["candidates"]))["user_id"].to_pylist()
    assert set(with_candidates) <= set(tables["test"]["user_id"].to_pylist())
