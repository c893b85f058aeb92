"""Negatives from a language model's own top list: its pools, by Ray Data, and what is drawn from them."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from recray.config import Negatives, Pipeline, Prompt
from recray.data.catalogue import Catalogue
from recray.data.examples import list_arrays
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.lm.load import make_model, save_model
from recray.lm.scorer import ItemScorer, score_rows
from recray.schema import POOLS
from recray.stages.flow import STAGES, run_stages
from recray.stages.recommender import labels_of, open_from
from recray.workspace import Workspace

NONE: frozenset[str] = frozenset()
pytestmark = pytest.mark.usefixtures("ray_cluster")


def ready_for_pools(prepared: Workspace, pipeline: Pipeline, folder: Path) -> Workspace:
    """Return a workspace with everything that such negatives read; its model has not learned anything."""
    for name in ("ingest", "sequences", "users"):
        shutil.copytree(prepared.path(name), folder / "workspace" / name)
    workspace = Workspace(str(folder / "workspace"))
    labels, template = labels_of(workspace), find_template(pipeline.sft.prompt.template)
    tokenizer = train_tokenizer(training_texts(template, labels), 320)
    model = make_model(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=24, max_positions=256, seed=0)
    save_model(folder / "model", model, tokenizer, Catalogue.build(labels, tokenizer, template, 128))
    inputs = {name: workspace.require(name).fingerprint for name in STAGES["sft"].inputs}
    part = pipeline.sft.model_dump(mode="json")
    with workspace.stage("sft", version=STAGES["sft"].version, part=part, seed=0, inputs=inputs) as out:
        out.write_folder("model", folder / "model")
    return workspace


def test_pools_are_ranked_by_the_model_and_negatives_come_from_them(
    prepared: Workspace, tiny_pipeline: Pipeline, tmp_path: Path
) -> None:
    pipeline = tiny_pipeline.model_copy(update={"negatives": Negatives(sampler="self_play", num=3, candidates=12)})
    workspace = ready_for_pools(prepared, pipeline, tmp_path)
    run_stages(pipeline, workspace, ("negatives",), force=NONE)
    examples = workspace.table("sequences", "train").sort_by("row")
    pools = workspace.table("negatives", "pools").sort_by("row")
    assert pools.schema.remove_metadata() == POOLS
    assert pools["row"].to_pylist() == examples["row"].to_pylist()
    assert set(pools["version"].to_pylist()) == {0}
    items, scores = list_arrays(pools["items"]), np.array(pools["scores"].to_pylist())
    assert (np.diff(scores, axis=1) <= 0).all()
    model, catalogue = open_from(workspace, "sft", "model")
    wanted = score_rows(
        ItemScorer(model).eval(), catalogue, list_arrays(examples["history"]), items, tokens_per_micro_batch=4096
    )
    np.testing.assert_allclose(scores, np.stack(wanted), rtol=1e-4, atol=1e-4)
    met = {user: set() for user in examples["user_id"].to_pylist()}
    for row in workspace.table("sequences", "histories").to_pylist():
        met[row["user_id"]] |= set(row["items"])
    for user, pool in zip(examples["user_id"].to_pylist(), items, strict=True):
        assert len(set(pool.tolist())) == 12
        assert not set(pool.tolist()) & met[user]
    drawn = np.array(workspace.table("negatives", "train").sort_by("row")["negatives"].to_pylist())
    np.testing.assert_array_equal(drawn, np.stack(items)[:, :3])
    manifest = workspace.require("negatives")
    assert manifest.inputs["sft"] == workspace.require("sft").fingerprint  # another model makes other negatives
    assert manifest.facts["negatives_from_fallback"] == 0

    settings = Negatives(sampler="top_k_stochastic", num=3, candidates=12, top_k=6)
    pipeline = tiny_pipeline.model_copy(update={"negatives": settings})
    run_stages(pipeline, workspace, ("negatives",), force=NONE)
    drawn = np.array(workspace.table("negatives", "train").sort_by("row")["negatives"].to_pylist())
    places = np.array([[pool.tolist().index(item) for item in row] for pool, row in zip(items, drawn, strict=True)])
    assert places.max() == 5
    assert len(np.unique(places[:, 0])) == 6


def test_a_prompt_that_shows_candidates_is_refused(
    prepared: Workspace, tiny_pipeline: Pipeline, tmp_path: Path
) -> None:
    shown = tiny_pipeline.sft.model_copy(update={"prompt": Prompt(template="instruction_candidates")})
    update = {"sft": shown, "negatives": Negatives(sampler="self_play", num=3, candidates=12)}
    pipeline = tiny_pipeline.model_copy(update=update)
    workspace = ready_for_pools(prepared, pipeline, tmp_path)
    with pytest.raises(Exception, match="negatives.sampler=self_play ranks items one by one"):
        run_stages(pipeline, workspace, ("negatives",), force=NONE)
