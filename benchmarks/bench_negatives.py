"""How long negatives take: ten for each of a million rows, every sampler of the registry, in two processes.

    python -m benchmarks.bench_negatives [--quick] [--samplers uniform nearest] [--out benchmarks/results]

Rows, what their users met, vectors, genres and pools are made from a seed; popularity is skewed. Rows go to the
processes 8192 at a time, as in the stage `negatives`. `prepare_s` is what a sampler needs once, before it draws:
batches, neighbours. Not in it is what other stages or a language model make: user vectors for `adaptive`, and for
`self_play` and `top_k_stochastic` the scores of the pools. `own` is the share of negatives that did not come from a
fallback. `cpu_s` is the processor time of both processes: half of it is what the seconds come near to where nothing
else runs.

The slower alternative, uniform negatives row by row, in Python, is measured on 20,000 rows and given for all.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_scoring import table
from recray.negatives.adaptive import Scores
from recray.negatives.in_batch import batches_of
from recray.negatives.lists import Targets
from recray.negatives.nearest import neighbours
from recray.negatives.registry import SAMPLERS, Prepared, needs_of, prepared
from recray.negatives.same_category import genres_of
from recray.negatives.self_play import Pools
from recray.users.ragged import Ragged, from_lengths, take

QUIET = 0.5  # load of a machine that has nothing else to do
ROWS_AT_ONCE, PROCESSES = 8192, 2
NUM, BATCH_ROWS, DIM, POOL, GENRES = 10, 32, 64, 100, 18
LOOPED_ROWS = 20_000
_shared: dict[str, Any] = {}  # what the processes inherit


class World:
    """Rows with targets, what their users met, and all else that samplers are told."""

    def __init__(self, rows: int, items: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.rows, self.items, self.seed = rows, items, seed
        self.ids = np.arange(rows, dtype=np.int64)
        lengths = np.maximum(1, rng.poisson(20, rows))
        weights = 1.0 / (np.arange(items) + 10.0) ** 0.8
        places = rng.random(int(lengths.sum())) * weights.sum()
        every = rng.permutation(items)[np.searchsorted(np.cumsum(weights), places)]
        self.met: Ragged = from_lengths(every.astype(np.int32), lengths)
        self.targets = Targets(self.ids, self.met.items[self.met.offsets[1:] - 1].astype(np.int64))
        self.users = rng.normal(size=(rows, DIM)).astype(np.float32)
        self.vectors = rng.normal(size=(items, DIM)).astype(np.float32)
        self.pools = rng.integers(0, items, size=(rows, POOL), dtype=np.int32)
        # Each item has one genre, every second one another.
        owners = np.concatenate([np.arange(items), np.arange(0, items, 2)])
        pairs = np.unique(owners * GENRES + rng.integers(0, GENRES, len(owners)))
        self.genre_pairs = np.divmod(pairs, GENRES)

    def told(self, name: str) -> dict[str, Any]:
        """Return what a sampler needs, made now."""
        makers: dict[str, Callable[[], Any]] = {
            "num_items": lambda: self.items,
            "frequency": lambda: np.bincount(self.met.items, minlength=self.items),
            "exponent": lambda: 1.0,
            "uniform_share": lambda: 0.5,
            "candidates": lambda: POOL,
            "top_k": lambda: 30,
            "targets": lambda: self.targets,
            "target_frequency": lambda: np.bincount(self.targets.items, minlength=self.items),
            "batches": lambda: batches_of(self.targets, size=BATCH_ROWS, seed=self.seed),
            "genres": lambda: genres_of(*self.genre_pairs, self.items),
            "near": lambda: neighbours(self.vectors, first_rank=11, last_rank=100),
            "scores": lambda: Scores(self.ids, self.users, self.vectors),
            "pools": lambda: Pools(self.ids, self.pools, self.items),
        }
        return {need: makers[need]() for need in needs_of(name)}


def main() -> None:
    """Draw with every sampler, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 rows; to see that it runs")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS))
    parser.add_argument("--out", type=Path, help="folder for the table and the figures as JSON")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    count = 20_000 if options.quick else 1_000_000
    world = World(count, items=count // 50, seed=0)
    rows = []
    for name in options.samplers:
        rows.append(measured(world, name))
        print(table(rows[-1:], header=len(rows) == 1), flush=True)
    rows.append(looped(world))
    print(table(rows[-1:], header=False))
    alone = "" if load < QUIET else f"; not alone on the machine: load {load:.1f} when it began"
    hardware = f"{platform.machine()} CPU, {os.cpu_count()} cores, {PROCESSES} processes{alone}"
    size = {"rows": count, "items": world.items, "negatives_a_row": NUM, "met_a_row": 20, "batch_rows": BATCH_ROWS}
    report = {"hardware": hardware, "versions": {"numpy": np.__version__}, "size": size, "rows": rows}
    if options.out:
        write(report, options.out)
    print(json.dumps(report))


def measured(world: World, name: str) -> dict[str, Any]:
    """Return what `NUM` negatives for every row cost with this sampler."""
    started = time.perf_counter()
    sampler = prepared(name, world.told(name))
    prepare_s = time.perf_counter() - started
    _shared.update(world=world, sampler=sampler)
    before, started = _cpu_s(), time.perf_counter()
    with multiprocessing.get_context("fork").Pool(PROCESSES) as pool:
        own = sum(pool.imap_unordered(_own_of, range(0, world.rows, ROWS_AT_ONCE)))
        pool.close()
        pool.join()
    seconds = time.perf_counter() - started
    return _row(name, world.rows * NUM, seconds, _cpu_s() - before, prepare_s, own / (world.rows * NUM))


def looped(world: World) -> dict[str, Any]:
    """Return what uniform negatives cost row by row in Python, for all rows as for the first of them."""
    count = min(LOOPED_ROWS, world.rows)
    before, started = _cpu_s(), time.perf_counter()
    for row, met in enumerate(_lists(take(world.met, np.arange(count)))):
        rng = np.random.default_rng([world.seed, row])
        chosen: list[int] = []
        while len(chosen) < NUM:
            item = int(rng.integers(world.items))
            if item not in met and item not in chosen:
                chosen.append(item)
    scale = world.rows / count
    seconds, cpu_s = (time.perf_counter() - started) * scale, (_cpu_s() - before) * scale
    return _row("uniform, row by row, 1 process", world.rows * NUM, seconds, cpu_s, 0.0, 1.0)


def _own_of(first: int) -> int:
    """Draw for the rows from `first` on and return how many negatives are the sampler's own."""
    world: World = _shared["world"]
    sampler: Prepared = _shared["sampler"]
    rows = world.ids[first : first + ROWS_AT_ONCE]
    met = take(world.met, rows)
    return int(sampler.draw(rows, met.items, met.offsets, num=NUM, seed=world.seed).own.sum())


def _lists(lists: Ragged) -> Iterator[set[int]]:
    for start, end in zip(lists.offsets[:-1].tolist(), lists.offsets[1:].tolist(), strict=True):
        yield set(lists.items[start:end].tolist())


def _cpu_s() -> float:
    """Return the processor time of this process and of all that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def _row(name: str, negatives: int, seconds: float, cpu_s: float, prepare_s: float, own: float) -> dict[str, Any]:
    return {
        "sampler": name,
        "negatives": f"{negatives:,}",
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s, 1),
        "prepare_s": round(prepare_s, 1),
        "negatives_per_cpu_s": f"{negatives / cpu_s:,.0f}",
        "own": round(own, 4),
    }


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the figures and a table in Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"negatives_cpu{os.cpu_count()}_{datetime.now(UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    rows, size = report["rows"], report["size"]
    names = list(rows[0])
    lines = [
        f"# Negatives, {report['hardware']}",
        "",
        f"{size['negatives_a_row']} negatives for each of {size['rows']:,} rows, {size['items']:,} items, about "
        f"{size['met_a_row']} items met a row, batches of {size['batch_rows']} rows. `own`: the share that is not from "
        "a fallback. `prepare_s` is spent once; scores of a language model and user vectors are not in it. The last "
        f"line was measured on at most {LOOPED_ROWS:,} rows. numpy {report['versions']['numpy']}.",
        "",
        "Made by `python -m benchmarks.bench_negatives --out benchmarks/results`; one run each.",
        "",
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *("| " + " | ".join(str(row[name]) for name in names) + " |" for row in rows),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
