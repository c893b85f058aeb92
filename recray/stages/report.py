"""One HTML page about the run, from what the other stages left in the workspace, and its table in the terminal."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from recray.ranking.verdicts import leaks
from recray.report.findings import audit_sentence
from recray.report.page import Column, Contents, Example, Shown, render
from recray.report.tables import differences_table, results_table, slices_table
from recray.stages.flow import STAGES, Job
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

SHOWN = 5  # items of every model in an example
HISTORY_SHOWN = 10  # latest items of a history in an example


def run(job: Job) -> None:
    """Write `report.html` and show the results.

    Raises:
        WorkspaceError: if `evaluate` has not finished.
    """
    workspace = job.workspace
    workspace.require("evaluate")
    confidence = job.pipeline.evaluate.confidence
    contents = Contents(
        name=job.pipeline.name,
        manifests=_manifests(workspace),
        metrics=workspace.json("evaluate", "metrics.json"),
        differences=workspace.json("evaluate", "differences.json"),
        exposure=workspace.json("evaluate", "exposure.json"),
        slices=workspace.json("evaluate", "slices.json"),
        generation=_generation(workspace),
        **_audit(workspace),
        fits={stage: _lines(workspace, stage) for stage in ("users", "sft", "align")},
        examples=_examples(workspace, job.part.examples, job.seed),
        pipeline=job.pipeline.model_dump(mode="json"),
        confidence=confidence,
    )
    page = render(contents).encode()
    job.out.write_bytes("report.html", page)
    job.out.facts["examples"] = len(contents.examples)
    job.out.facts["kilobytes"] = round(len(page) / 1000)
    console = Console()
    console.print(results_table(contents.metrics, confidence=confidence))
    console.print(differences_table(contents.differences, confidence=confidence))
    console.print(slices_table(contents.slices, confidence=confidence))
    if contents.audit:
        console.print(audit_sentence(contents.audit), style="bold red" if leaks(contents.audit) else "")
    logger.info("report: %s", workspace.path("report", "report.html"))


def _audit(workspace: Workspace) -> dict[str, Any]:
    """Return what the page shows of the audit; nothing where there was none."""
    if workspace.manifest("audit") is None:
        return {}
    rules = workspace.table("audit", "rules").to_pylist()
    return {"audit": rules, "audit_facts": workspace.json("audit", "facts.json")}


def _generation(workspace: Workspace) -> Mapping[str, Any] | None:
    """Return what free generation came to; None where nothing was written."""
    if not workspace.exists("evaluate", "generation.json"):
        return None
    found: Mapping[str, Any] = workspace.json("evaluate", "generation.json")
    return found


def _manifests(workspace: Workspace) -> dict[str, Any]:
    found = {name: workspace.manifest(name) for name in STAGES["report"].inputs}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def _lines(workspace: Workspace, stage: str) -> list[Mapping[str, Any]]:
    """Return the metrics lines of a fit; none if it left none."""
    if workspace.exists(stage, "curve.json"):
        curve: list[Mapping[str, Any]] = workspace.json(stage, "curve.json")
        return curve
    if not workspace.exists(stage, "metrics.jsonl"):
        return []
    with workspace.fs.open_input_stream(workspace.path(stage, "metrics.jsonl")) as stream:
        return [json.loads(line) for line in stream.read().decode().splitlines() if line.strip()]


def _examples(workspace: Workspace, number: int, seed: int) -> list[Example]:
    """Return test rows drawn by the seed, each with what every model showed."""
    if number == 0:
        return []
    test = workspace.table("sequences", "test").sort_by("row")
    chosen = np.random.default_rng(seed).permutation(test.num_rows)[:number]
    rows = test.take(pa.array(np.sort(chosen)))
    ranked = workspace.table("evaluate", "rows")
    ranked = ranked.filter(pc.is_in(ranked["row"], rows["row"].combine_chunks()))
    by_row: dict[int, dict[str, Mapping[str, Any]]] = {}
    for entry in ranked.to_pylist():
        by_row.setdefault(entry["row"], {})[entry["model"]] = entry
    items = workspace.table("ingest", "items", columns=["item", "title"]).sort_by("item")
    titles: list[str] = items["title"].to_pylist()
    models = [entry["model"] for entry in workspace.json("evaluate", "metrics.json")]
    return [_example(row, by_row[row["row"]], models, titles) for row in rows.to_pylist()]


def _example(
    row: Mapping[str, Any], ranked: Mapping[str, Mapping[str, Any]], models: list[str], titles: list[str]
) -> Example:
    columns = []
    for model in models:
        shown = [Shown(titles[item], item == row["target"]) for item in ranked[model]["ranked"][:SHOWN]]
        columns.append(Column(model, ranked[model]["rank"], shown))
    return Example(
        user_id=row["user_id"],
        history=[titles[item] for item in row["history"][-HISTORY_SHOWN:]],
        target=titles[row["target"]],
        num_candidates=len(row["candidates"]),
        columns=columns,
    )
