"""Groups of processes that train in the small world."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name(worker), folder, str(rank), str(world), str(port), *settings],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
        for process, output in zip(ranks, outputs, strict=True):
            assert process.returncode == 0, output[-3000:]

    return run
