"""The stages `users` and `negatives` on tables small enough to check every row of."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recray.config import Negatives, Part, Pipeline, Resources, Users
from recray.errors import DataError
from recray.negatives.met import met_in_training
from recray.negatives.registry import SAMPLERS
from recray.negatives.same_category import genres_of
from recray.schema import (
    CATALOGUE,
    COUNTED_NEGATIVES,
    CROSSFIT_ITEMS,
    CROSSFIT_ROWS,
    EVALUATION,
    EXAMPLES,
    HISTORIES,
    ITEM_VECTORS,
    NEGATIVES,
    ROW_VECTORS,
)
from recray.stages import negatives as negatives_stage
from recray.stages import users as users_stage
from recray.stages.embedding import vectors_of_folds
from recray.stages.flow import Job
from recray.users.crossfit import folds_of
from recray.users.fit import Validation, fit
from recray.users.ragged import from_arrow
from recray.users.sasrec import SASRec, item_vectors, load, user_vectors
from recray.workspace import Manifest, Workspace

NUM_ITEMS, NUM_USERS = 60, 40
# Little to choose from, so that some rows have to fall back.
SMALL: dict[str, dict[str, Any]] = {
    "popularity": {},
    "inverse_popularity": {},
    "in_batch": {"batch_rows": 32},
    "mixed": {"batch_rows": 8},
    "adaptive": {"batch_rows": 32},
    "adaptive_mixed": {"batch_rows": 12, "candidates": 12},
    "same_category": {},
    "nearest": {"nearest_from": 2, "nearest_to": 24},
}
SETTINGS = Users(dim=16, heads=2, layers=1, passes=3, global_batch=16, max_history=8, dropout=0.0)
# With negatives that the workers need the catalogue's genres for.
IN_FOLDS = SETTINGS.model_copy(update={"folds": 2, "loss": "sampled_softmax", "sampler": "same_category", "listed": 9})


def _walk(rng: np.random.Generator, length: int) -> list[int]:
    """A user who goes round the catalogue in steps of one, now and then two."""
    return [int(item) for item in (rng.integers(NUM_ITEMS) + np.cumsum(1 + (rng.random(length) < 0.1))) % NUM_ITEMS]


def _tables(rng: np.random.Generator) -> dict[str, pa.Table]:
    walks = [_walk(rng, int(rng.integers(5, 25))) for _ in range(NUM_USERS)]
    names = [f"user {number}" for number in range(NUM_USERS)]
    histories = [
        {"row": row, "user_id": name, "items": walk[:-2]}
        for row, (name, walk) in enumerate(zip(names, walks, strict=True))
    ]
    cuts = [
        (name, walk[:cut], walk[cut])
        for name, walk in zip(names, walks, strict=True)
        for cut in range(1, len(walk) - 2)
    ]
    train = [
        {"row": row, "user_id": name, "history": seen[-6:], "target": target}
        for row, (name, seen, target) in enumerate(cuts)
    ]
    tables = {
        "histories": pa.Table.from_pylist(histories, schema=HISTORIES),
        "train": pa.Table.from_pylist(train, schema=EXAMPLES),
    }
    for split, place in (("validation", -2), ("test", -1)):
        rows = []
        for row, (name, walk) in enumerate(zip(names, walks, strict=True)):
            others = [int(item) for item in rng.permutation(NUM_ITEMS) if item != walk[place]][:9]
            history = walk[:place] if row else []  # one user comes without a history
            rows.append(
                {
                    "row": row,
                    "user_id": name,
                    "history": history,
                    "target": walk[place],
                    "candidates": [walk[place], *others],
                }
            )
        tables[split] = pa.Table.from_pylist(rows, schema=EVALUATION)
    return tables


@pytest.fixture
def small(tmp_path: Any) -> Workspace:
    """A workspace with finished ingest and sequences."""
    workspace = Workspace(str(tmp_path / "workspace"))
    rng = np.random.default_rng(0)
    labels = [f"title {item}" for item in range(NUM_ITEMS)]
    items = [
        {"item": item, "item_id": label, "title": label, "label": label, "genres": [f"genre {item % 3}"]}
        for item, label in enumerate(labels)
    ]
    truth = [{"user_id": f"user {number}", "liked": [number]} for number in range(NUM_USERS)]
    with workspace.stage("ingest", version=1, part={}, seed=0, inputs={}) as out:
        out.write_table("items", pa.Table.from_pylist(items, schema=CATALOGUE))
        out.write_table("truth", pa.Table.from_pylist(truth))
    with workspace.stage("sequences", version=1, part={}, seed=0, inputs={}) as out:
        for name, table in _tables(rng).items():
            out.write_table(name, table)
        # Several files, as Ray writes them.
        whole = pq.read_table(out.path("train", "part-0.parquet"))
        pq.write_table(whole.slice(0, 50), out.path("train", "part-0.parquet"))
        pq.write_table(whole.slice(50), out.path("train", "part-1.parquet"))
    return workspace


def _run(
    stage: Callable[[Job], None], workspace: Workspace, name: str, part: Part, resources: Resources | None = None
) -> Manifest:
    with workspace.stage(name, version=1, part=part.model_dump(mode="json"), seed=3, inputs={}) as out:
        pipeline = Pipeline(name="small")
        stage(Job(part, 3, resources or Resources(threads_per_worker=1), workspace, out, "print", pipeline))
    return workspace.require(name)


@pytest.mark.usefixtures("ray_cluster")
def test_negatives_are_complete_sorted_and_unmet(small: Workspace) -> None:
    manifest = _run(negatives_stage.run, small, "negatives", Negatives(num=7))
    table = small.table("negatives", "train").sort_by("row")
    examples = small.table("sequences", "train").sort_by("row")
    assert table.schema.remove_metadata() == NEGATIVES
    assert table["row"].to_pylist() == examples["row"].to_pylist()
    met = met_in_training(small.table("sequences", "histories"), examples, NUM_ITEMS)
    members = dict(zip(met.user_ids.to_pylist(), _sets(met.items), strict=True))
    for user, drawn in zip(examples["user_id"].to_pylist(), table["negatives"].to_pylist(), strict=True):
        assert len(set(drawn)) == 7
        assert not set(drawn) & members[user]
    assert manifest.counts["train"] == examples.num_rows
    facts = manifest.facts
    assert facts["items_drawn"] == NUM_ITEMS
    assert facts["held_out"]["share"] > 0  # held-out items are not left out
    assert facts["held_out"]["share"] == pytest.approx(facts["held_out"]["by_chance"], rel=0.4)
    assert facts["false_negatives"]["share"] == pytest.approx(facts["false_negatives"]["by_chance"], rel=0.4)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("sampler", sorted(set(Negatives.samplers()) - {"uniform", "self_play", "top_k_stochastic"}))
def test_every_sampler_is_told_what_it_needs(small: Workspace, sampler: str) -> None:
    rows = small.table("sequences", "train", ["row"]).num_rows
    _write_vectors(small, rows)
    falls_back = SAMPLERS[sampler].falls_back
    manifest = _run(negatives_stage.run, small, "negatives", Negatives(sampler=sampler, num=20, **SMALL[sampler]))
    table = small.table("negatives", "train").sort_by("row")
    examples = small.table("sequences", "train").sort_by("row")
    assert table.schema.remove_metadata() == (COUNTED_NEGATIVES if falls_back else NEGATIVES)
    assert table["row"].to_pylist() == examples["row"].to_pylist()
    met = met_in_training(small.table("sequences", "histories"), examples, NUM_ITEMS)
    members = dict(zip(met.user_ids.to_pylist(), _sets(met.items), strict=True))
    for user, drawn in zip(examples["user_id"].to_pylist(), table["negatives"].to_pylist(), strict=True):
        assert len(set(drawn)) == 20
        assert not set(drawn) & members[user]
    assert manifest.facts["held_out"]["share"] > 0
    if falls_back:
        lacking = 20 - table["own"].to_numpy()
        assert manifest.facts["negatives_from_fallback"] == lacking.sum() > 0
        assert manifest.facts["rows_with_fallback"] == (lacking > 0).sum()
        assert lacking.max() <= 20
    _check_own(sampler, small, table, examples)


def _check_own(sampler: str, workspace: Workspace, table: pa.Table, examples: pa.Table) -> None:
    """Each row's first negatives are what the sampler is for."""
    targets = examples["target"].to_numpy()
    items = np.array(workspace.table("users", "items")["vector"].to_pylist())
    users = np.array(workspace.table("users", "train").sort_by("row")["vector"].to_pylist())
    for row, (drawn, own) in enumerate(zip(table["negatives"].to_pylist(), table.columns[-1].to_pylist(), strict=True)):
        if sampler == "same_category":
            assert {item % 3 for item in drawn[:own]} <= {targets[row] % 3}
        elif sampler == "nearest":
            apart = np.abs(np.array(drawn[:own]) - targets[row])
            assert (np.minimum(apart, NUM_ITEMS - apart) <= 12).all()
        elif sampler in ("adaptive", "adaptive_mixed"):
            scores = items[drawn[:own]] @ users[row]
            assert (np.diff(scores) <= 1e-5).all()
        elif sampler == "in_batch":
            assert set(drawn[:own]) <= set(targets.tolist())


def _write_vectors(workspace: Workspace, rows: int) -> None:
    """Finish `users`: items on a circle, so that near items have near numbers; users anywhere."""
    angles = np.arange(NUM_ITEMS) / NUM_ITEMS * 2 * np.pi
    vectors = {"items": np.column_stack([np.cos(angles), np.sin(angles)]).astype(np.float32)}
    vectors["train"] = np.random.default_rng(0).normal(size=(rows, 2)).astype(np.float32)
    with workspace.stage("users", version=1, part={}, seed=0, inputs={}) as out:
        for name, own in vectors.items():
            schema = ITEM_VECTORS if name == "items" else ROW_VECTORS
            order = np.random.default_rng(1).permutation(len(own)) if name == "train" else np.arange(len(own))
            out.write_table(
                name,
                pa.table(
                    [pa.array(order.astype(np.int64)).cast(schema.field(0).type), list(own[order])], schema=schema
                ),
            )


@pytest.mark.usefixtures("ray_cluster")
def test_negatives_that_can_not_be_drawn_are_refused_and_leave_nothing(small: Workspace) -> None:
    with pytest.raises(Exception, match=r"row \d+: 60 negatives are wanted") as caught:
        _run(negatives_stage.run, small, "negatives", Negatives(num=60))
    assert DataError.__name__ in str(caught.value) or isinstance(caught.value, DataError)
    assert small.manifest("negatives") is None
    assert not small.exists(".partial", "negatives")


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("folds", [1, 2])
def test_users_are_the_models_own_vectors(small: Workspace, folds: int) -> None:
    manifest = _run(users_stage.run, small, "users", IN_FOLDS if folds == 2 else SETTINGS)
    model = load(small.folder("users", "model"))
    items = small.table("users", "items")
    assert items.schema.remove_metadata() == ITEM_VECTORS
    assert items["item"].to_pylist() == list(range(NUM_ITEMS))
    np.testing.assert_array_equal(np.array(items["vector"].to_pylist(), dtype=np.float32), item_vectors(model))
    for split in ("train", "validation", "test"):
        table, rows = (small.table(stage, split).sort_by("row") for stage in ("users", "sequences"))
        assert table.schema.remove_metadata() == ROW_VECTORS
        assert table["row"].to_pylist() == rows["row"].to_pylist()
        wanted = user_vectors(model, from_arrow(rows["history"]))
        found = np.array(table["vector"].to_pylist(), dtype=np.float32)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
        assert manifest.counts[split] == rows.num_rows
    curve = small.json("users", "curve.json")
    assert [line["pass"] for line in curve] == [1, 2, 3]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert manifest.facts["passes"] == 3
    assert not small.exists(".training", "users-print")
    assert not small.exists("users", "model", "curve.json")
    crossfit = ["crossfit_items", "crossfit_train", "curve_without_fold_0.json", "curve_without_fold_1.json"]
    assert [small.exists("users", name) for name in crossfit] == [folds == 2] * 4
    truth = manifest.facts["known_truth"]
    assert set(truth) == {"separation", "separation_crossfit"} if folds == 2 else {"separation"}
    assert all(0 <= value <= 1 for value in truth.values())
    if folds == 2:
        _check_folds(small)


def _check_folds(workspace: Workspace) -> None:
    """Each row's vector is by the model that was fitted on the users of the other fold, and on those alone."""
    items = workspace.table("users", "crossfit_items")
    assert items.schema.remove_metadata() == CROSSFIT_ITEMS
    table, rows = (
        workspace.table(*place).sort_by("row") for place in (("users", "crossfit_train"), ("sequences", "train"))
    )
    assert table.schema.remove_metadata() == CROSSFIT_ROWS
    assert table["row"].to_pylist() == rows["row"].to_pylist()
    folds = folds_of(rows["user_id"], seed=3)
    assert table["fold"].to_pylist() == folds.tolist()
    found = np.array(table["vector"].to_pylist(), dtype=np.float32)
    histories = workspace.table("sequences", "histories").sort_by("row")
    validation = workspace.table("sequences", "validation").sort_by("row")
    for fold, vectors in enumerate(vectors_of_folds(items)):
        model = load(workspace.folder("users", f"model_without_fold_{fold}"))
        np.testing.assert_array_equal(vectors, item_vectors(model))
        wanted = user_vectors(model, from_arrow(rows["history"]))
        np.testing.assert_allclose(found[folds == fold], wanted[folds == fold], atol=1e-5)
        # The same model again, from tables in which the fold's users do not exist.
        others, asked = (
            each.filter(pa.array(folds_of(each["user_id"], seed=3) != fold)) for each in (histories, validation)
        )
        again = SASRec(model.shape, seed=3)
        left = Validation(
            from_arrow(asked["history"]), from_arrow(asked["candidates"]), np.array(asked["target"], dtype=np.int32)
        )
        settings = IN_FOLDS.model_copy(update={"passes": 6, "patience": 6})  # half the users a pass: as many steps
        genres = genres_of(np.arange(NUM_ITEMS), np.arange(NUM_ITEMS) % 3, NUM_ITEMS)
        fit(again, from_arrow(others["items"]), left, settings, seed=3, report=lambda _: None, genres=genres)
        np.testing.assert_allclose(item_vectors(again), vectors, atol=1e-4)


def _sets(lists: Any) -> list[set[int]]:
    bounds = lists.offsets.tolist()
    return [set(lists.items[a:b].tolist()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
