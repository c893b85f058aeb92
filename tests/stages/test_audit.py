"""The audit through Ray: a leak that is planted in generated logs is found, and none where none was planted."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import Audit, Ingest, Pipeline, Sequences, Synthetic
from recray.data.synthetic import generate
from recray.errors import DataError
from recray.schema import AUDIT, EVALUATION
from recray.stages import audit as stage
from recray.stages.flow import run_stages
from recray.workspace import Workspace

pytestmark = pytest.mark.usefixtures("ray_cluster")

USERS, ITEMS, CANDIDATES = 300, 600, 20
STAGES = ("ingest", "sequences", "audit")
BASELINES = ["popularity", "recent popularity", "recency", "co-occurrence", "transitions"]
LISTED = ["list overlap", "target's share of lists", "first in the list", "last in the list", "best place in the list"]


def audited(workspace: Workspace, ingest: Ingest, rows: int = 20_000, **settings: Any) -> dict[str, dict[str, Any]]:
    part = Audit(rows=rows, bootstrap_samples=300)
    pipeline = Pipeline(name="test", ingest=ingest, sequences=Sequences(**settings), audit=part)
    run_stages(pipeline, workspace, STAGES, force=frozenset())
    table = workspace.table("audit", "rules")
    assert table.schema.equals(AUDIT)
    return {rule["rule"]: rule for rule in table.to_pylist()}


def leaking(rules: dict[str, dict[str, Any]]) -> set[str]:
    return {name for name, rule in rules.items() if rule["verdict"] == "leak"}


def facts(workspace: Workspace) -> dict[str, tuple[int | None, int | None]]:
    return {fact["fact"]: (fact["number"], fact["of"]) for fact in workspace.json("audit", "facts.json")}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated logs in time order, and a catalogue with one more number an item."""
    folder = tmp_path_factory.mktemp("logs")
    generate(folder, Synthetic(interactions=60 * USERS, users=USERS, items=ITEMS), seed=0)
    items = pq.read_table(folder / "items.parquet")
    numbers = np.random.default_rng(1).permutation(items.num_rows) + 10_000
    pq.write_table(items.append_column("shelf_mark", pa.array(numbers)), folder / "items.parquet")
    return folder


def by_user(logs: Path) -> list[list[int]]:
    log = pq.read_table(logs / "interactions.parquet").sort_by([("user_id", "ascending"), ("timestamp", "ascending")])
    return log.group_by("user_id", use_threads=False).aggregate([("item_id", "list")])["item_id_list"].to_pylist()


def drawn(seed: list[int], barred: list[int]) -> list[int]:
    """Return negatives that the seed decides."""
    order = (np.random.default_rng(seed).permutation(ITEMS) + 1).tolist()
    return [item for item in order if item not in barred][: CANDIDATES - 1]


def publish(logs: Path, folder: Path, *, key: Any = None, lists: str = "free") -> Ingest:
    """Write the logs as published sequences, sorted by `key` where there is one, with lists of one kind."""
    folder.mkdir()
    pq.write_table(pq.read_table(logs / "items.parquet"), folder / "items.parquet")
    rows, rng = [], np.random.default_rng(2)
    for user, met in enumerate(met for met in by_user(logs) if len(met) >= 12):
        items = met if key is None else sorted(met, key=key)
        split = ("train", "train", "train", "val", "test")[user % 5]  # users of the test are in no other split
        for cut in sorted(rng.choice(np.arange(len(items) // 4, len(items)), 5, replace=False).tolist()):
            target = items[cut]
            seed = [7, target] if lists == "by target" else [8, user, cut]
            barred = [target] if lists == "by target" else items
            candidates = rng.permutation([target, *drawn(seed, barred)]).tolist()
            if lists == "target last":
                candidates = [*(item for item in candidates if item != target), target]
            rows.append(
                (split, f"u{user}", items[:cut], target, candidates if split == "test" or lists != "free" else None)
            )
    columns = dict(zip(("split", "user_id", "history", "target", "candidates"), zip(*rows, strict=True), strict=True))
    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), folder / "sequences.parquet")
    return Ingest(data=str(folder))


@pytest.mark.parametrize("split", ["time_cut", "leave_one_out"])
def test_generated_logs_are_clear(logs: Path, workspace: Workspace, split: str) -> None:
    rules = audited(workspace, Ingest(data=str(logs)), split=split, num_candidates=CANDIDATES, max_test_rows=300)
    assert leaking(rules) == set()
    ids = ["id", "shelf_mark"]
    ordered = [name for each in ids for name in rules if name.endswith((f" {each} above", f" {each} below"))]
    assert len(ordered) == 2
    nearest = [f"nearest {each}" for each in ids]
    assert sorted(rules) == sorted(
        [*BASELINES, *ordered, *nearest, "title order", "one order of all histories", *LISTED]
    )
    assert all(rule["low"] <= rule["value"] <= rule["high"] for rule in rules.values())
    assert all(rule["chance"] == pytest.approx(1 / CANDIDATES) for rule in rules.values())
    told = facts(workspace)
    later = told["training interactions later than half of the targets"]
    own = told["rows with training of the same user later"]
    assert own == (0, 300)
    assert (later[0] == 0) == (split == "time_cut")  # leaving out the last trains on what others did later
    assert told["targets already met"] == (0, 300)
    assert told["rows that stand twice"] == (0, 300)


def test_published_lists_without_a_leak_are_clear(logs: Path, workspace: Workspace, tmp_path: Path) -> None:
    rules = audited(workspace, publish(logs, tmp_path / "free"), split="published", max_history=60)
    assert leaking(rules) == set()
    assert facts(workspace)["training interactions later than half of the targets"] == (None, None)


def _column(logs: Path, name: str, sign: int) -> Any:
    items = pq.read_table(logs / "items.parquet")
    values = dict(zip(items["item_id"].to_pylist(), items[name].to_pylist(), strict=True))
    place = {value: sign * rank for rank, value in enumerate(sorted(set(values.values())))}
    return lambda item: place[values[item]]


@pytest.mark.parametrize(
    ("column", "sign", "rule"),
    [
        ("item_id", 1, "smallest id above"),
        ("item_id", -1, "largest id below"),
        ("shelf_mark", 1, "smallest shelf_mark above"),
        ("title", 1, "title order"),
        ("title", -1, "title order"),
    ],
)
def test_histories_that_are_sorted_are_found(
    logs: Path, workspace: Workspace, tmp_path: Path, column: str, sign: int, rule: str
) -> None:
    ingest = publish(logs, tmp_path / "sorted", key=_column(logs, column, sign))
    rules = audited(workspace, ingest, split="published", max_history=60)
    assert rule in leaking(rules)
    assert rules["one order of all histories"]["verdict"] != "clear"  # transitions live on the order, too
    assert leaking(rules).isdisjoint({*BASELINES, *LISTED})
    assert "time_cut" in rules[rule]["advice"]


def test_histories_that_are_sorted_by_what_the_catalogue_does_not_hold_are_found(
    logs: Path, workspace: Workspace, tmp_path: Path
) -> None:
    secret = np.random.default_rng(5).permutation(ITEMS + 1).tolist()
    rules = audited(
        workspace, publish(logs, tmp_path / "secret", key=secret.__getitem__), split="published", max_history=60
    )
    assert leaking(rules) == {"one order of all histories"}


@pytest.mark.parametrize(
    ("lists", "expected"),
    [("by target", {"list overlap"}), ("target last", {"last in the list", "best place in the list"})],
)
def test_lists_that_give_the_target_away_are_found_and_fresh_ones_do_not(
    logs: Path, workspace: Workspace, tmp_path: Path, lists: str, expected: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    ingest = publish(logs, tmp_path / "lists", lists=lists)
    rules = audited(workspace, ingest, split="published", max_history=60)
    assert leaking(rules) == expected
    for rule in expected:
        assert "--fresh-candidates" in rules[rule]["advice"]
        assert any(record.levelname == "WARNING" and rule in record.getMessage() for record in caplog.records)
    assert set(workspace.require("audit").facts["leaks"]) == expected
    fresh = audited(
        workspace, ingest, split="published", max_history=60, fresh_candidates=True, num_candidates=CANDIDATES
    )
    assert leaking(fresh) == set()


def test_more_rows_than_asked_for_are_sampled_by_the_seed(logs: Path, tmp_path: Path) -> None:
    settings = {"split": "leave_one_out", "num_candidates": CANDIDATES, "max_test_rows": 300}
    found = []
    for name in ("one", "two"):
        workspace = Workspace(str(tmp_path / name))
        found.append(audited(workspace, Ingest(data=str(logs)), rows=100, **settings))
        stated = workspace.require("audit").facts
        assert (stated["test_rows"], stated["audited_rows"]) == (300, 100)
        assert facts(workspace)["cold targets"][1] == 300  # facts are of all rows
    assert found[0] == found[1]
    full = audited(Workspace(str(tmp_path / "full")), Ingest(data=str(logs)), **settings)
    assert full != found[0]


def test_blocks_decide_nothing(logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"split": "leave_one_out", "num_candidates": CANDIDATES, "max_test_rows": 300}
    one = audited(Workspace(str(tmp_path / "one")), Ingest(data=str(logs)), **settings)
    monkeypatch.setattr(stage, "ROWS_AT_ONCE", 70)
    assert audited(Workspace(str(tmp_path / "many")), Ingest(data=str(logs)), **settings) == one


def test_no_test_rows_are_refused(workspace: Workspace, logs: Path) -> None:
    audited(workspace, Ingest(data=str(logs)), split="leave_one_out", num_candidates=CANDIDATES, max_test_rows=300)
    pq.write_table(EVALUATION.empty_table(), workspace.path("sequences", "test", "part-0.parquet"))
    part = Sequences(split="leave_one_out", num_candidates=CANDIDATES, max_test_rows=300)
    pipeline = Pipeline(name="test", ingest=Ingest(data=str(logs)), sequences=part)
    with pytest.raises(DataError, match="nothing to audit"):
        run_stages(pipeline, workspace, ("audit",), force=frozenset({"audit"}))


def test_lastfm_leaks_twice(recray_data: Path, workspace: Workspace) -> None:
    rules = audited(workspace, Ingest(data=str(recray_data / "lastfm")), split="published")
    ordered = {"smallest hetrec_artist_id above", "nearest hetrec_artist_id", "one order of all histories"}
    assert leaking(rules) == {*ordered, "list overlap"}
    assert rules["smallest hetrec_artist_id above"]["value"] == pytest.approx(0.781, abs=0.002)
    assert rules["list overlap"]["value"] == pytest.approx(0.99, abs=0.01)
    assert facts(workspace)["rows of the ten largest users"] == (1129, 2495)


def test_fresh_candidates_do_not_hide_that_lastfm_is_sorted(recray_data: Path, workspace: Workspace) -> None:
    rules = audited(
        workspace, Ingest(data=str(recray_data / "lastfm")), split="published", fresh_candidates=True, num_candidates=20
    )
    assert leaking(rules) >= {"smallest hetrec_artist_id above", "one order of all histories"}
    assert not leaking(rules) & set(LISTED)


def test_amazon_is_worth_a_look_and_no_leak(recray_data: Path, workspace: Workspace) -> None:
    ingest = Ingest(data=str(recray_data / "amazon_games"))
    rules = audited(workspace, ingest, rows=3000, split="published")
    assert leaking(rules) == set()
    nearest = rules["nearest id"]
    assert nearest["verdict"] == "look"
    assert 3 < nearest["value"] / nearest["chance"] < 7


def test_movielens_cut_in_time_is_clear(recray_data: Path, workspace: Workspace) -> None:
    rules = audited(workspace, Ingest(data=str(recray_data / "ml-latest-small")), split="time_cut")
    assert leaking(rules) == set()
    assert facts(workspace)["training interactions later than half of the targets"][0] == 0


def test_steam_has_cold_targets(recray_data: Path, workspace: Workspace) -> None:
    rules = audited(workspace, Ingest(data=str(recray_data / "sprec_steam")), split="published")
    assert leaking(rules) == set()
    assert facts(workspace)["cold targets"] == (252, 1000)
