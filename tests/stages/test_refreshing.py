"""Negatives drawn again while a model is aligned: from what it ranks highest by then, scored by the frozen one."""

from pathlib import Path

import numpy as np
import pytest

from recray.config import Negatives, Pipeline, override
from recray.data.examples import Examples, ExampleShards, matrix
from recray.errors import ConfigError, RecrayError
from recray.lm.scorer import ItemScorer, score_rows
from recray.stages import alignment as aligning
from recray.stages.alignment import alignment, remove_parts, run_alignment, write_examples
from recray.stages.flow import run_stages
from recray.stages.recommender import open_from
from recray.workspace import Workspace
from tests.stages.test_pools import NONE, ready_for_pools

POOL = Negatives(sampler="top_k_stochastic", num=3, candidates=12, top_k=6)
pytestmark = pytest.mark.usefixtures("ray_cluster")


def _scores(workspace: Workspace, folder: tuple[str, ...], examples: Examples) -> np.ndarray:
    model, catalogue = open_from(workspace, *folder)
    items = list(examples.items)
    found = score_rows(ItemScorer(model).eval(), catalogue, examples.histories, items, tokens_per_micro_batch=4096)
    return np.stack(found)


def test_a_run_goes_on_with_negatives_that_the_model_ranks_highest_by_then(
    prepared: Workspace, tiny_pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [
        "align.steps=4",
        "align.validate_every=2",
        "align.refresh_every=2",
        "align.optimiser.learning_rate=3e-2",
    ]
    pipeline = override(tiny_pipeline.model_copy(update={"negatives": POOL}), settings=settings)
    workspace = ready_for_pools(prepared, pipeline, tmp_path)
    run_stages(pipeline, workspace, ("negatives", "reference"), force=NONE)
    write_examples(workspace, "examples")
    setting = alignment(workspace, pipeline.align, 0, "examples")

    def stopped(*_: object, **__: object) -> None:
        raise RecrayError("the machine went away")

    monkeypatch.setattr(aligning, "draw_again", stopped)
    with pytest.raises(RecrayError, match="went away"):
        run_alignment(setting, pipeline.resources, run="fit", name="fit")
    monkeypatch.undo()
    assert workspace.json(".training", "fit-part-1-policy", "whole.json") == {"step": 2}
    fitted = run_alignment(setting, pipeline.resources, run="fit", name="fit")
    assert fitted.progress.step == 4
    taken = [line["step"] for line in fitted.metrics if line["kind"] == "train"]
    assert taken == [1, 2, 3, 4]  # the first part was not run again

    rows = np.arange(workspace.table("sequences", "train").num_rows)
    before = ExampleShards(workspace.folder(".training", "examples")).take(rows)
    after = ExampleShards(workspace.folder(".training", "fit-part-1-examples")).take(rows)
    np.testing.assert_allclose(after.reference, _scores(workspace, ("sft", "model"), after), rtol=1e-4, atol=1e-4)
    policy = (".training", "fit-part-1-policy")
    wanted, unwanted = (_scores(workspace, policy, each)[:, 1:].mean() for each in (after, before))
    assert wanted > unwanted + 0.1  # nats: its own top half, beside that of the model it started from
    assert (before.items[:, 1:] != after.items[:, 1:]).mean() > 0.5
    for met, items in zip(after.met, after.items, strict=True):
        assert len(set(items.tolist())) == 4
        assert not set(items[1:].tolist()) & set(met.tolist())
    assert matrix(workspace.table("negatives", "train")["negatives"]).shape == (rows.size, 3)  # as they were

    remove_parts(workspace, "fit")
    assert not [name for name in workspace.names(".training") if "-part-" in name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align.refresh_every=3"], "negatives.sampler=uniform does not look at the model"),
        (
            ["align.refresh_every=4", "align.validate_every=3", "negatives.sampler=self_play"],
            "must be a multiple of align.validate_every, 3",
        ),
    ],
)
def test_what_cannot_be_refreshed_is_refused(tiny_pipeline: Pipeline, settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(tiny_pipeline, settings=settings)
