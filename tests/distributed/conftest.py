"""Groups of processes that train in the small world."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes import run_together

RunGroup = Callable[[str, int, list[str]], None]


@pytest.fixture(scope="session")
def folder(small_world: Path) -> Path:
    """The small world; workers write what they made beside it."""
    return small_world


@pytest.fixture(scope="session")
def run_group(folder: Path) -> RunGroup:
    """Runs every setting in one group of so many processes of a worker script."""

    def run(worker: str, world: int, settings: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        commands = [[folder, rank, world, port, *settings] for rank in range(world)]
        run_together(Path(__file__).with_name(worker), commands, folder / f"printed-{port}")

    return run
