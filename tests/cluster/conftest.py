"""Ray clusters of several nodes on this machine, and drivers that are not this process."""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Ended(NamedTuple):
    """How a driver ended."""

    status: int
    output: str
    seconds: float


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head node; tests add others."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "object_store_memory": 200 * 1024**2, "include_dashboard": False}
    with (
        warnings.catch_warnings(),
        pytest.MonkeyPatch.context() as environment,
        # Its sockets need short names; and nobody else on this machine shall find this cluster.
        tempfile.TemporaryDirectory(prefix="rt", ignore_cleanup_errors=True) as folder,
    ):
        warnings.simplefilter("ignore")
        environment.setenv("RAY_TMPDIR", folder)
        nodes = Cluster(initialize_head=True, head_node_args=head)
        yield nodes
        nodes.shutdown()


@pytest.fixture
def worker_node(cluster: Any) -> Iterator[Callable[[], Any]]:
    """Adds a node of three CPUs, one more than the head has; all such nodes go when the test ends."""
    added = []

    def add() -> Any:
        added.append(cluster.add_node(num_cpus=3, object_store_memory=100 * 1024**2))
        return added[-1]

    yield add
    for node in added:
        cluster.remove_node(node)


@pytest.fixture(scope="module")
def drive(cluster: Any, small_world: Path) -> Callable[..., Ended]:
    """Runs a driver on the cluster to its end, with its workspace and marks in `place`."""

    def run(place: Path, *faults: str, workers: int = 2, **settings: Any) -> Ended:
        environment = {**os.environ, "RAY_ADDRESS": cluster.address}
        environment.pop("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", None)  # off for local Rays only
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("driver.py"))]
        command += [str(small_world), str(place), str(workers), json.dumps(settings), *faults]
        place.mkdir(exist_ok=True)
        started = time.monotonic()
        done = subprocess.run(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
            check=False,
        )
        ended = Ended(done.returncode, done.stdout, time.monotonic() - started)
        print(f"{' '.join(faults) or 'no fault'}: status {ended.status}, {ended.seconds:.1f} s\n{ended.output}")
        return ended

    return run
