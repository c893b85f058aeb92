"""What a stage costs is seen in the workers of its Ray, and where Prometheus looks."""

import time
import urllib.request
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from recray.stages import cost
from recray.stages.cost import Meter
from recray.workspace import StageOutput, Workspace

HELD_MIB = 400


class Holder:
    """A worker that holds memory."""

    def __init__(self, mib: int) -> None:
        self.kept = bytearray(mib << 20)

    def holds(self) -> int:
        return len(self.kept)


def soon(found: Callable[[], float]) -> float:
    """What it comes to once it is large enough: looks are taken when the machine has time."""
    until = time.monotonic() + 60
    while found() < HELD_MIB / 1024 and time.monotonic() < until:
        time.sleep(0.2)
    return found()


def ask_for_a_minute(watch: Any) -> None:
    """Ray may take a moment to end it."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        ray.get(watch.peak.remote())
        time.sleep(0.2)


@pytest.mark.usefixtures("ray_cluster")
def test_memory_of_workers_counts_here_and_on_other_machines(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "socket", SimpleNamespace(gethostname=lambda: "no machine of the cluster"))
    with Meter("users", "test") as meter:
        (elsewhere,) = meter._watches
        holder = ray.remote(num_cpus=0)(Holder).remote(HELD_MIB)
        assert ray.get(holder.holds.remote()) == HELD_MIB << 20
        assert soon(lambda: meter._watch.peak().largest_gib) < 2 * HELD_MIB / 1024
        assert soon(lambda: ray.get(elsewhere.peak.remote()).largest_gib) < 2 * HELD_MIB / 1024
        ((together, largest),) = cost._peaks_of(meter._watches)
        found = meter.cost(StageOutput(workspace, "users"), 30)
        ray.kill(holder)
    assert HELD_MIB / 1024 < largest < together
    assert HELD_MIB / 1024 < found["largest_process_gib"] < 2 * HELD_MIB / 1024
    assert found["peak_memory_gib"] > together  # the driver lives here
    with pytest.raises(ray.exceptions.RayActorError):  # nothing is left behind
        ask_for_a_minute(elsewhere)


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_that_is_gone_tells_nothing() -> None:
    gone = ray.remote(num_cpus=0)(cost.MemoryWatch).remote(cost.RunProcesses(None, None, None))
    ray.kill(gone)
    assert cost._peaks_of([gone]) == []


@pytest.mark.usefixtures("ray_cluster")
def test_prometheus_finds_the_cost_of_a_stage(workspace: Workspace) -> None:
    port = ray.nodes()[0]["MetricsExportPort"]
    with Meter("negatives", "test recipe") as meter:
        meter.cost(StageOutput(workspace, "negatives"), 3000)
        until = time.monotonic() + 40
        lines: list[str] = []
        while len(lines) < 3 and time.monotonic() < until:  # Ray hands figures on every ten seconds
            time.sleep(0.5)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                text = page.read().decode()
            lines = [line for line in text.splitlines() if line.startswith("ray_recray_stage") and "negatives" in line]
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert values["ray_recray_stage_rows_per_s"] > 0
    assert 0 < values["ray_recray_stage_peak_memory_gib"] < 24
    assert values["ray_recray_stage_seconds"] > 0
    assert all('run="test recipe"' in line and 'stage="negatives"' in line for line in lines)
