"""What the loop needs to know of its surroundings: an interface, so that it runs without Ray."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from recray.train.units import Unit


@runtime_checkable
class WorkerContext(Protocol):
    """One rank's view of the group it works in."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    def resume_folder(self) -> Path | None:
        """Return the folder that `report` was last given before an interruption, or None at a fresh start."""

    def units(self, first_step: int) -> Iterator[Unit]:
        """Return this rank's units from a step on."""

    def report(self, metrics: Mapping[str, float], folder: Path) -> None:
        """Publish metrics and a checkpoint folder. Every rank must call it equally often."""

    def progress(self, step: int, steps: int, text: str) -> None:
        """Show how far this rank is."""
