"""Metrics of a fit: one JSON object a line, and TensorBoard events, in one folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard event files of a local folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = folder / "metrics.jsonl"
        self._events = SummaryWriter(str(folder / "tensorboard"))

    def write(self, kind: str, step: int, metrics: Mapping[str, float], **labels: str) -> None:
        """Add one line of `kind` "train" or "validation"; labels stand beside the metrics, and make no event."""
        line = {"kind": kind, "step": step, **metrics, **labels}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in metrics.items():
            self._events.add_scalar(f"{kind}/{name}", value, step)

    def lines(self) -> list[dict[str, Any]]:
        """Return everything written so far."""
        if not self._file.exists():
            return []
        return [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]

    def restore(self, lines: list[dict[str, Any]]) -> None:
        """Begin again from these lines: what an interrupted run wrote after its checkpoint goes."""
        self._file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def close(self) -> None:
        """Flush the events."""
        self._events.close()
