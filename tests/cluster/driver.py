"""A driver that aligns the small world on the cluster of RAY_ADDRESS, with faults; run by the tests, never collected.

python driver.py WORLD WORKSPACE WORKERS SETTINGS [FAULT:STEP:RANK ...]

Faults strike in the worker of a rank once it has taken a step, each once in the life of a workspace.
"""

import contextlib
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recray.config import Objective, Resources
from recray.data.examples import ExampleShards
from recray.errors import RecrayError
from recray.lm.load import open_catalogue, open_recommender
from recray.lm.scorer import ItemScorer
from recray.stages.cluster import connect, log_lines
from recray.stages.fitting import Fit, RayContext, run_fit
from recray.train.engine import make_engine
from recray.train.feeding import AlignFeed, Share
from recray.train.log import MetricsLog
from recray.train.loop import Plan, Progress, fit
from recray.train.order import Order
from recray.train.step import AlignStep, MarginCentre
from recray.workspace import Workspace

STEPS, RUN = 20, "align"
OBJECTIVE = Objective(margin="batch")  # whose centre is state, too
LABELS = [f"{word} {number}" for number in range(10) for word in ("Fox", "Owl Hill", "Elk")]


def make_feed(world: Path, world_size: int) -> AlignFeed:
    """The feed of the small world."""
    return AlignFeed(
        ExampleShards(world / "shards"),
        open_catalogue(world / "model", LABELS),
        torch.from_numpy(np.load(world / "item_vectors.npy")),
        Order(60, 12, 5),
        Share(world_size, 10**6),
        OBJECTIVE,
        num_negatives=3,
    )


def work(
    world: Path,
    settings: dict[str, Any],
    faults: list[str],
    driver: int,
    place: Path,
    context: RayContext,
    log: MetricsLog,
) -> Progress:
    """Align on one rank, and be struck by what is to come."""
    engine = make_engine(
        ItemScorer(open_recommender(world / "model")[0]),
        kind=settings.get("engine", "deepspeed"),
        weight_decay=0.01,
        clip_norm=1.0,
        zero_stage=settings.get("zero_stage", 2),
    )
    centre = MarginCentre()
    step = AlignStep(OBJECTIVE, centre)
    shown = context.progress

    def progress(done: int, steps: int, text: str) -> None:
        shown(done, steps, text)
        for fault in faults:
            kind, when, rank = fault.split(":")
            if done == int(when) and context.rank == int(rank) and is_first_time(place, fault):
                strike(kind, driver, place)

    context.progress = progress  # type: ignore[method-assign]
    plan = Plan(STEPS, settings.get("validate_every", 5), None, 1e-2, 0.1, 0.1)
    return fit(
        engine,
        context,
        plan,
        take_step=lambda engine, unit, rate: step(engine, unit, learning_rate=rate),
        validate=lambda _: {"ndcg@10": 0.1},
        log=log,
        centre=centre,
    )


def is_first_time(place: Path, fault: str) -> bool:
    """Whether this fault has not struck yet."""
    with contextlib.suppress(FileExistsError):
        os.close(os.open(place / fault.replace(":", "-"), os.O_CREAT | os.O_EXCL))
        return True
    return False


def strike(kind: str, driver: int, place: Path) -> None:
    """Let it happen, to this process or around it."""
    me, filler = os.getpid(), place / "workspace" / "filler"
    signals = {
        "kill": (me, signal.SIGKILL),
        "term": (me, signal.SIGTERM),
        "stop": (me, signal.SIGSTOP),  # hangs with all its threads
        "term-driver": (driver, signal.SIGTERM),
        "kill-node": (os.getppid(), signal.SIGKILL),  # the raylet; a machine's workers go with it
    }
    if kind in signals:
        (place / f"{kind}.pid").write_text(str(me))
        os.kill(*signals[kind])
        # For it to be passed on, as a step here takes milliseconds; or until this process goes.
        time.sleep({"term-driver": 3, "kill-node": 60}.get(kind, 0))
    elif kind == "free-disk":
        filler.unlink()
    else:
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))


def main() -> None:
    """Connect, align, and leave what the run logged beside the workspace."""
    world, place, workers, settings = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    resources = Resources(
        num_workers=workers,
        cpus_per_worker=settings.get("worker_cpus", 0.25),
        threads_per_worker=1,
        checkpoint_every_s=1e6,
        hang_after_s=settings.get("hang_after_s", 600.0),
        min_workers=settings.get("min_workers"),
    )
    log_lines()
    workspace = Workspace(str(place / "workspace"))
    fitting = Fit(
        name="align",
        run=RUN,
        steps=STEPS,
        make_feed=partial(make_feed, world),
        work=partial(work, world, settings, sys.argv[5:], os.getpid(), place),
    )
    with connect(resources):
        try:
            fitted = run_fit(fitting, workspace, resources)
        except RecrayError as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            sys.exit(3)
    (place / "metrics.json").write_text(json.dumps(fitted.metrics))


if __name__ == "__main__":
    main()
