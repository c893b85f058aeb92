"""The scoring benchmark's own parts: its baselines score the same, and what it would run on a GPU runs."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import bench_scoring
from benchmarks.scoring import made, methods, tokens_passed, users

SHAPE: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_all_methods_give_the_same_scores() -> None:
    model = made(LlamaConfig(**SHAPE), dtype=torch.float32, device="cpu")
    segments = users(3, prompt_tokens=20, num_negatives=4, vocabulary=256)
    with torch.no_grad():
        found = [method.score(method.prepare(segments)) for method in methods(model, "cpu")]
    assert found[0].shape == (15,)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=0)


def test_tokens_are_counted_by_what_passes_through_the_layers() -> None:
    segments = users(2, prompt_tokens=20, num_negatives=4, vocabulary=256)
    model = made(LlamaConfig(**SHAPE), dtype=torch.float32, device="cpu")
    shared, separate, _ = methods(model, "cpu")
    counted = tokens_passed(segments)
    assert counted["shared"] == int((shared.prepare(segments).segment >= 0).sum())
    assert counted["separate"] == int((separate.prepare(segments).segment >= 0).sum())


@pytest.mark.parametrize("saving", [False, True])
def test_what_a_gpu_would_run_runs_here_in_small(saving: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {key: value for key, value in SHAPE.items() if key != "num_attention_heads"} | {"heads": (2, 1)}
    monkeypatch.setattr(bench_scoring, "GPU_SHAPES", {"tiny": small})
    monkeypatch.setattr(bench_scoring, "GPU_PROMPT", 24)
    row = bench_scoring.gpu_row("tiny", 3, 1, saving=saving, device="cpu")
    assert row["tokens_per_s"] > 0
    assert row["score_error"] < 1.0  # bf16
    assert row["memory_ratio"] < 1.0
    assert row["mfu"] is None  # nobody knows the peak of this CPU
