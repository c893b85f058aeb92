"""What the loop needs to know of its surroundings: an interface, so that it runs without Ray."""

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Protocol, runtime_checkable

from recray.train.checkpoint import CheckpointStore
from recray.train.units import Unit


class Notice(Enum):
    """What a rank has been told about its near future."""

    NONE = 0
    MACHINE = 1  # its machine goes away: go on elsewhere
    RUN = 2  # the whole run is to end: go on when it is started again


@runtime_checkable
class WorkerContext(Protocol):
    """One rank's view of the group it works in."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""

    @property
    def store(self) -> CheckpointStore:
        """Where the run's checkpoints are: the same place on every rank."""

    @property
    def checkpoint_every_s(self) -> float:
        """Seconds after which a checkpoint is due, beside those at validations."""

    def units(self, first_step: int) -> Iterator[Unit]:
        """Return this rank's units from a step on."""

    def report(self, metrics: Mapping[str, float]) -> None:
        """Publish metrics. Every rank must call it equally often."""

    def progress(self, step: int, steps: int, text: str) -> None:
        """Show how far this rank is, and that it is alive."""

    def notice(self) -> Notice:
        """Return what this rank has been told since it started."""
