"""Two ranks, under every ZeRO stage and cut into micro-batches or not, end with the weights of one plain process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file

from recray import schema
from recray.data.catalogue import Catalogue
from recray.data.examples import join_examples, met_in_training, write_shards
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.lm.load import make_model, save_model
from recray.lm.scorer import ItemScorer, score_rows

ROWS, ITEMS = 24, 30
WORKER = Path(__file__).with_name("align_worker.py")
CUTS = [1, 3]  # micro-batches a rank and step: one keeps its graph, three take a second pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, joined examples and item vectors on disk, and what every setting made of them."""
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
    run_group(path, 1, [f"plain:0:{cut}" for cut in CUTS])
    run_group(path, 2, [f"plain:0:{cut}" for cut in CUTS])
    run_group(path, 2, [f"deepspeed:{stage}:{cut}" for stage in (0, 1, 2, 3) for cut in CUTS])
    return path


def run_group(path: Path, world: int, settings: list[str]) -> None:
    """Run every setting in one group of `world` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, path, str(rank), str(world), str(port), *settings],
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


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("kind", "stage"), [("plain", 0), *(("deepspeed", stage) for stage in (0, 1, 2, 3))])
def test_two_ranks_end_with_the_weights_of_one(folder: Path, kind: str, stage: int, cut: int) -> None:
    one = load_file(folder / f"1-plain-0-{cut}.safetensors")
    two = load_file(folder / f"2-{kind}-{stage}-{cut}.safetensors")
    assert one.keys() == two.keys()
    np.testing.assert_allclose(two.pop("metrics"), one.pop("metrics"), rtol=2e-4, atol=2e-5)
    start = load_file(folder / "model" / "model.safetensors")
    moved = np.sqrt(sum(np.square(one[f"model.{name}"] - value).sum() for name, value in start.items()))
    apart = np.sqrt(sum(np.square(one[name] - two[name]).sum() for name in one))
    assert moved > 0.1
    assert apart < 1e-3 * moved
