"""The evaluate stage on a tiny workspace: Ray Data, counting models, vectors, and small language models."""

import json
import re
from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch

from recray import schema
from recray.config import Evaluate, Pipeline, Resources
from recray.data.catalogue import Catalogue
from recray.data.examples import sample_of
from recray.data.prompts import find_template
from recray.data.tokenizer import train_tokenizer
from recray.errors import CatalogueError, DataError, WorkspaceError
from recray.lm.generate import load_writer
from recray.lm.load import make_model, save_model
from recray.lm.scorer import LoadedScorer
from recray.ranking.forms import Form, forms_of
from recray.ranking.metrics import ndcg, ranks
from recray.ranking.paired import holm, sign_flip_p_values
from recray.ranking.rows import batch_of, lists, rank_rows, target_ranks
from recray.ranking.summary import Settings
from recray.ranking.validity import validity
from recray.stages import evaluate
from recray.stages.cluster import own_error
from recray.stages.flow import Job, run_stages
from recray.workspace import Workspace

ITEMS, TEST_ROWS, USERS, DIM = 30, 40, 12, 4
WRITTEN = 15  # test rows for which language models write freely
FORMS = forms_of("validation", Evaluate().prior_weights)
LABELS = [f"The {name} {number}" for number in range(6) for name in ("River", "Stone", "Garden", "Night", "Door")]


def _evaluation(generator: np.random.Generator) -> pa.Table:
    rows = []
    for row in range(TEST_ROWS):
        candidates = generator.permutation(ITEMS)[: generator.integers(3, 9)]
        rows.append(
            {
                "row": row * 7 + 3,  # row numbers need not be 0, 1, 2
                "user_id": f"user {row % USERS}",
                "history": generator.integers(0, ITEMS, size=generator.integers(0, 6)).tolist(),
                "target": int(generator.choice(candidates)),
                "candidates": candidates.tolist(),
            }
        )
    return pa.Table.from_pylist(rows, schema=schema.EVALUATION)


def _genres(item: int) -> list[str]:
    """None, one or two."""
    return ["Drama", "War"][: item % 3]


def _model_folder(folder: Path, seed: int) -> Path:
    tokenizer = train_tokenizer(LABELS, 300)
    catalogue = Catalogue.build(LABELS, tokenizer, find_template("titles"), 64)
    model = make_model(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=32, max_positions=128, seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20.0)  # scores far enough apart for ranks to be stable
    save_model(folder, model, tokenizer, catalogue)
    return folder


def _write(workspace: Workspace, stage: str, tables: dict[str, pa.Table], model: Path | None = None) -> None:
    with workspace.stage(stage, version=1, part={}, seed=0, inputs={}) as out:
        for name, table in tables.items():
            out.write_table(name, table)
        if model is not None:
            out.write_folder("model", model)


def _fill(workspace: Workspace, folder: Path, test: pa.Table) -> None:
    generator = np.random.default_rng(1)
    items = pa.Table.from_pylist(
        [
            {"item": i, "item_id": str(i), "title": LABELS[i], "label": LABELS[i], "genres": _genres(i)}
            for i in range(ITEMS)
        ],
        schema=schema.CATALOGUE,
    )
    histories = pa.Table.from_pylist(
        [
            # The last three items are met by nobody.
            {"row": u, "user_id": f"user {u}", "items": generator.integers(0, ITEMS - 3, size=15).tolist()}
            for u in range(USERS)
        ],
        schema=schema.HISTORIES,
    )
    item_vectors = {"item": range(ITEMS), "vector": generator.normal(size=(ITEMS, DIM)).tolist()}
    rows = test["row"].to_pylist()[::-1]  # not in the order of the test rows
    row_vectors = {"row": rows, "vector": generator.normal(size=(len(rows), DIM)).tolist()}
    _write(workspace, "ingest", {"items": items})
    validation = _evaluation(np.random.default_rng(2))
    _write(workspace, "sequences", {"histories": histories, "validation": validation, "test": test})
    vectors = {
        "items": pa.table(item_vectors, schema=schema.ITEM_VECTORS),
        "test": pa.table(row_vectors, schema=schema.ROW_VECTORS),
    }
    _write(workspace, "users", vectors)
    _write(workspace, "sft", {}, _model_folder(folder / "sft", seed=0))
    _write(workspace, "align", {}, _model_folder(folder / "align", seed=1))


def _run(workspace: Workspace, part: Evaluate) -> None:
    pipeline = Pipeline(name="test", seed=3, evaluate=part)
    with workspace.stage("evaluate", version=1, part=part.model_dump(mode="json"), seed=3, inputs={}) as out:
        evaluate.run(Job(part, 3, Resources(threads_per_worker=1), workspace, out, "print", pipeline))


@pytest.fixture(scope="module")
def evaluated(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Workspace:  # noqa: ARG001
    folder = tmp_path_factory.mktemp("evaluate")
    workspace = Workspace(str(folder / "workspace"))
    _fill(workspace, folder, _evaluation(np.random.default_rng(0)))
    _run(workspace, Evaluate(ks=(1, 3, 10), bootstrap_samples=200, keep_ranked=3, generate_rows=WRITTEN))
    return workspace


def test_every_model_ranks_every_row_once(evaluated: Workspace) -> None:
    rows = evaluated.table("evaluate", "rows")
    assert rows.schema.equals(schema.RANKED_ROWS)
    test = evaluated.table("sequences", "test")
    found = sorted(zip(rows["model"].to_pylist(), rows["row"].to_pylist(), strict=True))
    models = ["popularity", "cooccurrence", "sasrec", "sft", "aligned"]
    assert found == sorted((model, row) for model in models for row in test["row"].to_pylist())
    assert evaluated.require("evaluate").counts == {"rows": 5 * TEST_ROWS, "written": 2 * WRITTEN}


def test_ranks_are_those_of_each_models_own_scores(evaluated: Workspace) -> None:
    test = evaluated.table("sequences", "test")
    item_vectors = np.array(evaluated.table("users", "items")["vector"].to_pylist())
    row_vectors = dict(zip(*evaluated.table("users", "test").to_pydict().values(), strict=True))
    scorer = LoadedScorer(evaluated.folder("align", "model"), tokens_per_micro_batch=512)
    batch = batch_of(test)
    form = next(form for form in FORMS if str(form) == evaluated.require("evaluate").facts["score"]["align"]["chosen"])
    aligned = _in_form(form, scorer, batch.histories, batch.candidates)
    found = {(row["model"], row["row"]): row for row in evaluated.table("evaluate", "rows").to_pylist()}
    for scores, row in zip(aligned, test.to_pylist(), strict=True):
        sasrec = item_vectors[row["candidates"]] @ np.array(row_vectors[row["row"]])
        for model, expected in (("sasrec", sasrec), ("aligned", scores)):
            column = np.array([row["candidates"].index(row["target"])])
            rank = ranks(expected[None], column, np.ones((1, len(expected)), dtype=bool))[0]
            got = found[model, row["row"]]
            assert got["rank"] == rank
            assert got["num_candidates"] == len(row["candidates"])
            best = np.array(row["candidates"])[np.argsort(-expected)][:3]
            assert got["ranked"] == best.tolist()


def test_the_form_of_the_score_is_the_best_on_validation_rows(evaluated: Workspace) -> None:
    table = evaluated.table("sequences", "validation")
    histories, candidates = lists(table["history"]), lists(table["candidates"])
    targets = table["target"].to_numpy().astype(np.int64)
    for stage in ("sft", "align"):
        scorer = LoadedScorer(evaluated.folder(stage, "model"), tokens_per_micro_batch=512)
        expected = {}
        for form in FORMS:
            scores = _in_form(form, scorer, histories, candidates)
            expected[str(form)] = ndcg(target_ranks(scores, candidates, targets), 10).mean()
        fact = evaluated.require("evaluate").facts["score"][stage]
        assert fact["validation ndcg@10"] == pytest.approx(expected)
        assert fact["chosen"] == max(expected, key=lambda name: expected[name])
        assert len(set(expected.values())) > 1  # or the choice would be none


def _in_form(
    form: Form, scorer: LoadedScorer, histories: list[np.ndarray], candidates: list[np.ndarray]
) -> list[np.ndarray]:
    alone = scorer([np.zeros(0, dtype=np.int64)] * len(candidates), candidates)
    tokens = [scorer.catalogue.item_lengths[items] for items in candidates]
    return [form(*each) for each in zip(scorer(histories, candidates), tokens, alone, strict=True)]


def test_metrics_are_means_of_the_rows(evaluated: Workspace) -> None:
    metrics = {entry["model"]: entry for entry in evaluated.json("evaluate", "metrics.json")}
    rows = evaluated.table("evaluate", "rows").to_pylist()
    for model, entry in metrics.items():
        own = np.array([row["rank"] for row in rows if row["model"] == model])
        assert entry["hr@3"]["value"] == pytest.approx((own <= 3).mean())
        assert entry["mrr"]["value"] == pytest.approx((1 / own).mean())
        assert entry["hr@3"]["low"] <= entry["hr@3"]["value"] <= entry["hr@3"]["high"]
        first = {row["ranked"][0] for row in rows if row["model"] == model}
        assert entry["coverage"] == pytest.approx(len(first) / ITEMS)
        assert {"coverage@3", "average_popularity@3"} <= entry.keys()
        assert "coverage@10" not in entry  # three items a row were kept
        assert (entry["rows"], entry["users"]) == (TEST_ROWS, USERS)


def test_differences_are_paired(evaluated: Workspace) -> None:
    metrics = {entry["model"]: entry for entry in evaluated.json("evaluate", "metrics.json")}
    paired = evaluated.json("evaluate", "differences.json")
    assert [(entry["model"], entry["minus"]) for entry in paired] == list(evaluate.PAIRS)
    for entry in paired:
        apart = metrics[entry["model"]]["ndcg@10"]["value"] - metrics[entry["minus"]]["ndcg@10"]["value"]
        assert entry["ndcg@10"]["value"] == pytest.approx(apart)
        assert entry["ndcg@10"]["low"] <= apart <= entry["ndcg@10"]["high"]


def test_every_pair_is_tested_and_corrected_for_all(evaluated: Workspace) -> None:
    rows = evaluated.table("evaluate", "rows").sort_by("row").to_pylist()
    users = np.array([row["user_id"] for row in rows if row["model"] == "sft"])
    gain = {
        model: np.array([1 / np.log2(1 + row["rank"]) for row in rows if row["model"] == model])
        for model in {row["model"] for row in rows}
    }
    tests = [entry["test"] for entry in evaluated.json("evaluate", "differences.json")]
    assert {test["comparisons"] for test in tests} == {len(evaluate.PAIRS)}
    for test, (first, second) in zip(tests, evaluate.PAIRS, strict=True):
        expected = sign_flip_p_values(gain[first] - gain[second], users, seed=99)[0]
        assert test["p"] == pytest.approx(expected, abs=0.03)  # other flips; four deviations are 0.028
    assert [test["p_holm"] for test in tests] == pytest.approx(holm(np.array([test["p"] for test in tests])))


def test_slices_hold_every_row_and_cold_targets_are_a_fact(evaluated: Workspace) -> None:
    parts = evaluated.json("evaluate", "slices.json")
    met = {item for items in evaluated.table("sequences", "histories")["items"].to_pylist() for item in items}
    test = {row["row"]: row for row in evaluated.table("sequences", "test").to_pylist()}
    cold = {row for row, content in test.items() if content["target"] not in met}
    for kind in ("target in training", "popularity of the target", "history length"):
        assert sum(part["rows"] for part in parts if part["by"] == kind) == TEST_ROWS
    short = [row for row, content in test.items() if 1 <= len(content["history"]) < 5]
    assert {part["slice"]: part["rows"] for part in parts}["1–4"] == len(short)
    fact = evaluated.require("evaluate").facts["targets never met in training"]
    assert (fact["rows"], fact["of"]) == (len(cold), TEST_ROWS)
    ranks_there = [
        row["rank"] for row in evaluated.table("evaluate", "rows").to_pylist()
        if row["model"] == "aligned" and row["row"] in cold
    ]  # fmt: skip
    assert len(cold) > 0
    expected = np.mean([1 / np.log2(1 + rank) for rank in ranks_there])  # no row has more than ten candidates
    assert fact["ndcg@10 aligned"]["value"] == pytest.approx(expected)


def test_language_models_write_freely_for_a_sample(evaluated: Workspace) -> None:
    sampled = sample_of(evaluated.table("sequences", "test"), WRITTEN, seed=3)
    written = evaluated.table("evaluate", "written")
    assert written.schema.equals(schema.WRITTEN_ROWS)
    summed_up = evaluated.json("evaluate", "generation.json")
    assert (summed_up["rows"], summed_up["of"]) == (WRITTEN, TEST_ROWS)
    for found, (model, stage) in zip(summed_up["models"], evaluate.WRITERS.items(), strict=True):
        own = written.filter(pc.field("model") == model).sort_by("row")
        assert own["row"].to_pylist() == sampled["row"].to_pylist()
        batch = batch_of(sampled)
        alone = load_writer(evaluated.folder(stage, "model"), tokens_per_micro_batch=1)
        assert own["text"].to_pylist() == alone(batch.histories, batch.candidates).texts
        expected = validity(own, settings=Settings((1,), samples=200, confidence=0.95, seed=3))
        assert found.items() >= {"model": model, "template": "titles", **expected}.items()
        assert evaluated.require("evaluate").facts["written freely"][model]["hr@1"] == found["hr@1"]


def test_genres_are_those_of_the_catalogue_and_of_the_histories_of_the_rows(evaluated: Workspace) -> None:
    found = evaluated.json("evaluate", "exposure.json")["genres"]
    assert found["catalogue"] == {"items": ITEMS, "without_genre": ITEMS // 3}

    def drama(items: list[int]) -> float:
        weights = [1 / len(_genres(item)) for item in items if _genres(item)]
        return sum(weights) / sum(1 for item in items if _genres(item))

    met = [item for row in evaluated.table("sequences", "test")["history"].to_pylist() for item in row]
    assert found["genres"] == ["Drama", "War"]
    assert found["met"]["shares"] == pytest.approx([drama(met), 1 - drama(met)])
    rows = evaluated.table("evaluate", "rows").to_pylist()
    for model, (first,) in found["models"].items():  # three items a row were kept, so nothing is said of ten
        shown = [row["ranked"][0] for row in rows if row["model"] == model]
        apart = drama(shown) - drama(met)
        assert (first["k"], first["mgu"], first["dgu"]) == (1, pytest.approx(abs(apart)), pytest.approx(2 * abs(apart)))


def test_exposure_and_facts_are_json(evaluated: Workspace) -> None:
    exposure = evaluated.json("evaluate", "exposure.json")
    assert all(sum(shares) == pytest.approx(1.0) for shares in exposure["models"].values())
    assert sum(exposure["chosen"]) == pytest.approx(1.0)
    facts = evaluated.require("evaluate").facts
    assert facts["test_rows"] == TEST_ROWS
    assert "NaN" not in json.dumps(facts)


def test_no_test_rows_is_an_error_that_leaves_nothing(workspace: Workspace, tmp_path: Path) -> None:
    _fill(workspace, tmp_path, schema.EVALUATION.empty_table())
    with pytest.raises(DataError, match="no rows"):
        _run(workspace, Evaluate())
    assert left_of_evaluate(workspace) == []


def left_of_evaluate(workspace: Workspace) -> list[str]:
    return [path for path in ("evaluate", ".partial/evaluate") if workspace.exists(path)]


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("candidates", [], "its candidates hold the target 0 times, expected once"),
        ("candidates", [4, 5, 4], "its candidates hold the target 2 times, expected once"),
        ("candidates", [4, ITEMS], "item 30 of its candidates is unknown, the catalogue has items 0 to 29"),
        ("history", [ITEMS], "item 30 of its history is unknown"),
        ("target", -1, "item -1 of its target is unknown"),
        ("history", None, "it has no history"),
    ],
)
def test_a_faulty_row_is_refused_before_any_model_is_opened(
    column: str, value: object, message: str, workspace: Workspace, tmp_path: Path
) -> None:
    rows = _evaluation(np.random.default_rng(0)).to_pylist()
    rows[9] |= {"target": 4, "candidates": [4, 5]}
    rows[9][column] = value
    _fill(workspace, tmp_path, pa.Table.from_pylist(rows, schema=schema.EVALUATION))
    with pytest.raises(DataError, match=f"sequences/test, row 66: {message}"):
        _run(workspace, Evaluate())  # no Ray runs here, so nothing can have been ranked
    assert left_of_evaluate(workspace) == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_model_with_another_tokenizer_is_refused_and_leaves_nothing(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fill(workspace, tmp_path, _evaluation(np.random.default_rng(0)))
    train_tokenizer(["Another book"], 280).save_pretrained(workspace.folder("sft", "model"))
    monkeypatch.setattr(evaluate, "MODELS", tuple(model for model in evaluate.MODELS if model.name == "sft"))
    with pytest.raises(Exception, match="CatalogueError") as caught:
        _run(workspace, Evaluate(score="summed"))
    told = own_error(caught.value)
    assert isinstance(told, CatalogueError)
    assert re.search(r"was trained with catalogue \w{16}.*, or train again$", str(told))
    assert left_of_evaluate(workspace) == []


def test_an_unfinished_run_is_not_evaluated(prepared: Workspace, tiny_pipeline: Pipeline, tmp_path: Path) -> None:
    copy = Workspace(str(tmp_path / "copy"))
    copytree(prepared.root, copy.root, ignore=ignore_patterns("sft"))  # another test may have finished it there
    copytree(_model_folder(tmp_path / "model", seed=0), copy.path("sft", "model"))  # all there but the manifest
    with pytest.raises(WorkspaceError, match="holds no finished `sft`; run `recray sft`"):
        run_stages(tiny_pipeline, copy, ("evaluate",), force=frozenset())
    assert left_of_evaluate(copy) == []


@pytest.mark.parametrize("kept", [[*range(1, TEST_ROWS)], [*range(TEST_ROWS), 0]], ids=["lost", "twice"])
def test_rows_that_were_lost_or_ranked_twice_are_refused(
    kept: list[int], workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = _evaluation(np.random.default_rng(0))
    _fill(workspace, tmp_path, test)

    def write(job: Job, model: evaluate.Model, _: evaluate.Training) -> None:
        scores = [np.arange(len(row)) for row in batch_of(test).candidates]
        ranked = rank_rows(test, scores, model=model.name, keep=3)
        job.out.write_table("rows", ranked.take(pa.array(kept)))

    monkeypatch.setattr(evaluate, "_rank", write)
    monkeypatch.setattr(evaluate, "MODELS", evaluate.MODELS[:1])
    with pytest.raises(DataError, match=r"popularity ranked (39|41) rows, but sequences/test has 40"):
        _run(workspace, Evaluate())
    assert not workspace.exists("evaluate")
