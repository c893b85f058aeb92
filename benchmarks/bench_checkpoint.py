"""What checkpoints cost a run: the steps between them, and how long training waits for each.

    python -m benchmarks.bench_checkpoint [--quick] [--out benchmarks/results]

One worker takes the same steps three ways, interleaved: without checkpoints, with one every `STEPS_BETWEEN` steps that
is hashed and made to count beside training, and with the same one waited for. Under the plain engine and ZeRO-2.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pyarrow.fs import LocalFileSystem
from torch import nn
from transformers import LlamaConfig

from benchmarks.bench_scoring import table
from benchmarks.scoring import made
from recray.lm.scorer import ItemScorer
from recray.train.checkpoint import CheckpointStore
from recray.train.checkpoint_writer import CheckpointWriter
from recray.train.engine import Engine, make_engine

SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "intermediate_size": 1024,
}
STEPS_BETWEEN, TOKENS = 20, 512
WAYS = ("none", "beside training", "waited for")


class Step:
    """Forward, backward and update of one row of random tokens."""

    def __init__(self, kind: str, shape: dict[str, Any]) -> None:
        model: Any = made(LlamaConfig(**shape), dtype=torch.float32, device="cpu")
        self.engine: Engine = make_engine(
            ItemScorer(model), kind=kind, weight_decay=0.01, clip_norm=1.0, zero_stage=2 if kind == "deepspeed" else 0
        )
        self._model: nn.Module = model
        self._tokens = torch.randint(shape["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def __call__(self) -> None:
        self.engine.backward(self._model(input_ids=self._tokens, labels=self._tokens).loss, last=True)
        self.engine.step(0.0)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model and 2 repeats; to see that it runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the table and the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.quick else 2)
    shape = SHAPE | ({"hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 64} if options.quick else {})
    repeats = 2 if options.quick else options.repeats
    report: dict[str, Any] = {
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, local disk",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "load_at_start": round(os.getloadavg()[0], 2),
        "steps_between": STEPS_BETWEEN,
        "repeats": repeats,
        "tokens_a_step": TOKENS,
    }
    with tempfile.TemporaryDirectory(prefix="recray-group-") as folder:  # DeepSpeed wants a group, be it of one
        os.environ.setdefault("LOCAL_RANK", "0")
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        report["rows"] = [row for kind in ("plain", "deepspeed") for row in measured(kind, shape, repeats)]
        dist.destroy_process_group()
    print(table(report["rows"]))
    if options.out:
        write(report, options.out)
    print(json.dumps(report))


def measured(kind: str, shape: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    """Return one row a way, of an engine."""
    step = Step(kind, shape)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    waited: dict[str, list[float]] = {way: [] for way in WAYS}
    size = 0
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as folder:
        store = CheckpointStore(LocalFileSystem(), folder)
        writer = CheckpointWriter(store, torch.device("cpu"))
        step()
        for number in range(repeats + 1):
            for way in WAYS:
                writer.settle()
                before = writer.seconds
                took = _stretch(step, writer, way)
                if number:  # the first round warms up
                    seconds[way].append(took)
                    waited[way].append(writer.seconds - before)
        writer.settle()
        saved = store.newest()
        size = sum(Path(folder, name).stat().st_size for name in saved.files) if saved else 0
    bare = statistics.median(seconds["none"])
    return [
        {
            "engine": kind,
            "checkpoints": way,
            "MiB": round(size / 2**20, 1) if way != "none" else 0,
            "step_ms": round(1000 * statistics.median(seconds[way]) / STEPS_BETWEEN, 1),
            "spread_ms": round(1000 * (max(seconds[way]) - min(seconds[way])) / STEPS_BETWEEN, 1),
            "waits_ms": round(1000 * statistics.median(waited[way]), 1),
            "waits_of_a_step": round(statistics.median(waited[way]) / (bare / STEPS_BETWEEN), 2),
        }
        for way in WAYS
    ]


def _stretch(step: Step, writer: CheckpointWriter, way: str) -> float:
    """Return the seconds of the steps between two checkpoints, with the one that they begin with."""
    started = time.perf_counter()
    if way != "none":
        writer.write(0, partial(_save, step.engine), {})
    if way == "waited for":
        writer.settle()
    for _ in range(STEPS_BETWEEN):
        step()
    return time.perf_counter() - started


def _save(engine: Engine, folder: Path) -> None:
    engine.save(folder, "state")


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the figures as JSON, and a page that says what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "checkpoint_cpu2_202611"
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}.md").write_text(
        f"# What a checkpoint costs\n\n{report['date']}; {report['hardware']}; torch {report['versions']['torch']}; "
        f"load {report['load_at_start']} at the start.\n"
        f"`python -m benchmarks.bench_checkpoint --out benchmarks/results`. Medians of stretches of {STEPS_BETWEEN} "
        f"steps of {TOKENS} tokens, {report['repeats']} each way, with one checkpoint a stretch; spread is the largest "
        "less the smallest.\n\n"
        f"{table(report['rows'])}\n\n"
        "`waits`: how long training stood still for one checkpoint, in milliseconds and in steps without one.\n"
    )


if __name__ == "__main__":
    main()
