"""The guard's benchmark in small: what it draws and counts is what it says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench_guard as bench


@pytest.fixture(scope="module")
def log() -> bench.Log:
    return bench.make_log(0)


def test_a_dose_of_what_borrowers_like_is_what_is_lent(log: bench.Log) -> None:
    rates = []
    for dose in (0.0, 1.0):
        for batch in bench.batches(log, dose, 2, 0):
            assert not log.met[batch.user].gather(1, batch.negatives).any()
            assert all(len(set(own)) == bench.NEGATIVES for own in batch.negatives.tolist())
            assert not batch.lent[torch.arange(bench.BATCH), torch.arange(bench.BATCH)].any()
        found = bench.audited(log, dose, 2, 0)
        rates.append(found["false"])
        lenient = found["by_threshold"][-1]
        assert lenient["left"] < found["false"] < lenient["precision"]
        assert found["shrunk_false"] < found["margin_false"] < found["margin_true"]
    assert rates[1] > 2 * rates[0] > 0


def test_figures_table_and_picture_are_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "TAUGHT_STEPS", 5)
    monkeypatch.setattr(bench, "ALIGNED_STEPS", 1)
    size = bench.Size((0.0, 1.0), (1.0,), 1, 1)
    report = {
        "hardware": "here",
        "versions": {},
        "date": "today",
        "cpu_s": 1.0,
        **size._asdict(),
        **bench.measured(size),
    }
    bench.write(report, tmp_path)
    assert [row["way"] for row in report["aligned"]] == list(bench.WAYS)
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert "| dose | met | false |" in next(tmp_path.glob("*.md")).read_text()


def test_a_policy_that_ranks_by_the_truth_is_perfect(log: bench.Log) -> None:
    assert bench.ndcg(log.liked.float(), log) == pytest.approx(1.0)
    assert bench.ndcg(-log.liked.float(), log) == 0.0
    assert np.isfinite(bench.ndcg(torch.zeros_like(log.users @ log.items.T), log))
