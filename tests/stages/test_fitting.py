"""The ordered feed, and the stages that train, on a real local Ray."""

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from recray.config import Compare, Pipeline, Resources, override
from recray.data.examples import sample_of
from recray.errors import ModelError, RecrayError, WorkspaceError
from recray.lm.layout import stream_layout
from recray.lm.lora import load_adapter
from recray.lm.scorer import ItemScorer, score_rows
from recray.ranking.metrics import ndcg
from recray.ranking.rows import lists, target_ranks
from recray.stages import compare
from recray.stages.alignment import Alignment, alignment, start_once
from recray.stages.comparing import Judging, Run, go_through
from recray.stages.feed import unit_dataset
from recray.stages.fitting import Fit, run_fit
from recray.stages.flow import run_stages
from recray.stages.recommender import open_from, validation_rows
from recray.train.context import WorkerContext
from recray.train.log import MetricsLog
from recray.train.loop import Progress
from recray.train.units import MicroBatch, Unit, unpack_unit
from recray.workspace import Workspace

NONE: frozenset[str] = frozenset()

pytestmark = pytest.mark.usefixtures("ray_cluster")


class Stamps:
    """A feed whose units say who they are for; some take longer than others."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size

    def unit(self, step: int, rank: int) -> Unit:
        import time

        time.sleep(0.02 * ((step * 7 + rank * 3) % 4))
        layout = stream_layout(np.arange(2 + step % 3), np.array([2 + step % 3]))
        return Unit(step, rank, [MicroBatch(np.array([0]), layout)], {"world": np.array([self._world_size])}, [step])


@pytest.mark.parametrize(("world", "first"), [(1, 0), (3, 4)])
def test_every_rank_is_fed_its_own_units_in_order(world: int, first: int) -> None:
    splits = unit_dataset(Stamps, world, first_step=first, steps=first + 6).streaming_split(world, equal=False)
    got: list[list[Unit]] = [[] for _ in range(world)]

    def read(rank: int) -> None:
        for batch in splits[rank].iter_batches(batch_size=1, batch_format="pyarrow"):
            got[rank].append(unpack_unit(batch["unit"][0].as_py()))

    readers = [threading.Thread(target=read, args=(rank,)) for rank in range(world)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(timeout=120)
    expected = [[(step, rank) for step in range(first, first + 6)] for rank in range(world)]
    assert [[(unit.step, unit.rank) for unit in own] for own in got] == expected
    assert all(unit.arrays["world"][0] == world for own in got for unit in own)


def refuse(mark: Path, context: WorkerContext, log: MetricsLog) -> Progress:
    """Let rank 1 refuse what it got while the other waits for it."""
    del log
    if context.rank != 1:
        torch.distributed.barrier()
    with mark.open("a") as file:
        file.write("tried\n")
    raise ModelError("this rank alone can't go on")


def test_what_one_rank_refuses_ends_the_run_with_its_own_words(workspace: Workspace, tmp_path: Path) -> None:
    mark = tmp_path / "tries"
    fit = Fit(name="refused", run="refused", steps=2, make_feed=Stamps, work=partial(refuse, mark))
    resources = Resources(num_workers=2, cpus_per_worker=0.5, threads_per_worker=1)
    with pytest.raises(ModelError, match=r"^this rank alone can't go on$"):
        run_fit(fit, workspace, resources)
    assert mark.read_text() == "tried\n"  # no group tried again


@pytest.fixture(scope="module")
def aligned(
    ray_cluster: None,  # noqa: ARG001 - started for its effect
    prepared: Workspace,
    tiny_pipeline: Pipeline,
) -> Workspace:
    """The prepared workspace with `sft`, `reference` and `align` done, by one worker under ZeRO."""
    run_stages(tiny_pipeline, prepared, ("sft", "reference", "align"), force=NONE)
    return prepared


def metrics(workspace: Workspace, stage: str) -> list[dict[str, float]]:
    file = Path(workspace.path(stage, "metrics.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_sft_learns_and_keeps_the_best_weights(aligned: Workspace) -> None:
    lines = metrics(aligned, "sft")
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    ranked = [line["ndcg@10"] for line in lines if line["kind"] == "validation"]
    assert losses[-1] < losses[0] - 1.0
    assert aligned.require("sft").facts["best_validation_ndcg@10"] == max(ranked)
    assert any(Path(aligned.path("sft", "tensorboard")).iterdir())


def test_reference_scores_are_those_of_the_sft_model(aligned: Workspace) -> None:
    table = aligned.table("reference", "train").sort_by("row")
    examples = aligned.table("sequences", "train").sort_by("row")
    assert table.num_rows == examples.num_rows
    model, catalogue = open_from(aligned, "sft", "model")
    histories = [np.array(history) for history in examples["history"].to_pylist()]
    items = [np.array(own) for own in table["items"].to_pylist()]
    assert [own[0] for own in items] == examples["target"].to_pylist()
    scores = score_rows(ItemScorer(model).eval(), catalogue, histories, items, tokens_per_micro_batch=4096)
    np.testing.assert_allclose(np.array(table["scores"].to_pylist()), np.array(scores), atol=1e-4)


def test_alignment_starts_from_the_reference_and_takes_every_step(aligned: Workspace) -> None:
    train = [line for line in metrics(aligned, "align") if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert train[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert train[-1]["kl"] > 0
    assert {"margin", "effective_negatives", "tokens_per_s", "data_wait_share"} <= train[0].keys()


def test_nothing_that_is_up_to_date_runs_again(aligned: Workspace, tiny_pipeline: Pipeline) -> None:
    before = {stage: aligned.require(stage).finished for stage in ("sft", "reference", "align")}
    run_stages(tiny_pipeline, aligned, tuple(before), force=NONE, ray=lambda: pytest.fail("Ray is not needed"))
    assert {stage: aligned.require(stage).finished for stage in before} == before
    assert not [name for name in Path(aligned.path(".training")).iterdir() if "tune" not in name.name]


@pytest.fixture
def copied(aligned: Workspace, tmp_path: Path) -> Workspace:
    """A copy of the aligned workspace that the test may change."""
    return Workspace(str(shutil.copytree(aligned.root, tmp_path / "copy")))


def test_two_workers_under_zero_3_end_where_one_under_zero_1_does(copied: Workspace, tiny_pipeline: Pipeline) -> None:
    found = [metrics(copied, "align")]
    settings = ["align.optimiser.zero_stage=3", "resources.num_workers=2", "align.micro_batches=2"]
    run_stages(override(tiny_pipeline, settings=settings), copied, ("align",), force=NONE)
    found.append(metrics(copied, "align"))
    for one, two in zip(*([line for line in lines if line["kind"] == "train"] for lines in found), strict=True):
        for name in ("loss", "margin", "kl", "grad_norm", "effective_negatives"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), (name, one["step"])


def test_a_run_on_an_object_store_is_the_run_on_a_disk(
    aligned: Workspace, tiny_pipeline: Pipeline, object_store: str
) -> None:
    remote = Workspace(object_store.format("aligned"))
    for stage in ("ingest", "sequences", "users", "negatives", "sft", "reference"):
        remote.put_folder(Path(aligned.path(stage)), stage)
    run_stages(tiny_pipeline, remote, ("align",), force=NONE)
    there = Path(remote.folder("align"), "metrics.jsonl").read_text().splitlines()
    times = {"seconds", "tokens_per_s", "data_wait_share"}
    found = [
        [{name: value for name, value in line.items() if name not in times} for line in lines]
        for lines in (map(json.loads, there), metrics(aligned, "align"))
    ]
    assert found[0] == found[1]
    assert remote.names(".training") == []
    ours, theirs = (each.folder("align", "model") / "model.safetensors" for each in (remote, aligned))
    assert ours.read_bytes() == theirs.read_bytes()


def test_adapters_are_trained_handed_over_alone_and_merged(copied: Workspace, tiny_pipeline: Pipeline) -> None:
    settings = ["sft.lora.rank=4", "sft.passes=1", "align.lora.rank=2", "reference.source=adapter_off"]
    zero_3 = ["align.optimiser.zero_stage=3", "resources.num_workers=2", "align.steps=3"]
    pipeline = override(tiny_pipeline, settings=[*settings, *zero_3])
    run_stages(pipeline, copied, ("sft", "reference", "align"), force=NONE)
    counts = copied.require("reference").counts
    assert counts == {"train": 0}
    train = [line for line in metrics(copied, "align") if line["kind"] == "train"]
    assert train[0]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert train[-1]["kl"] > 0
    assert all(np.isfinite(line["loss"]) for line in train)

    rows = validation_rows(copied, 4, 0)
    found = []
    for stage, adapter in (("sft", None), ("sft", "align"), ("align", None)):
        model, catalogue = open_from(copied, stage, "model")
        if adapter:
            load_adapter(model, Path(copied.path(adapter, "adapter")))
        scorer = ItemScorer(model).eval()
        own = score_rows(scorer, catalogue, rows.histories, rows.candidates, tokens_per_micro_batch=4096)
        found.append(np.concatenate(own))
    best = copied.require("align").facts["best_step"]
    assert best == 0 or np.abs(found[0] - found[1]).max() > 0
    np.testing.assert_allclose(found[1], found[2], atol=1e-5)
    assert Path(copied.path("sft", "adapter", "adapter_model.safetensors")).is_file()


def test_reference_scores_of_another_model_are_refused(aligned: Workspace, tiny_pipeline: Pipeline) -> None:
    file = Path(aligned.path("reference", "fingerprint.json"))
    kept = file.read_text()
    file.write_text(kept.replace('"weights": "', '"weights": "0'))
    try:
        with pytest.raises(WorkspaceError, match="reference scores were made by"):
            run_stages(tiny_pipeline, aligned, ("align",), force=frozenset({"align"}))
    finally:
        file.write_text(kept)


def test_the_start_is_validated_once_a_process() -> None:
    looks = []

    def look() -> dict[str, float]:
        looks.append(len(looks))
        return {"ndcg@10": float(len(looks))}

    found = [start_once(start, look)["ndcg@10"] for start in ("one model", "another", "one model")]
    assert found == [1.0, 2.0, 1.0]


def test_a_comparison_that_was_interrupted_goes_on_and_ranks_the_same_rows(
    aligned: Workspace, tiny_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Compare(objectives=("dpo", "napo margin=none"), seeds=1, steps=3, rows=10)
    pipeline = override(tiny_pipeline, settings=["resources.threads_per_worker=2"])  # one run after the other
    pipeline = pipeline.model_copy(update={"compare": given})
    done = []

    def stopped(runs: list[tuple[Run, Alignment]], judging: Judging) -> Iterator[Run]:
        for run in go_through(runs, judging):
            done.append(run.method)
            yield run
            if len(done) == 1:
                raise RecrayError("the machine went away")

    monkeypatch.setattr(compare, "go_through", stopped)
    with pytest.raises(RecrayError, match="went away"):
        run_stages(pipeline, aligned, ("compare",), force=NONE)
    run_stages(pipeline, aligned, ("compare",), force=NONE)
    assert done == list(given.objectives)  # what was done is not done again
    runs = aligned.json("compare", "runs.json")
    assert [(run["method"], run["steps"]) for run in runs] == [("dpo", 3), ("napo margin=none", 3)]
    assert [point["step"] for point in runs[0]["curve"]] == [0, 3]
    models = {entry["model"]: entry for entry in aligned.json("compare", "metrics.json")}
    assert list(models) == ["popularity", "cooccurrence", "start", *given.objectives]
    # The start is ranked as the SFT model ranks the test rows.
    test = sample_of(aligned.table("sequences", "test"), 10, tiny_pipeline.seed)
    model, catalogue = open_from(aligned, "sft", "model")
    candidates = lists(test["candidates"])
    scores = score_rows(
        ItemScorer(model).eval(), catalogue, lists(test["history"]), candidates, tokens_per_micro_batch=4096
    )
    expected = ndcg(target_ranks(scores, candidates, test["target"].to_numpy()), 10).mean()
    assert models["start"]["ndcg@10"]["value"] == pytest.approx(expected)
    pairs = aligned.json("compare", "differences.json")
    assert {pair["minus"] for pair in pairs} == {"start"}
    assert "Against the SFT model" in Path(aligned.path("compare", "comparison.html")).read_text()
    assert not [name for name in aligned.names(".training") if name.startswith("compare-")]


def test_more_negatives_than_were_drawn_are_refused(aligned: Workspace, tiny_pipeline: Pipeline) -> None:
    from recray.errors import ConfigError

    many = tiny_pipeline.align.model_copy(update={"num_negatives": 9})
    with pytest.raises(ConfigError, match="num_negatives is 9, but `negatives` drew 3"):
        alignment(aligned, many, 0, "nowhere")
