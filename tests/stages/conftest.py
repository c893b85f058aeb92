"""A workspace small enough to train in seconds, with the tables that stages before `sft` would write."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recray import schema
from recray.config import (
    Align,
    LanguageModel,
    Negatives,
    Optimiser,
    Pipeline,
    Prompt,
    Resources,
    Sequences,
    Sft,
    Tune,
    Users,
)
from recray.data.logs import data_print
from recray.space import Range
from recray.stages.flow import STAGES
from recray.workspace import Workspace

NUM_ITEMS, NUM_USERS = 40, 30


@pytest.fixture(scope="session")
def tiny_pipeline() -> Pipeline:
    """Settings under which every fit takes a second or two."""
    return Pipeline(
        name="tiny",
        sequences=Sequences(num_candidates=8),
        users=Users(dim=8, layers=1, heads=1, passes=1),
        sft=Sft(
            model=LanguageModel(
                hidden_size=32, layers=1, heads=2, intermediate_size=48, max_positions=256, vocabulary=320
            ),
            prompt=Prompt(max_tokens=128),
            optimiser=Optimiser(learning_rate=5e-3, zero_stage=2),
            global_batch=8,
            passes=3,
            validation_rows=16,
        ),
        negatives=Negatives(num=3),
        align=Align(
            optimiser=Optimiser(learning_rate=1e-3, zero_stage=1),
            global_batch=8,
            steps=6,
            validate_every=3,
            validation_rows=16,
        ),
        tune=Tune(
            space={"margin_base": Range(uniform=(0.0, 2.0)), "num_negatives": Range(choice=(1, 3))}, trials=2, steps=2
        ),
        resources=Resources(num_workers=1, threads_per_worker=1),
    )


def _histories(rng: np.random.Generator) -> list[list[int]]:
    """Users walk the catalogue in steps of one or two: what comes next follows from what came last."""
    found = []
    for _ in range(NUM_USERS):
        walk = np.cumsum(np.r_[rng.integers(NUM_ITEMS), rng.integers(1, 3, size=11)]) % NUM_ITEMS
        found.append(walk.astype(int).tolist())
    return found


def _evaluation(rng: np.random.Generator, histories: list[list[int]]) -> pa.Table:
    candidates = []
    for history in histories:
        others = [item for item in rng.permutation(NUM_ITEMS) if item != history[-1]][:7]
        candidates.append(rng.permutation([*others, history[-1]]).tolist())
    return pa.table(
        [
            list(range(NUM_USERS)),
            [f"user-{user}" for user in range(NUM_USERS)],
            [history[-6:-1] for history in histories],
            [history[-1] for history in histories],
            candidates,
        ],
        schema=schema.EVALUATION,
    )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Pipeline) -> Workspace:
    """A workspace in which everything that `sft`, `reference` and `align` read has been written, without Ray."""
    folder: Path = tmp_path_factory.mktemp("prepared")
    workspace = Workspace(str(folder))
    rng = np.random.default_rng(0)
    histories = _histories(rng)
    users = [f"user-{user}" for user in range(NUM_USERS)]
    tables: dict[str, dict[str, pa.Table]] = {"ingest": {}, "sequences": {}, "users": {}, "negatives": {}}
    titles = [f"The {word} {number}" for number in range(10) for word in ("Fox", "Owl", "Elk", "Bee")]
    tables["ingest"]["items"] = pa.table(
        [list(range(NUM_ITEMS)), [f"i{i}" for i in range(NUM_ITEMS)], titles, titles, [[]] * NUM_ITEMS],
        schema=schema.CATALOGUE,
    )
    train = [history[:10] for history in histories]
    tables["sequences"]["histories"] = pa.table([list(range(NUM_USERS)), users, train], schema=schema.HISTORIES)
    examples = [(user, cut) for user in range(NUM_USERS) for cut in (7, 8, 9)]
    rows = list(range(len(examples)))
    tables["sequences"]["train"] = pa.table(
        [
            rows,
            [users[u] for u, _ in examples],
            [train[u][:c] for u, c in examples],
            [train[u][c] for u, c in examples],
        ],
        schema=schema.EXAMPLES,
    )
    tables["sequences"]["validation"] = _evaluation(rng, [history[:11] for history in histories])
    tables["sequences"]["test"] = _evaluation(rng, histories)
    vectors = {"items": NUM_ITEMS, "train": len(rows), "validation": NUM_USERS, "test": NUM_USERS}
    for name, count in vectors.items():
        kind = schema.ITEM_VECTORS if name == "items" else schema.ROW_VECTORS
        tables["users"][name] = pa.table(
            [list(range(count)), list(rng.normal(size=(count, 8)).astype(np.float32))], schema=kind
        )
    negatives = [rng.permutation(np.setdiff1d(np.arange(NUM_ITEMS), train[user]))[:3].tolist() for user, _ in examples]
    tables["negatives"]["train"] = pa.table([rows, negatives], schema=schema.NEGATIVES)
    inputs: dict[str, dict[str, str]] = {}
    workspace.claim(tiny_pipeline.name, None)
    for stage, own in tables.items():
        inputs[stage] = {name: workspace.require(name).fingerprint for name in STAGES[stage].inputs}
        if stage == "ingest":
            inputs[stage] = {"data": data_print(tiny_pipeline.ingest)}
        part = getattr(tiny_pipeline, stage).model_dump(mode="json")
        version = STAGES[stage].version
        with workspace.stage(stage, version=version, part=part, seed=0, inputs=inputs[stage]) as out:
            for name, table in own.items():
                out.write_table(name, table)
    return workspace
