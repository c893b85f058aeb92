"""Metrics of a fit reach the disk, or are kept until they can."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recray.train.log import MetricsLog


def drawn(folder: Path) -> list[tuple[int, float]]:
    """Steps and values of the loss in a folder's events."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_lines_and_events_hold_what_was_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write("train", 1, {"loss": 2.0}, rows="00ff")
    log.write("train", 2, {"loss": 1.5}, rows="00fe")
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == log.lines() == MetricsLog(tmp_path).lines()
    assert lines[0] == {"kind": "train", "step": 1, "loss": 2.0, "rows": "00ff"}
    assert drawn(tmp_path) == [(1, 2.0), (2, 1.5)]


def test_what_came_after_the_checkpoint_goes_when_a_run_goes_on_from_it(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 1.0})
    log.restore(log.lines()[:1])
    log.write("train", 2, {"loss": 0.5})
    assert [(line["step"], line["loss"]) for line in MetricsLog(tmp_path).lines()] == [(1, 1.0), (2, 0.5)]


def test_lines_that_found_no_room_are_written_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(tmp_path)
    log.write("train", 1, {"loss": 2.0})
    (tmp_path / "metrics.jsonl").rename(tmp_path / "away")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log.write("train", 2, {"loss": 1.5})
    log.write("train", 3, {"loss": 1.0})
    assert caplog.text.count("No space left on device") == 1
    assert [line["step"] for line in log.lines()] == [1, 2, 3]
    (tmp_path / "metrics.jsonl").unlink()
    log.close()
    assert [line["step"] for line in MetricsLog(tmp_path).lines()] == [1, 2, 3]
    assert drawn(tmp_path) == [(1, 2.0), (2, 1.5), (3, 1.0)]
