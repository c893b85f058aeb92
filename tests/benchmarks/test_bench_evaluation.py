"""The evaluation's benchmark in small: the world it makes has the rows it says, and everything is timed."""

from pathlib import Path

import numpy as np

from benchmarks import bench_evaluation as bench
from recray.config import Evaluate


def test_a_made_world_is_measured_and_written(tmp_path: Path) -> None:
    world = bench.made(300, 90, seed=0)
    times = np.unique(world.users, return_counts=True)[1]
    assert (len(times), times.sum()) == (90, 300)
    assert times.max() > 5 * np.median(times)
    row = bench.measured(world, Evaluate(bootstrap_samples=20))
    assert (row["rows"], row["users"], row["largest_user"]) == (300, 90, times.max())
    assert row["all_s"] > row["slices_s"] > 0
    assert len(bench.PAIRS) == 8
    report = {
        "hardware": "here",
        "versions": {"numpy": "2"},
        "date": "2026-11-21",
        "load_at_start": 0.1,
        "settings": Evaluate().model_dump(mode="json", include={"ks", "bootstrap_samples", "confidence"}),
        "rows": [row],
    }
    bench.write(report, tmp_path)
    page = next(tmp_path.glob("*.md")).read_text()
    assert "| rows | users |" in page
    assert "alone" not in page
