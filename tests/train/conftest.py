"""A small world to train in: catalogue, model, and joined examples of twelve users."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch

from recray import schema
from recray.data.catalogue import Catalogue
from recray.data.examples import ExampleShards, join_examples, met_in_training, write_shards
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.lm.load import make_model
from recray.lm.scorer import ItemScorer, score_rows

ITEMS, ROWS, NEGATIVES = 30, 24, 4


class World(NamedTuple):
    """What feeds and engines are made of."""

    catalogue: Catalogue
    shards: ExampleShards
    item_vectors: torch.Tensor
    histories: list[np.ndarray]
    tokenizer: object

    def scorer(self, dtype: torch.dtype = torch.float32) -> ItemScorer:
        """A fresh copy of the model, always with the same weights."""
        return new_scorer(self.tokenizer).to(dtype)


def new_scorer(tokenizer: object) -> ItemScorer:
    """The model of every test here."""
    return ItemScorer(
        make_model(tokenizer, hidden_size=16, layers=2, heads=2, intermediate_size=24, max_positions=256, seed=1)
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Twelve users of two rows each over thirty items."""
    rng = np.random.default_rng(0)
    labels = [f"{word} {number}" for number in range(10) for word in ("Fox", "Owl Hill", "Elk")]
    template = find_template("titles")
    tokenizer = train_tokenizer(training_texts(template, labels), 300)
    catalogue = Catalogue.build(labels, tokenizer, template, 96)
    histories = [rng.integers(ITEMS, size=rng.integers(1, 8)).astype(np.int32) for _ in range(ROWS)]
    drawn = [rng.permutation(ITEMS)[: 1 + NEGATIVES].astype(np.int32) for _ in range(ROWS)]
    rows = list(range(ROWS))
    users = [f"u{row // 2}" for row in rows]
    examples = pa.table([rows, users, histories, [own[0] for own in drawn]], schema=schema.EXAMPLES)
    negatives = pa.table([rows, [own[1:] for own in drawn]], schema=schema.NEGATIVES)
    scorer = new_scorer(tokenizer).eval()
    scores = score_rows(scorer, catalogue, histories, drawn, tokens_per_micro_batch=10_000)
    reference = pa.table([rows, drawn, scores], schema=schema.REFERENCE)
    vectors = pa.table([rows, list(rng.normal(size=(ROWS, 6)).astype(np.float32))], schema=schema.ROW_VECTORS)
    met = met_in_training(pa.table([[0], ["u0"], [[1, 2]]], schema=schema.HISTORIES), examples)
    folder: Path = tmp_path_factory.mktemp("shards")
    write_shards(folder, join_examples(examples, negatives, reference, vectors, met))
    item_vectors = torch.from_numpy(rng.normal(size=(ITEMS, 6)).astype(np.float32))
    return World(catalogue, ExampleShards(folder), item_vectors, histories, tokenizer)
