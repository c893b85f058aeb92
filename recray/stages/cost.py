"""What a stage costs: seconds, memory, rows and tokens a second; in its manifest, and as Ray metrics while it runs.

Ray is asked only where somebody else has started it: the flow imports this, and imports no Ray.
"""

import json
import logging
import os
import socket
import sys
import time
from typing import Any, Self

from recray.memory import MemoryWatch, Peak, RunProcesses
from recray.report.accounts import tokens_per_s
from recray.workspace import StageOutput

logger = logging.getLogger(__name__)

ANSWER_S = 5.0  # within which a machine has to tell what it saw
METRICS = {
    "seconds": "Wall time of the stage so far.",
    "peak_memory_gib": "Most memory that the run's processes held at one moment, on the machine that held most.",
    "rows_per_s": "Rows that the stage worked on, a second.",
    "tokens_per_s": "Tokens that one worker trained on, a second: the median step.",
}


class Meter:
    """Measures while it is entered.

    Args:
        stage: What is measured.
        run: Tells runs on one dashboard apart.
    """

    def __init__(self, stage: str, run: str) -> None:
        self._tags = {"stage": stage, "run": run}
        self._started = time.monotonic()
        self._watches: list[Any] = []
        self._gauges: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        session = job = None
        if _ray_is_there():
            from ray import get_runtime_context

            session, job = get_runtime_context().get_session_name(), get_runtime_context().get_job_id()
            self._gauges = _gauges()
            self._watches = _watches_elsewhere(session, job)
        self._watch = MemoryWatch(RunProcesses(os.getpid(), session, job), told=self._tell)
        return self

    def __exit__(self, *_: object) -> None:
        self._watch.stop()
        if self._watches and _ray_is_there():
            import ray

            for watch in self._watches:
                ray.kill(watch)

    def cost(self, out: StageOutput, rows: int | None) -> dict[str, float]:
        """Return what there is to tell of the stage so far, by the names of `METRICS`, and the largest process.

        Args:
            out: What the stage has written.
            rows: That it worked on.
        """
        seconds = time.monotonic() - self._started
        found: dict[str, float | None] = {"seconds": seconds, "tokens_per_s": _tokens_per_s(out)}
        peaks = [self._watch.peak(), *_peaks_of(self._watches)]
        found["peak_memory_gib"] = max(peak.together_gib for peak in peaks) or None
        found["largest_process_gib"] = max(peak.largest_gib for peak in peaks) or None
        if rows:
            # A fit that was interrupted has trained on rows in seconds that are not of this run.
            found["rows_per_s"] = rows / float(out.facts.get("training_seconds") or seconds)
        told = {name: round(value, 3) for name, value in found.items() if value is not None}
        self._set(told)
        return {name: value for name, value in told.items() if name != "seconds"}  # which the manifest has

    def _tell(self, peak: Peak) -> None:
        self._set({"seconds": time.monotonic() - self._started, "peak_memory_gib": peak.together_gib})

    def _set(self, values: dict[str, float]) -> None:
        for name in values.keys() & self._gauges.keys():
            self._gauges[name].set(values[name], tags=self._tags)


def _ray_is_there() -> bool:
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def _gauges() -> dict[str, Any]:
    """Return what Ray shows: on its dashboard, and to Prometheus as ray_recray_stage_NAME."""
    from ray.util.metrics import Gauge

    return {
        name: Gauge(f"recray_stage_{name}", description=told, tag_keys=("stage", "run"))
        for name, told in METRICS.items()
    }


def _watches_elsewhere(session: str, job: str) -> list[Any]:
    """Return an actor that watches on each machine of the cluster but this one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    others = {node["NodeManagerHostname"]: node["NodeID"] for node in ray.nodes() if node["Alive"]}
    others.pop(socket.gethostname(), None)
    watch = ray.remote(num_cpus=0)(MemoryWatch)
    return [
        watch.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            RunProcesses(None, session, job)
        )
        for node in others.values()
    ]


def _peaks_of(watches: list[Any]) -> list[Peak]:
    """Return what other machines saw; a machine that is gone, or too busy to answer, tells nothing."""
    if not watches:
        return []
    import ray

    asked = [watch.peak.remote() for watch in watches]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
    found = []
    for answer in answered:
        try:
            found.append(ray.get(answer))
        except ray.exceptions.RayError as error:
            logger.debug("memory of a machine is not known: %s", error)
    return found


def _tokens_per_s(out: StageOutput) -> float | None:
    """Return the median of a fit's steps; None where the stage is no fit of a language model."""
    path = out.path("metrics.jsonl")
    if not out.workspace.exists(".partial", out.stage, "metrics.jsonl"):
        return None
    with out.fs.open_input_stream(path) as stream:
        lines = [json.loads(line) for line in stream.read().decode().splitlines() if line.strip()]
    return tokens_per_s(lines)
