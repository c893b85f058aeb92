"""Metrics of a fit: one JSON object a line, and TensorBoard events, in one folder."""

import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

NOT_DRAWN = ("kind", "step", "rows", "seconds")


class MetricsLog:
    """Appends to `metrics.jsonl` and to TensorBoard event files of a local folder.

    A disk that is full costs no line: all are kept in memory as well, go into checkpoints from there, and are written
    again at the end.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = folder / "metrics.jsonl"
        self._events: SummaryWriter | None = None
        self._gaps = False  # lines that did not reach the disk
        self._lines: list[dict[str, Any]] = []
        if self._file.exists():
            self._lines = [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]

    def write(self, kind: str, step: int, metrics: Mapping[str, float], **labels: str) -> None:
        """Add one line of `kind` "train" or "validation"; labels stand beside the metrics, and make no event."""
        line = {"kind": kind, "step": step, **metrics, **labels}
        self._lines.append(line)
        if self._gaps:
            return
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            self._draw(line)
        except OSError as error:
            logger.warning("metrics can't be written to %s (%s); they are kept until the end", self._file, error)
            self._gaps = True
            if self._events is not None:
                with suppress(OSError):
                    self._events.close()
                self._events = None

    def lines(self) -> list[dict[str, Any]]:
        """Return everything written so far."""
        return list(self._lines)

    def restore(self, lines: list[dict[str, Any]]) -> None:
        """Begin again from these lines: what an interrupted run wrote after its checkpoint goes."""
        self._lines = list(lines)
        self._file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def close(self) -> None:
        """Flush the events, and write what did not reach the disk."""
        if self._gaps:
            self._gaps = False
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
            self.restore(self._lines)
            for line in self._lines:
                self._draw(line)
        if self._events is not None:
            self._events.close()

    def _draw(self, line: Mapping[str, Any]) -> None:
        if self._events is None:
            self._events = SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in line.items():
            if name not in NOT_DRAWN:
                self._events.add_scalar(f"{line['kind']}/{name}", value, line["step"])
