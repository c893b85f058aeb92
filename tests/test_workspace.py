"""What a workspace promises: whole stages or none, nothing done twice, nothing mixed."""

import json
import logging
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pytest

from recray.config import Pipeline, override
from recray.errors import ConfigError, DataError, WorkspaceError
from recray.stages.flow import MAIN_JOB, STAGES, Job, run_stages
from recray.workspace import Workspace, fingerprint

TABLE = pa.table({"row": [0, 1, 2]})
PIPELINE = Pipeline(name="test")


def write_stage(workspace: Workspace, stage: str = "ingest", table: pa.Table = TABLE) -> None:
    with workspace.stage(stage, version=1, part={"a": 1}, seed=0, inputs={}) as out:
        out.write_table("items", table)
        out.facts["kind"] = "test"


def fail_stage(workspace: Workspace, error: BaseException) -> None:
    with workspace.stage("ingest", version=1, part={}, seed=0, inputs={}) as out:
        out.write_table("items", TABLE.slice(0, 1))
        raise error


def test_a_stage_leaves_its_tables_and_says_where_they_came_from(workspace: Workspace) -> None:
    write_stage(workspace)
    manifest = workspace.require("ingest")
    assert workspace.table("ingest", "items").equals(TABLE)
    assert workspace.table("ingest", "items", columns=["row"]).column_names == ["row"]
    assert manifest.counts == {"items": 3}
    assert manifest.facts == {"kind": "test"}
    assert manifest.part == {"a": 1}
    assert {"recray", "python", "torch", "ray"} <= set(manifest.versions)
    assert not workspace.exists(".partial", "ingest")


def test_a_stage_that_fails_leaves_nothing(workspace: Workspace) -> None:
    with pytest.raises(DataError):
        fail_stage(workspace, DataError("row 7 is broken"))
    assert not workspace.exists("ingest")
    assert not workspace.exists(".partial", "ingest")
    with pytest.raises(WorkspaceError, match="recray ingest"):
        workspace.table("ingest", "items")


def test_an_interrupted_stage_leaves_nothing(workspace: Workspace) -> None:
    with pytest.raises(KeyboardInterrupt):
        fail_stage(workspace, KeyboardInterrupt())
    assert not workspace.exists(".partial", "ingest")


def test_a_stage_that_fails_again_keeps_the_whole_one(workspace: Workspace) -> None:
    write_stage(workspace)
    with pytest.raises(DataError):
        fail_stage(workspace, DataError("no"))
    assert workspace.table("ingest", "items").num_rows == 3


def test_a_second_run_replaces_the_first_wholly(workspace: Workspace) -> None:
    with workspace.stage("ingest", version=1, part={}, seed=0, inputs={}) as out:
        out.write_table("items", TABLE)
        out.write_json("old.json", 1)
    write_stage(workspace, table=TABLE.slice(0, 1))
    assert workspace.table("ingest", "items").num_rows == 1
    assert not workspace.exists("ingest", "old.json")


def test_what_a_killed_process_left_is_removed(workspace: Workspace) -> None:
    workspace.write_json("half", ".partial", "ingest", "items", "part-9.parquet")
    write_stage(workspace)
    assert workspace.table("ingest", "items").num_rows == 3


def test_a_stage_without_a_manifest_does_not_count(workspace: Workspace) -> None:
    write_stage(workspace)
    workspace.fs.delete_file(workspace.path("ingest", "manifest.json"))
    assert workspace.manifest("ingest") is None
    with pytest.raises(WorkspaceError, match="no finished `ingest`"):
        workspace.require("ingest")


def test_a_folder_is_written_and_found_whole(workspace: Workspace, tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "deep" / "weights").write_bytes(b"123")
    with workspace.stage("sft", version=1, part={}, seed=0, inputs={}) as out:
        out.write_folder("model", model)
    assert (workspace.folder("sft", "model") / "deep" / "weights").read_bytes() == b"123"


def test_a_workspace_belongs_to_one_recipe_on_one_set_of_data(workspace: Workspace) -> None:
    workspace.claim("movielens", "/data/a")
    workspace.claim("movielens", "/data/a")
    for name, data in (("amazon", "/data/a"), ("movielens", "/data/b"), ("movielens", None)):
        with pytest.raises(WorkspaceError, match="belongs to recipe 'movielens' on data '/data/a'") as refused:
            workspace.claim(name, data)
        assert repr(name) in str(refused.value)


def test_a_workspace_travels_to_workers(workspace: Workspace) -> None:
    write_stage(workspace)
    assert pickle.loads(pickle.dumps(workspace)).table("ingest", "items").equals(TABLE)


def test_a_scheme_that_cannot_be_opened_is_refused() -> None:
    with pytest.raises(WorkspaceError, match="nowhere://x"):
        Workspace("nowhere://x")


def test_a_fingerprint_changes_with_everything_that_decides_the_output() -> None:
    same = ("ingest", 1, {"a": {"b": 1}}, 0, {"data": "x"})
    others = [
        ("sft", 1, {"a": {"b": 1}}, 0, {"data": "x"}),
        ("ingest", 2, {"a": {"b": 1}}, 0, {"data": "x"}),
        ("ingest", 1, {"a": {"b": 2}}, 0, {"data": "x"}),
        ("ingest", 1, {"a": {"b": 1}}, 1, {"data": "x"}),
        ("ingest", 1, {"a": {"b": 1}}, 0, {"data": "y"}),
    ]
    assert fingerprint(*same) == fingerprint("ingest", 1, {"a": {"b": 1}}, 0, {"data": "x"})
    assert len({fingerprint(*same), *(fingerprint(*each) for each in others)}) == 6


# The flow, with stages that only write which run they are of.


class Flow:
    """Stands in for the modules of all stages and for the data, and counts runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.data = "one"
        for name in STAGES:
            module = ModuleType(f"recray.stages.{name}")
            module.run = self._run_as(name)  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
        logs = ModuleType("recray.data.logs")
        logs.data_print = lambda _: self.data  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, logs.__name__, logs)

    def _run_as(self, name: str) -> object:
        def run(job: Job) -> None:
            assert job.part is getattr(job.pipeline, name)
            self.ran.append(name)
            job.out.write_table("rows", TABLE)

        return run

    def __call__(
        self, workspace: Workspace, *names: str, pipeline: Pipeline = PIPELINE, force: str | None = None
    ) -> list[str]:
        """Run the stages (all of the main job if none is named) and return those that were not skipped."""
        self.ran.clear()
        run_stages(pipeline, workspace, names or MAIN_JOB, force=frozenset([force] if force else []))
        return list(self.ran)


@pytest.fixture
def flow(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flow]:
    return Flow(monkeypatch)  # type: ignore[return-value]


def changed(*settings: str) -> Pipeline:
    return override(PIPELINE, settings=list(settings))


def test_the_stages_come_after_what_they_read() -> None:
    for place, name in enumerate(MAIN_JOB):
        assert set(STAGES[name].inputs) <= set(MAIN_JOB[:place])
    assert set(STAGES) == set(MAIN_JOB) | {"tune", "compare"}


def test_a_second_run_does_nothing_and_says_so(
    workspace: Workspace, flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    assert flow(workspace) == list(MAIN_JOB)
    with caplog.at_level(logging.INFO, logger="recray"):
        assert flow(workspace) == []
    assert all(f"{name}: up to date" in caplog.text for name in MAIN_JOB)


def test_a_setting_runs_its_stage_again_and_what_reads_it(workspace: Workspace, flow: Flow) -> None:
    flow(workspace)
    assert flow(workspace, pipeline=changed("align.steps=7")) == ["align", "evaluate", "report"]
    assert "ingest" not in flow(workspace, pipeline=changed("sequences.max_history=7"))


def test_resources_change_no_result(workspace: Workspace, flow: Flow) -> None:
    flow(workspace)
    assert flow(workspace, pipeline=changed("resources.num_workers=2")) == []


@pytest.mark.parametrize("by", ["seed", "data"])
def test_another_seed_or_other_data_runs_everything_again(workspace: Workspace, flow: Flow, by: str) -> None:
    flow(workspace)
    flow.data = "two" if by == "data" else flow.data
    assert flow(workspace, pipeline=changed("seed=1") if by == "seed" else PIPELINE) == list(MAIN_JOB)


def test_force_runs_a_stage_that_is_up_to_date(workspace: Workspace, flow: Flow) -> None:
    flow(workspace)
    assert flow(workspace, force="users") == ["users"]


def test_the_reason_for_running_again_is_told(
    workspace: Workspace, flow: Flow, caplog: pytest.LogCaptureFixture
) -> None:
    flow(workspace)
    with caplog.at_level(logging.INFO, logger="recray"):
        flow(workspace, pipeline=changed("align.steps=7"))
    assert f"steps was {PIPELINE.align.steps}, now 7" in caplog.text
    assert "evaluate: starts again, changed: align" in caplog.text
    older = workspace.json("align", "manifest.json")
    older["part"] = {key: value for key, value in older["part"].items() if key != "window_rows"} | {"gone": 3}
    older["fingerprint"] = "another"
    workspace.write_json(older, "align", "manifest.json")  # as a version wrote it that knew other settings
    with caplog.at_level(logging.INFO, logger="recray"):
        flow(workspace, pipeline=changed("align.steps=7"))
    assert "window_rows is new, 65536; gone is gone, it was 3" in caplog.text


def test_one_stage_alone_refuses_missing_and_stale_inputs(workspace: Workspace, flow: Flow) -> None:
    with pytest.raises(WorkspaceError, match="recray ingest"):
        flow(workspace, "sequences")
    flow(workspace)
    with pytest.raises(WorkspaceError, match=r"`sequences`.*max_history was 20, now 7.*recray sequences"):
        flow(workspace, "users", pipeline=changed("sequences.max_history=7"))
    with pytest.raises(WorkspaceError, match="seed was 0, now 5"):
        flow(workspace, "users", pipeline=changed("seed=5"))


def test_an_unknown_stage_is_refused_before_anything_runs(workspace: Workspace, flow: Flow) -> None:
    with pytest.raises(ConfigError, match="no stage 'aling'"):
        flow(workspace, force="aling")
    assert flow.ran == []


def test_a_stage_that_failed_is_where_the_next_run_goes_on(
    workspace: Workspace, flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: Job) -> None:
        job.out.write_table("rows", TABLE)
        raise DataError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["recray.stages.sft"], "run", broken)
        with pytest.raises(DataError):
            flow(workspace)
    assert flow(workspace) == list(MAIN_JOB[MAIN_JOB.index("sft") :])


def test_a_stage_tells_what_it_cost(workspace: Workspace, flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    def fitted(job: Job) -> None:
        kept = bytearray(200 * 2**20)
        job.out.counts["steps"] = 50
        job.out.facts["training_seconds"] = 8.0  # of all attempts; the stage itself took less
        lines = [{"kind": "train", "tokens_per_s": speed} for speed in (100.0, 300.0, 900.0)]
        job.out.write_bytes("metrics.jsonl", "\n".join(map(json.dumps, lines)).encode())
        del kept

    def slow(job: Job) -> None:
        time.sleep(0.2)
        job.out.write_table("rows", TABLE)

    monkeypatch.setattr(sys.modules["recray.stages.align"], "run", fitted)
    monkeypatch.setattr(sys.modules["recray.stages.evaluate"], "run", slow)
    flow(workspace)
    cost = workspace.require("align").facts["cost"]
    assert cost["rows_per_s"] == 50 * PIPELINE.align.global_batch / 8.0
    assert cost["tokens_per_s"] == 300.0
    assert 0 < cost["largest_process_gib"] <= cost["peak_memory_gib"]
    other = workspace.require("evaluate").facts["cost"]
    assert other["rows_per_s"] * workspace.require("evaluate").seconds == pytest.approx(3, rel=0.5)
    assert "tokens_per_s" not in other
    assert "rows_per_s" not in workspace.require("report").facts["cost"]  # makes no rows
