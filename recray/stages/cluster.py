"""The Ray that a run stands on: the cluster that is there, or a local one for the time of the run.

A stage never starts Ray. `recray` (or `python -m pipelines.run` as a Ray job) wraps the flow in `connect`.
"""

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.data import DataContext
from ray.exceptions import RayActorError, RayTaskError
from rich.logging import RichHandler

from recray import errors
from recray.config import Resources
from recray.errors import ConfigError, RecrayError

logger = logging.getLogger(__name__)

OWN_TEXT = re.compile(
    rf"^{errors.__name__}\.(?P<kind>\w+): (?P<message>.*?)(?=\n\n|\n\x1b|\Z)",
    re.MULTILINE | re.DOTALL,
)
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# What workers' Hugging Face libraries read, too. Never the token: a runtime environment is public.
HANDED_ON = ("HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HOME")
DATA_CPUS = 1  # to feed the trainer: with none left over, workers would wait for their first row for ever
KNOCK_TIMEOUT_S = 10.0
# A logger that Ray 2.60 names after its file: a line a report and rank.
REPORTS = str(Path(ray.__file__).parent / "train" / "v2" / "_internal" / "execution" / "context.py")


@contextmanager
def connect(resources: Resources, address: str | None = None) -> Iterator[None]:
    """Hold a connection to Ray: a running cluster where there is one, else a local Ray, stopped afterwards.

    A cluster is `address` (`local`: none), RAY_ADDRESS (which Ray sets in a submitted job), or the one that `ray start`
    left a note of.
    Token authentication stays as Ray sets it up: on, also for a local Ray.

    Raises:
        ConfigError: if no cluster answers at the address, or a local Ray is too small for `resources`.
    """
    if ray.is_initialized():
        yield
        return
    cluster = None if address == "local" else address or running_cluster()
    environment = worker_environment(resources)
    if cluster is None:
        environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # nobody preempts this machine
    for name, value in {**environment, "RAY_USAGE_STATS_ENABLED": "0"}.items():
        os.environ.setdefault(name, value)
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    terminal = sys.stdout.isatty() and sys.stderr.isatty()
    if not terminal:  # a job's log: no colours before the lines of workers, no bars drawn anew
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    _start(cluster, environment)
    try:
        DataContext.get_current().enable_progress_bars = terminal
        _check_size(resources, cluster, ray.cluster_resources())
        yield
    finally:
        ray.shutdown()


def running_cluster() -> str | None:
    """Return the address of the cluster to attach to, None if a local Ray is wanted."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return address
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
    return note.read_text().strip() if note.is_file() else None


def worker_environment(resources: Resources) -> dict[str, str]:
    """Return the environment variables that every worker process needs, those of a submitted job left out.

    A job's own runtime environment wins: Ray refuses the same variable from both.
    """
    environment = {
        "OMP_NUM_THREADS": str(resources.threads_per_worker),
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if resources.gpus_per_worker == 0:
        environment["DS_ACCELERATOR"] = "cpu"
        # Keep freed memory: handing tensors of a step back to the system and faulting them in again in the next one
        # took a fifth of a step's time.
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**30)
        environment["MALLOC_TRIM_THRESHOLD_"] = str(2**33)
    environment |= {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    taken = (job.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in environment.items() if name not in taken}


def log_lines() -> None:
    """Show recray's log: coloured on a terminal, plain lines elsewhere; also run as every worker starts."""
    package = logging.getLogger("recray")
    package.setLevel(logging.INFO)
    package.propagate = False
    # Its actor that watches worker groups asks the dashboard, which a local Ray does not have, and complains.
    logging.getLogger("ray.train.v2").setLevel(logging.ERROR)
    logging.getLogger(REPORTS).setLevel(logging.WARNING)
    if sys.stderr.isatty():
        package.handlers = [RichHandler(show_path=False, log_time_format="%X", rich_tracebacks=False)]
        return
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter(LINE))
    package.handlers = [lines]


def own_error(error: BaseException) -> RecrayError | None:
    """Return the `RecrayError` at the bottom of what Ray wrapped around it, or None if there is none.

    Ray Train hands a worker's error on as one failure a rank, Ray tasks as the cause, Ray Data as text alone, and an
    actor that could not be made as the text of its death.
    """
    seen: list[BaseException] = []
    waiting = [error]
    while waiting:
        current = waiting.pop(0)
        # Ray's own wrapper is an instance of what it wraps, but its text is the worker's traceback.
        if isinstance(current, RecrayError) and not isinstance(current, RayTaskError):
            return current
        if isinstance(current, RayTaskError | RayActorError) and (told := OWN_TEXT.search(str(current))):
            kind: type[RecrayError] = getattr(errors, told["kind"])
            return kind(told["message"])
        seen.append(current)
        failures = getattr(current, "worker_failures", None)
        inner = [getattr(current, "cause", None), current.__cause__, current.__context__]
        inner += list(failures.values()) if isinstance(failures, dict) else []
        waiting += [each for each in inner if isinstance(each, BaseException) and each not in seen]
    return None


def _start(cluster: str | None, environment: dict[str, str]) -> None:
    settings: dict[str, Any] = {
        "runtime_env": {
            "env_vars": environment,
            "worker_process_setup_hook": f"{log_lines.__module__}.{log_lines.__name__}",
        },
        "logging_level": "WARNING",
    }
    settings["address"] = cluster or "local"
    if cluster is None:
        settings["include_dashboard"] = False
        # It warns that token authentication is on, and how to switch it off.
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if cluster is not None:
        _knock(cluster)
    dashboard = ray.init(**settings).dashboard_url
    there = ray.cluster_resources()
    logger.info(
        "Ray: %s, %g CPUs, %g GPUs%s",
        "started here" if cluster is None else f"cluster at {cluster}",
        there.get("CPU", 0),
        there.get("GPU", 0),
        f", dashboard http://{dashboard}" if dashboard else "",
    )


def _knock(cluster: str) -> None:
    """Refuse an address where nobody listens; Ray itself would try for minutes."""
    host, _, port = cluster.rpartition(":")
    if "://" in cluster or not port.isdigit():  # "auto", or a form that Ray resolves by itself
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_TIMEOUT_S).close()
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {cluster} ({error}); start it, or work on a local Ray with --address "
            "local; the address is that of RAY_ADDRESS or of ray_current_cluster below /tmp/ray, if none was given"
        ) from None


def _check_size(resources: Resources, cluster: str | None, available: dict[str, float]) -> None:
    """Refuse a local Ray that can never place the workers; warn on a cluster, which may still grow."""
    workers, cpus, gpus = resources.num_workers, resources.cpus_per_worker, resources.gpus_per_worker
    lacking = []
    if gpus == 0 and available.get("GPU", 0.0) > 0:
        logger.warning("resources.gpus_per_worker is 0: the %g GPUs that are there are not used", available["GPU"])
    if workers * cpus + DATA_CPUS > available.get("CPU", 0.0):
        need = f"{workers * cpus + DATA_CPUS:g} CPUs ({workers} workers x {cpus:g}, {DATA_CPUS} to feed them)"
        lacking.append(f"{need} are needed, {available.get('CPU', 0.0):g} are there")
    if workers * gpus > available.get("GPU", 0.0):
        need = f"{workers * gpus:g} GPUs ({workers} workers x {gpus:g})"
        lacking.append(f"{need} are needed, {available.get('GPU', 0.0):g} are there")
    if not lacking:
        return
    message = f"{'; '.join(lacking)}; lower resources.num_workers, cpus_per_worker or gpus_per_worker"
    if cluster is None:
        raise ConfigError(message)
    logger.warning("%s, or wait for the cluster at %s to grow", message, cluster)
