"""The global-batch benchmark in small: two workers take every way, and what it divides by is what it says."""

from typing import Any

from benchmarks import bench_global_batch as bench

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_two_workers_take_a_step_in_every_way() -> None:
    rows = bench.measured(2, bench.Size(SHAPE, users=4, repeats=1, seeds=1))
    assert [(row["way"], row["micro_batches"]) for row in rows] == list(bench.WAYS)
    by_way = {(row["way"], row["micro_batches"]): row for row in rows}
    for (name, _), row in by_way.items():
        assert row["step_ms"] > 0
        # Only exact steps exchange scores.
        assert (row["exchange_share"] > 0) == (name != "local")
    assert by_way["whole", 1]["over_whole"] == 1.0
    exact, local = by_way["exact", 2], by_way["local", 2]
    assert abs(exact["cpu_over_local"] - exact["cpu_ms"] / local["cpu_ms"]) < 0.05 * exact["cpu_over_local"]
