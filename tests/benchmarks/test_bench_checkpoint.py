"""The checkpoint benchmark in small: every way is taken, and only those that write one wait."""

from benchmarks import bench_checkpoint as bench

SHAPE = bench.SHAPE | {"vocab_size": 128, "hidden_size": 48, "num_hidden_layers": 1, "intermediate_size": 64}


def test_what_waits_is_what_writes() -> None:
    none, beside, waited = bench.measured("plain", SHAPE, 1)
    assert (none["checkpoints"], none["MiB"], none["waits_ms"]) == ("none", 0, 0.0)
    assert beside["MiB"] == waited["MiB"] > 0
    assert beside["waits_ms"] > 0
    assert waited["waits_ms"] > 0
