"""The audit's benchmark in small: the workspace it makes can be audited, and it finds no leak in it."""

from pathlib import Path

import pytest

from benchmarks import bench_audit as bench


@pytest.mark.usefixtures("ray_cluster")
def test_a_made_workspace_is_audited(tmp_path: Path) -> None:
    size = bench.Size(histories=400, items=100, mean_length=6, test_rows=300, validation_rows=50)
    workspace = bench.make(tmp_path, size, seed=0)
    row = bench.audited(workspace, 200, size)
    assert (row["test_rows"], row["scored_rows"]) == (300, 200)
    assert row["seconds"] >= row["fit_s"] > 0
    assert row["memory_gib"] > 0
    assert row["cpu_s"] > 0
    assert workspace.require("audit").facts["leaks"] == []
    bench.write({"hardware": "here", "size": size._asdict(), "rows": [row]}, tmp_path / "out")
    assert "| sequences |" in next((tmp_path / "out").glob("*.md")).read_text()
