"""The benchmark of negatives in small: every sampler draws for every row, in two processes."""

from pathlib import Path

import pytest

from benchmarks import bench_negatives as bench
from recray.negatives.registry import SAMPLERS


def test_every_sampler_draws_for_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ROWS_AT_ONCE", 150)
    world = bench.World(400, items=300, seed=0)
    rows = [bench.measured(world, name) for name in ("uniform", "mixed", "nearest", "self_play")]
    for row in rows:
        assert row["negatives"] == "4,000"
        assert 0 < row["own"] <= 1
    assert rows[0]["own"] == 1
    rows.append(bench.looped(world))
    size = {"rows": 400, "items": 300, "negatives_a_row": 10, "met_a_row": 20, "batch_rows": 32}
    bench.write({"hardware": "here", "size": size, "versions": {"numpy": "2"}, "rows": rows}, tmp_path / "out")
    text = next((tmp_path / "out").glob("*.md")).read_text()
    assert "| sampler |" in text
    assert "| nearest | 4,000 |" in text


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_world_tells_every_sampler_what_it_needs(name: str) -> None:
    world = bench.World(200, items=300, seed=0)
    bench._shared.update(world=world, sampler=bench.prepared(name, world.told(name)))
    assert bench._own_of(0) > 0
