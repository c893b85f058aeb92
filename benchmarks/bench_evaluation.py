"""How long intervals, tests, slices and exposure take once every row is ranked: 100,000 rows, five models, eight pairs.

    python -m benchmarks.bench_evaluation [--quick] [--out benchmarks/results]

Ranks and items are drawn from a seed; what is computed of them is what `evaluate` computes, at its default settings.
Two worlds: 30,000 users, some with hundreds of rows, and as many users as rows. Beside it, for all rows, the same
intervals with a resampling of its own for every model and every pair. Linear algebra has one thread.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bench_scoring import table
from recray.config import Evaluate
from recray.ranking.genres import Genres
from recray.ranking.intervals import clustered_means
from recray.ranking.slices import slices
from recray.ranking.summary import (
    Ranked,
    Settings,
    band_hit_rates,
    exposure,
    genre_exposure,
    measures,
    paired_tests,
    sliced,
    summaries,
)

MODELS = ("popularity", "cooccurrence", "sasrec", "sft", "aligned")
PAIRS = (
    *(("aligned", other) for other in MODELS[-2::-1]),
    *((learned, counted) for learned in ("sft", "sasrec") for counted in MODELS[:2]),
)
ITEMS, GENRES, CANDIDATES, HISTORY, HEADLINE = 10_000, 20, 20, 10, 10
COLD_SHARE = 0.2  # of the catalogue


class World(NamedTuple):
    """Ranked rows, and what is known of users and items."""

    ranked: dict[str, Ranked]
    users: np.ndarray  # [R] names
    targets: np.ndarray  # [R]
    lengths: np.ndarray  # [R] of the histories
    met: np.ndarray  # items of the histories, end to end
    popularity: np.ndarray  # [ITEMS]
    genres: Genres


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,000 rows; to see that it runs")
    parser.add_argument("--out", type=Path, help="folder for the table and the figures as JSON")
    options = parser.parse_args()
    rows = 2_000 if options.quick else 100_000
    part = Evaluate()
    report: dict[str, Any] = {
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores, one used",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "load_at_start": round(os.getloadavg()[0], 2),
        "settings": part.model_dump(mode="json", include={"ks", "bootstrap_samples", "confidence"}),
    }
    report["rows"] = [measured(made(rows, users, seed=0), part) for users in (rows * 3 // 10, rows)]
    print(table(report["rows"]))
    if options.out:
        write(report, options.out)
    print(json.dumps(report))


def made(rows: int, users: int, seed: int) -> World:
    """Return a world in which every user has a row, and the rows beyond go to few."""
    rng = np.random.default_rng(seed)
    share = 1.0 / np.arange(1, users + 1) ** 0.8
    beyond = rng.choice(users, size=rows - users, p=share / share.sum())
    owners = rng.permutation(np.concatenate([np.arange(users), beyond]))
    popularity = 100_000 // np.arange(1, ITEMS + 1)
    popularity[int((1 - COLD_SHARE) * ITEMS) :] = 0
    lengths = rng.integers(0, 2 * HISTORY + 1, size=rows)
    ranked = {
        model: Ranked(
            rng.integers(1, CANDIDATES + 1, size=rows), rng.integers(0, ITEMS, size=(rows, CANDIDATES), dtype=np.int64)
        )
        for model in MODELS
    }
    each = rng.integers(0, 4, size=ITEMS)
    return World(
        ranked,
        np.array([f"user-{owner}" for owner in owners]),
        rng.integers(0, ITEMS, size=rows),
        lengths,
        rng.integers(0, ITEMS, size=int(lengths.sum())),
        popularity,
        Genres.of(np.array([f"genre {genre}" for genre in rng.integers(0, GENRES, size=int(each.sum()))]), each),
    )


def measured(world: World, part: Evaluate) -> dict[str, Any]:
    """Return one row of the table."""
    settings = Settings(part.ks, part.bootstrap_samples, part.confidence, seed=0)
    ranked, users, targets, popularity = world.ranked, world.users, world.targets, world.popularity
    parts = slices(world.lengths, targets, popularity)
    cpu = time.process_time()
    seconds = {
        "intervals_s": _seconds(lambda: summaries(ranked, PAIRS, users, popularity, settings)),
        "tests_s": _seconds(lambda: paired_tests(ranked, PAIRS, users, HEADLINE, 0)),
        "slices_s": _seconds(lambda: sliced(ranked, parts, users, settings)),
        "exposure_s": _seconds(lambda: _exposure(world)),
    }
    cpu = time.process_time() - cpu
    return {
        "rows": len(users),
        "users": len(np.unique(users)),
        "largest_user": int(np.unique(users, return_counts=True)[1].max()),
        "slices": len(parts),
        **seconds,
        "all_s": round(sum(seconds.values()), 2),
        "cpu_s": round(cpu, 2),
        "one_by_one_s": _seconds(lambda: _one_by_one(world, settings)),
    }


def _exposure(world: World) -> None:
    exposure(world.ranked, world.targets, world.popularity)
    band_hit_rates(world.ranked, world.targets, world.popularity, HEADLINE)
    genre_exposure(world.ranked, world.met, world.targets, world.genres, (1, HEADLINE))


def _one_by_one(world: World, settings: Settings) -> None:
    """Resample the users for every model and for every pair: the same numbers, the plain way."""
    own = {model: measures(each, world.popularity, settings.ks) for model, each in world.ranked.items()}
    values = {model: np.stack(list(found.values()), axis=1) for model, found in own.items()}
    for each in (*values.values(), *(values[first] - values[second] for first, second in PAIRS)):
        clustered_means(each, world.users, samples=settings.samples, confidence=settings.confidence, seed=settings.seed)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return round(time.perf_counter() - started, 3)


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the figures as JSON, and a page that says what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"evaluation_cpu{os.cpu_count()}_{datetime.now(UTC):%Y%m}"
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    settings = report["settings"]
    lines = ["| " + " | ".join(report["rows"][0]) + " |", "|" + "---|" * len(report["rows"][0])]
    lines += ["| " + " | ".join(f"{value:,}" for value in row.values()) + " |" for row in report["rows"]]
    (folder / f"{name}.md").write_text(
        f"# Intervals and tests of an evaluation\n\n{report['date']}; {report['hardware']}; numpy "
        f"{report['versions']['numpy']}; load {report['load_at_start']} at the start"
        f"{'' if report['load_at_start'] < 0.5 else ', so not alone on the machine'}.\n\n"
        f"{len(MODELS)} models, {len(PAIRS)} pairs, k of {', '.join(map(str, settings['ks']))}, "
        f"{settings['bootstrap_samples']:,} resamples of users, 9,999 flips. `intervals_s`: models and pairs, all "
        "rows; `slices_s`: models, every slice with a resampling of its own users; `all_s`: all that `evaluate` "
        "computes once the rows are ranked, `cpu_s` its processor time; `largest_user`: rows of the user who has "
        "most.\nThe slower way, `one_by_one_s`: what `intervals_s` is, with a resampling for each model and pair.\n\n"
        "Made by `OPENBLAS_NUM_THREADS=1 python -m benchmarks.bench_evaluation --out benchmarks/results`; one run "
        "each.\n\n" + "\n".join(lines) + "\n"
    )


if __name__ == "__main__":
    main()
