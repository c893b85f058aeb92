"""The report stage on a workspace written by hand: it needs tables and manifests only, and no Ray."""

import json

import pyarrow as pa
import pytest

from recray import schema
from recray.config import Evaluate, Pipeline, Report, Resources
from recray.errors import WorkspaceError
from recray.ranking.slices import COLD
from recray.stages import report
from recray.stages.flow import Job
from recray.workspace import Workspace

MODELS = ("sft", "aligned")
ROWS = 8


def _interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1}


def _fill(workspace: Workspace) -> None:
    titles = ["Plain", "<b>Bold</b>", "Third", "Fourth"]
    items = [{"item": i, "item_id": str(i), "title": t, "label": t, "genres": []} for i, t in enumerate(titles)]
    test = [
        {"row": row, "user_id": f"u{row}", "history": [row % 4], "target": 1, "candidates": [0, 1, 2]}
        for row in range(ROWS)
    ]
    ranked = [
        {
            "model": model,
            "row": row,
            "user_id": f"u{row}",
            "target": 1,
            "num_candidates": 3,
            "rank": 2,
            "ranked": [0, 1, 2],
        }
        for model in MODELS
        for row in range(ROWS)
    ]
    numbers = {"rows": ROWS, "users": ROWS, "hr@1": _interval(0.5), "ndcg@10": _interval(0.5)}
    with workspace.stage("ingest", version=1, part={}, seed=0, inputs={"data": "x"}) as out:
        out.write_table("items", pa.Table.from_pylist(items, schema=schema.CATALOGUE))
    with workspace.stage("sequences", version=1, part={}, seed=0, inputs={"ingest": "x"}) as out:
        out.write_table("test", pa.Table.from_pylist(test, schema=schema.EVALUATION))
    with workspace.stage("align", version=1, part={}, seed=0, inputs={}) as out:
        lines = [{"kind": "train", "step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
        out.write_bytes("metrics.jsonl", "\n".join(json.dumps(line) for line in lines).encode() + b"\n\n")
    with workspace.stage("users", version=1, part={}, seed=0, inputs={}) as out:
        out.write_json("curve.json", [{"pass": 1, "loss": 2.0}])
    with workspace.stage("evaluate", version=1, part={}, seed=0, inputs={"sequences": "x"}) as out:
        out.write_table("rows", pa.Table.from_pylist(ranked, schema=schema.RANKED_ROWS))
        out.write_json("metrics.json", [{"model": model, **numbers} for model in MODELS])
        out.write_json("differences.json", [{"model": "aligned", "minus": "sft", **numbers}])
        cold = {"by": "target in training", "slice": COLD, "rows": 2, "of": ROWS, "users": 2}
        out.write_json("slices.json", [{**cold, "models": {model: {"ndcg@10": _interval(0.25)} for model in MODELS}}])
        shares = [0.2] * 5
        exposure = {"groups": list("abcde"), "models": {"sft": shares}, "chosen": shares}
        out.write_json("exposure.json", exposure)


def _run(workspace: Workspace, part: Report) -> None:
    pipeline = Pipeline(name="test recipe", seed=3, evaluate=Evaluate(confidence=0.9), report=part)
    with workspace.stage("report", version=1, part={}, seed=3, inputs={}) as out:
        report.run(Job(part, 3, Resources(), workspace, out, "print", pipeline))


def _page(workspace: Workspace) -> str:
    with workspace.fs.open_input_stream(workspace.path("report", "report.html")) as stream:
        return str(stream.read().decode())


def test_page_and_terminal_show_the_run(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    _fill(workspace)
    _run(workspace, Report(examples=3))
    page = _page(workspace)
    for part in ("test recipe", "90 % interval", "Alignment", "SASRec", "&lt;b&gt;Bold&lt;/b&gt;", "rank 2 of 3"):
        assert part in page
    assert "2 of 8 rows" in page
    assert "<b>Bold" not in page
    assert page.count('class="example"') == 3
    assert workspace.require("report").facts["examples"] == 3
    terminal = capsys.readouterr().out
    assert "NDCG@10" in terminal
    assert COLD in terminal
    assert "Aligned − SFT" in terminal


def test_examples_are_drawn_by_the_seed_and_never_more_than_there_are(workspace: Workspace) -> None:
    _fill(workspace)
    few = report._examples(workspace, 2, seed=1)
    assert few == report._examples(workspace, 2, seed=1)
    assert len(report._examples(workspace, 50, seed=1)) == ROWS
    assert report._examples(workspace, 0, seed=1) == []
    drawn = {tuple(example.user_id for example in report._examples(workspace, 2, seed=s)) for s in range(6)}
    assert len(drawn) > 1


def test_an_example_joins_titles_by_item(workspace: Workspace) -> None:
    _fill(workspace)
    example = report._examples(workspace, ROWS, seed=0)[3]
    assert example.history == ["Fourth"]
    assert example.target == "<b>Bold</b>"
    assert [column.model for column in example.columns] == list(MODELS)
    assert [shown.is_target for shown in example.columns[0].shown] == [False, True, False]


def test_no_evaluation_is_an_error_that_says_what_to_run(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="recray evaluate"):
        _run(workspace, Report())
    assert not workspace.exists("report")


@pytest.mark.parametrize("verdict", ["leak", "clear"])
def test_the_audit_is_on_the_page_and_in_the_terminal(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], verdict: str
) -> None:
    _fill(workspace)
    numbers = {"metric": "hr@1", "value": 0.8, "low": 0.7, "high": 0.9, "chance": 0.05, "reason": "", "advice": ""}
    rules = [
        {"rule": "popularity", "kind": "baseline", **numbers, "verdict": "clear"},
        {"rule": "list overlap", "kind": "suspect", **numbers, "verdict": verdict},
    ]
    with workspace.stage("audit", version=1, part={}, seed=0, inputs={}) as out:
        out.write_table("rules", pa.Table.from_pylist(rules, schema=schema.AUDIT))
        out.write_json("facts.json", [{"fact": "cold targets", "number": 3, "of": 8, "note": ""}])
    _run(workspace, Report(examples=0))
    page = _page(workspace)
    assert "list overlap" in page
    assert "3 of 8" in page
    assert ("The evaluation leaks." in page) == (verdict == "leak")
    assert ("not about people" in capsys.readouterr().out.replace("\n", " ")) == (verdict == "leak")
