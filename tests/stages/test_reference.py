"""What `reference` scores and what it keeps; the actor is called here, without Ray (with it: test_fitting.py)."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from recray.config import Pipeline, override
from recray.data.catalogue import Catalogue
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.lm.load import make_model, save_model
from recray.schema import NEGATIVES, REFERENCE
from recray.stages import reference
from recray.stages.flow import STAGES, run_stages
from recray.stages.item_scores import ScoreItems
from recray.stages.recommender import labels_of
from recray.workspace import Workspace

NONE: frozenset[str] = frozenset()
ROWS = 90


def write(workspace: Workspace, pipeline: Pipeline, stage: str, name: str, content: pa.Table | Path) -> None:
    """Finish a stage with one table or one folder."""
    part = getattr(pipeline, stage).model_dump(mode="json")
    inputs = {name: workspace.require(name).fingerprint for name in STAGES[stage].inputs}
    with workspace.stage(stage, version=STAGES[stage].version, part=part, seed=0, inputs=inputs) as out:
        (out.write_folder if isinstance(content, Path) else out.write_table)(name, content)  # type: ignore[arg-type]


def draw(workspace: Workspace, pipeline: Pipeline) -> None:
    """Finish `negatives` with prefix-nested draws."""
    train = workspace.table("sequences", "train").sort_by("row")
    rng = np.random.default_rng(5)
    drawn = [
        np.setdiff1d(rng.permutation(40), [target], assume_unique=True)[: pipeline.negatives.num]
        for target in train["target"].to_pylist()
    ]
    write(workspace, pipeline, "negatives", "train", pa.table([train["row"], drawn], schema=NEGATIVES))


@pytest.fixture
def ready(prepared: Workspace, tiny_pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace with everything that `reference` reads; its model has not learned anything."""
    monkeypatch.setattr(reference, "_score", score)
    for name in ("ingest", "sequences"):
        shutil.copytree(prepared.path(name), tmp_path / "workspace" / name)
    workspace = Workspace(str(tmp_path / "workspace"))
    labels, template = labels_of(workspace), find_template(tiny_pipeline.sft.prompt.template)
    tokenizer = train_tokenizer(training_texts(template, labels), 320)
    model = make_model(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=24, max_positions=256, seed=0)
    save_model(tmp_path / "model", model, tokenizer, Catalogue.build(labels, tokenizer, template, 128))
    write(workspace, tiny_pipeline, "sft", "model", tmp_path / "model")
    draw(workspace, tiny_pipeline)
    return workspace


def score(job: Any, rows: pa.Table) -> pa.Table:
    """In place of Ray Data: the actor, on blocks that come back in another order."""
    actor = ScoreItems(job.workspace, ("sft", "model"), job.part.tokens_per_micro_batch, 1)
    blocks = [actor(rows.slice(start, 32)) for start in range(0, rows.num_rows, 32)]
    return pa.concat_tables([*blocks[::-1], REFERENCE.empty_table()])


def run(workspace: Workspace, pipeline: Pipeline, force: frozenset[str] = NONE) -> tuple[dict[str, int], np.ndarray]:
    """Run the stage; return what it counted, and its scores in order of rows and items."""
    run_stages(pipeline, workspace, ("reference",), force=force)
    table = workspace.table("reference", "train").sort_by("row")
    items, scores = (np.array(table[name].to_pylist()) for name in ("items", "scores"))
    return workspace.require("reference").counts, np.take_along_axis(scores, np.argsort(items, axis=1), axis=1)


def counts(scored: int, kept: int) -> dict[str, int]:
    return {"train": ROWS, "scores": ROWS * (scored + kept), "scored": ROWS * scored, "kept": ROWS * kept}


def test_more_negatives_score_the_new_pairs_only(ready: Workspace, tiny_pipeline: Pipeline) -> None:
    assert run(ready, tiny_pipeline)[0] == counts(4, 0)
    more = override(tiny_pipeline, settings=["negatives.num=5"])
    draw(ready, more)
    found, grown = run(ready, more)
    assert found == counts(2, 4)
    draw(ready, tiny_pipeline)
    assert run(ready, tiny_pipeline)[0] == counts(0, 4)
    draw(ready, more)
    found, fresh = run(ready, more, force=frozenset({"reference"}))
    assert found == counts(6, 0)
    np.testing.assert_allclose(grown, fresh, atol=1e-5)


def test_another_model_scores_all(ready: Workspace, tiny_pipeline: Pipeline) -> None:
    _, before = run(ready, tiny_pipeline)
    file = Path(ready.path("sft", "model", "model.safetensors"))
    save_file({name: 1.1 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    other = override(tiny_pipeline, settings=["reference.tokens_per_micro_batch=999"])
    found, after = run(ready, other)
    assert found == counts(4, 0)
    assert np.abs(after - before).max() > 0.01


def test_prompts_that_show_candidates_share_no_score(ready: Workspace, tiny_pipeline: Pipeline, tmp_path: Path) -> None:
    shown = override(tiny_pipeline, settings=["sft.prompt.template=instruction_candidates"])
    labels, template = labels_of(ready), find_template("instruction_candidates")
    tokenizer = train_tokenizer(training_texts(template, labels), 320)
    model = make_model(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=24, max_positions=512, seed=0)
    save_model(tmp_path / "shown", model, tokenizer, Catalogue.build(labels, tokenizer, template, 300))
    write(ready, shown, "sft", "model", tmp_path / "shown")
    assert run(ready, shown)[0] == counts(4, 0)
    more = override(shown, settings=["negatives.num=5"])
    draw(ready, more)
    assert run(ready, more)[0] == counts(6, 0)


def test_nothing_is_scored_where_training_scores_the_reference(ready: Workspace, tiny_pipeline: Pipeline) -> None:
    off = override(tiny_pipeline, settings=["reference.source=frozen_copy"])
    run_stages(off, ready, ("reference",), force=NONE)
    assert ready.table("reference", "train").schema.equals(REFERENCE)
    assert ready.require("reference").counts == {"train": 0}
    assert ready.json("reference", "fingerprint.json")["weights"]
