"""SASRec fitted by Ray Train; vectors of every row's user by Ray Data actors, and of every item."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import ray.train.torch
import torch
from ray.data import ActorPoolStrategy
from ray.train import Checkpoint, FailureConfig, LoggingConfig, RunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from recray.config import Users
from recray.errors import ModelError
from recray.schema import ITEM_VECTORS, ROW_VECTORS
from recray.stages.embedding import EmbedHistories, lists_of
from recray.stages.flow import Job
from recray.stages.group import backend, scaling
from recray.stages.rowwise import read_rows, write_rows
from recray.users.fit import Validation, fit
from recray.users.ragged import from_arrow
from recray.users.sasrec import SASRec, Shape, item_vectors, load, save
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

CURVE = "curve.json"
ROWS_AT_ONCE = 1024
ACTOR_CPUS = 0.5  # leaves room for reading on a machine of one CPU


def run(job: Job) -> None:
    """Fit SASRec, then write the vector of every item and of every row's user, `row` by `row`."""
    part: Users = job.part
    items = job.workspace.table("ingest", "items", ["item"]).num_rows
    shape = Shape(items, part.dim, part.layers, part.heads, part.max_history, part.dropout)
    with tempfile.TemporaryDirectory(prefix="recray-users-") as local:
        folder = Path(local)
        _fit(job, shape, folder)
        curve = json.loads((folder / CURVE).read_text(encoding="utf-8"))
        (folder / CURVE).unlink()
        job.out.write_json(CURVE, curve)
        job.out.write_folder("model", folder)
        vectors = lists_of(item_vectors(load(folder)))
    table = pa.table([pa.array(np.arange(items, dtype=np.int32)), vectors], schema=ITEM_VECTORS)
    job.out.write_table("items", table)
    for split in ("train", "validation", "test"):
        _embed(job, split)
    best = curve[curve[-1]["best_pass"] - 1]
    job.out.facts |= {key: round(value, 4) for key, value in best.items() if key not in ("best_pass", "seconds")}
    job.out.facts["passes"] = len(curve)


def _embed(job: Job, split: str) -> None:
    """Stream a split's histories through the actors."""
    resources = job.resources
    dataset, rows = read_rows(job.workspace, "sequences", split, ["row", "history"])
    gpu = resources.gpus_per_worker > 0
    model = (".partial", job.out.stage, "model")
    vectors = dataset.map_batches(
        EmbedHistories,
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        compute=ActorPoolStrategy(size=resources.data_actors),
        num_cpus=ACTOR_CPUS,
        num_gpus=min(1.0, resources.gpus_per_worker) if gpu else None,
        fn_constructor_args=(job.workspace, model, resources.threads_per_worker, gpu),
    )
    write_rows(job, split, vectors, rows, ROW_VECTORS)


def _fit(job: Job, shape: Shape, folder: Path) -> None:
    """Fit on Ray Train's workers and put the best model and the curve into `folder`."""
    resources, fs = job.resources, job.workspace.fs
    name = f"users-{job.fingerprint}"
    trainer = TorchTrainer(
        _fit_worker,
        train_loop_config={
            "workspace": job.workspace,
            "shape": shape,
            "settings": job.part,
            "seed": job.seed,
            "threads": resources.threads_per_worker,
        },
        scaling_config=scaling(resources),
        torch_config=TorchConfig(backend=backend(resources)),
        run_config=RunConfig(
            name=name,
            storage_path=job.workspace.path(".training"),
            storage_filesystem=fs,
            # A lost worker costs the fit from its start: minutes, and the same weights in the end.
            failure_config=FailureConfig(max_failures=2),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    checkpoint = trainer.fit().checkpoint
    if checkpoint is None:
        raise ModelError(f"the fit {name} ended without a model; see the log of its workers")
    checkpoint.to_directory(str(folder))
    fs.delete_dir(job.workspace.path(".training", name))


def _fit_worker(config: dict[str, Any]) -> None:
    """Run on every rank; rank 0 hands over the best model. One report, from all ranks, or Ray Train would hang."""
    workspace: Workspace = config["workspace"]
    settings: Users = config["settings"]
    if not torch.cuda.is_available():
        torch.set_num_threads(config["threads"])
    leads = ray.train.get_context().get_world_rank() == 0
    histories = workspace.table("sequences", "histories", ["row", "items"]).sort_by("row")
    rows = workspace.table("sequences", "validation").sort_by("row")
    validation = Validation(
        from_arrow(rows["history"]), from_arrow(rows["candidates"]), np.asarray(rows["target"], dtype=np.int32)
    )
    model = SASRec(config["shape"], seed=config["seed"]).to(ray.train.torch.get_device())

    def report(line: dict[str, Any]) -> None:
        if leads:
            logger.info(_sentence(line, settings.passes))

    curve = fit(model, from_arrow(histories["items"]), validation, settings, seed=config["seed"], report=report)
    if not leads:
        ray.train.report({"passes": len(curve)})
        return
    with tempfile.TemporaryDirectory(prefix="recray-sasrec-") as local:
        save(model, Path(local))
        (Path(local) / CURVE).write_text(json.dumps(curve), encoding="utf-8")
        ray.train.report({"passes": len(curve)}, checkpoint=Checkpoint.from_directory(local))


def _sentence(line: dict[str, Any], passes: int) -> str:
    return (
        f"users: pass {line['pass']} of at most {passes}, loss {line['loss']:.3f} nats, validation NDCG@10 "
        f"{line['validation_ndcg@10']:.4f}, HR@10 {line['validation_hr@10']:.4f}, {line['seconds']:.1f} s"
    )
