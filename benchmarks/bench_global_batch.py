"""What an exact global batch costs: the exchange of scores, and the second pass where a step has several micro-batches.

    python -m benchmarks.bench_global_batch [--quick] [--out benchmarks/results]

One and two gloo workers of one thread each take the same steps five ways, interleaved, over several seeds of data:
whole (one micro-batch, whose graph is kept), exact (2 and 4 micro-batches, scored, exchanged, scored again), and local
(2 and 4 micro-batches, each with its own negatives only, one pass), which is what plain accumulation does.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from numpy import ndarray
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from transformers import LlamaConfig

from benchmarks.bench_scoring import CPU_SHAPE, table
from benchmarks.scoring import attend_fast, made, users
from recray.config import Objective
from recray.distributed.collectives import sum_over_ranks
from recray.lm.layout import candidate_layout
from recray.lm.scorer import ItemScorer, sum_by_slot, to_device
from recray.train import step as step_module
from recray.train.engine import PlainEngine
from recray.train.step import AlignStep, MarginCentre
from recray.train.units import MicroBatch, Unit

NEGATIVES, PROMPT = 15, 160
WAYS = (("whole", 1), ("exact", 2), ("exact", 4), ("local", 2), ("local", 4))  # and the micro-batches of each
QUIET = 0.5  # load of a machine that has nothing else to do


class Size(NamedTuple):
    """How much is measured."""

    shape: dict[str, Any]  # of the model
    users: int  # of each worker
    repeats: int
    seeds: int


class Taken(NamedTuple):
    """Seconds of one step on one worker."""

    wall: float
    cpu: float  # of this process: what other work on the machine changes little
    exchange: float  # wall time in the exchange of scores, waiting for the slower worker included


class Clock:
    """Seconds spent in the exchange of scores, waiting for the slower worker included."""

    def __init__(self) -> None:
        self.exchange = 0.0

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, and count how long it took."""
        started = time.perf_counter()
        total = sum_over_ranks(tensor)
        self.exchange += time.perf_counter() - started
        return total


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 repeats of one seed; to see that it runs")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the table and the figures as JSON")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    size = Size(CPU_SHAPE, 8, 2 if options.quick else options.repeats, 1 if options.quick else options.seeds)
    report: dict[str, Any] = {
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, one thread a worker, gloo on one machine",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "load_at_start": round(load, 2),
        "alone": load < QUIET,
        **size._asdict(),
        "negatives": NEGATIVES,
        "prompt_tokens": PROMPT,
    }
    report["rows"] = [row for world in (1, 2) for row in measured(world, size)]
    print(table(report["rows"]))
    if options.out:
        write(report, options.out)
    print(json.dumps(report))


def measured(world: int, size: Size) -> list[dict[str, Any]]:
    """Return one row a way to take a step, of a group of so many workers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as folder:
        file = Path(folder) / "rows.json"
        spawn(_worker, args=(world, port, size, file), nprocs=world)  # type: ignore[no-untyped-call]
        rows: list[dict[str, Any]] = json.loads(file.read_text())
    return rows


def _worker(rank: int, world: int, port: int, size: Size, file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model: Any = made(LlamaConfig(**size.shape), dtype=torch.float32, device="cpu")
    attend_fast(model, "cpu")
    engine = PlainEngine(ItemScorer(model), weight_decay=0.01, clip_norm=1.0)
    taken: list[list[list[Taken]]] = [[] for _ in WAYS]  # by seed
    for seed in range(size.seeds):
        runs = [way(name, engine, unit_of(rank, world, size, count, seed)) for name, count in WAYS]
        for each in taken:
            each.append([])
        for number in range(size.repeats + 1):
            for run, each in zip(runs, taken, strict=True):
                seconds = _timed(run)
                if number:  # the first round warms up
                    each[-1].append(seconds)
    alone = exchange_alone(size.users * world)
    if rank == 0:
        file.write_text(json.dumps(_rows(world, taken, alone)))
    dist.barrier()
    dist.destroy_process_group()


def way(name: str, engine: PlainEngine, unit: Unit) -> Callable[[], None]:
    """Return one step, to be run over and over at rate 0."""
    if name == "local":
        return partial(_local_step, engine, unit)
    step = AlignStep(Objective(), MarginCentre())

    def run() -> None:
        step(engine, unit, learning_rate=0.0)

    return run


def _local_step(engine: PlainEngine, unit: Unit) -> None:
    """Accumulate as is usual: one pass a micro-batch, no scores of others. Its loss stands in for any that is cheap."""
    for number, micro in enumerate(unit.micro_batches):
        packed = to_device(micro.layout, engine.device)
        scores = sum_by_slot(engine.module(packed), packed).view(micro.places.size, -1)
        loss = (scores[:, 1:] - scores[:, :1]).logsumexp(dim=1).sum() / len(unit.rows)
        engine.backward(loss, last=number == len(unit.micro_batches) - 1)
    engine.step(0.0)


def unit_of(rank: int, world: int, size: Size, micro_batches: int, seed: int) -> Unit:
    """Return this worker's users in equal micro-batches; everybody may borrow everything."""
    rng = np.random.default_rng([seed, rank])
    every, own = size.users * world, np.arange(size.users) + rank * size.users
    each = size.users // micro_batches
    cut = [
        MicroBatch(
            own[number * each : (number + 1) * each],
            candidate_layout(
                users(
                    each,
                    prompt_tokens=PROMPT,
                    num_negatives=NEGATIVES,
                    vocabulary=size.shape["vocab_size"],
                    seed=1000 * seed + 10 * rank + number,
                )
            ),
        )
        for number in range(micro_batches)
    ]
    shape = (size.users, every, NEGATIVES)
    arrays: dict[str, ndarray] = {
        "place": own,
        "reference": np.full((every, 1 + NEGATIVES), -30, dtype=np.float32),
        "usable": np.ones(shape, dtype=bool),
        "confidence": rng.uniform(-0.5, 0.5, size=shape).astype(np.float32),
        "liking_sum": np.zeros(1),
    }
    return Unit(0, rank, cut, arrays, list(range(every)))


def exchange_alone(every: int) -> float:
    """Return the median seconds of a step's two exchanges when all workers come to them together."""
    out = torch.zeros(every * (1 + NEGATIVES), dtype=torch.float64)
    back = torch.zeros(out.numel() + len(step_module.METRICS), dtype=torch.float64)
    times = []
    for _ in range(50):
        dist.barrier()
        started = time.perf_counter()
        sum_over_ranks(out)
        sum_over_ranks(back)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _timed(run: Callable[[], None]) -> Taken:
    clock = Clock()
    dist.barrier()
    with patch.object(step_module, "sum_over_ranks", clock.sum_over_ranks):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return Taken(time.perf_counter() - wall, time.process_time() - cpu, clock.exchange)


def _rows(world: int, taken: list[list[list[Taken]]], alone: float) -> list[dict[str, Any]]:
    every = {way: [step for seed in seeds for step in seed] for way, seeds in zip(WAYS, taken, strict=True)}
    wall = {way: statistics.median(step.wall for step in steps) for way, steps in every.items()}
    cpu = {way: statistics.median(step.cpu for step in steps) for way, steps in every.items()}
    rows = []
    for (name, count), seeds in zip(WAYS, taken, strict=True):
        way, whole, local = (name, count), ("whole", 1), ("local", count)
        steps = every[way]
        rows.append(
            {
                "workers": world,
                "way": name,
                "micro_batches": count,
                "step_ms": round(1000 * wall[way], 1),
                "range_ms": [round(1000 * end(step.wall for step in steps)) for end in (min, max)],
                "cpu_ms": round(1000 * cpu[way], 1),
                "cpu_ms_by_seed": [round(1000 * statistics.median(step.cpu for step in seed), 1) for seed in seeds],
                "over_whole": round(wall[way] / wall[whole], 3),
                "cpu_over_whole": round(cpu[way] / cpu[whole], 3),
                "over_local": round(wall[way] / wall[local], 3) if name == "exact" else None,
                "cpu_over_local": round(cpu[way] / cpu[local], 3) if name == "exact" else None,
                "exchange_share": round(statistics.median(step.exchange / step.wall for step in steps), 5),
                "exchange_alone_share": round(alone / wall[way], 6) if name != "local" and world > 1 else 0.0,
            }
        )
    return rows


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the figures, and a table of them in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"global_batch_cpu{os.cpu_count()}_{datetime.now(UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    names = list(report["rows"][0])
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"# Cost of an exact global batch, {report['hardware']}",
        "",
        f"{versions}; {report['date']}; load at the start {report['load_at_start']}, so the machine was "
        f"{'alone' if report['alone'] else 'not alone'}. Llama of {report['shape']['num_hidden_layers']} layers, width "
        f"{report['shape']['hidden_size']}, float32; {report['users']} users a worker, {NEGATIVES} negatives, prompts "
        f"of {PROMPT} tokens. Medians of {report['repeats']} interleaved repeats of each of {report['seeds']} seeds, "
        "and the range of all; CPU time is a worker's own. Shares of step time: of the exchange of scores as it is, "
        "waiting for the slower worker included, and when both come to it together.",
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
    ]
    lines += ["| " + " | ".join(str(row[name]) for name in names) + " |" for row in report["rows"]]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
