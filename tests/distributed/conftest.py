"""A small world on disk, and groups of processes that train in it."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recray import schema
from recray.data.catalogue import Catalogue
from recray.data.examples import join_examples, met_in_training, write_shards
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.lm.load import make_model, save_model
from recray.lm.scorer import ItemScorer, score_rows

ROWS, ITEMS = 60, 30

RunGroup = Callable[[str, int, list[str]], None]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, joined examples and item vectors; workers write what they made beside them."""
    path = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    labels = [f"{word} {number}" for number in range(10) for word in ("Fox", "Owl Hill", "Elk")]
    template = find_template("titles")
    tokenizer = train_tokenizer(training_texts(template, labels), 300)
    catalogue = Catalogue.build(labels, tokenizer, template, 96)
    model = make_model(tokenizer, hidden_size=16, layers=2, heads=2, intermediate_size=24, max_positions=256, seed=1)
    save_model(path / "model", model, tokenizer, catalogue)
    rows = list(range(ROWS))
    histories = [rng.integers(ITEMS, size=rng.integers(1, 8)).tolist() for _ in rows]
    drawn = [rng.permutation(ITEMS)[:4] for _ in rows]
    scores = score_rows(
        ItemScorer(model).eval(), catalogue, [np.array(h) for h in histories], drawn, tokens_per_micro_batch=9999
    )
    examples = pa.table([rows, [f"u{r // 2}" for r in rows], histories, [d[0] for d in drawn]], schema=schema.EXAMPLES)
    negatives = pa.table([rows, [d[1:].tolist() for d in drawn]], schema=schema.NEGATIVES)
    reference = pa.table([rows, [d.tolist() for d in drawn], scores], schema=schema.REFERENCE)
    vectors = pa.table([rows, rng.normal(size=(ROWS, 6)).tolist()], schema=schema.ROW_VECTORS)
    met = met_in_training(pa.table([[0], ["u0"], [[1, 2]]], schema=schema.HISTORIES), examples)
    write_shards(path / "shards", join_examples(examples, negatives, reference, vectors, met))
    np.save(path / "item_vectors.npy", rng.normal(size=(ITEMS, 6)).astype(np.float32))
    return path


@pytest.fixture(scope="session")
def run_group(folder: Path) -> RunGroup:
    """Runs every setting in one group of so many processes of a worker script."""

    def run(worker: str, world: int, settings: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name(worker), folder, str(rank), str(world), str(port), *settings],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
        for process, output in zip(ranks, outputs, strict=True):
            assert process.returncode == 0, output[-3000:]

    return run
