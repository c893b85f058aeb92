"""SASRec fitted by Ray Train; vectors of every row's user by Ray Data actors, and of every item.

With two folds of users, two more of each: fitted without one fold, to judge the negatives of its users.
"""

import json
import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray.train
import ray.train.torch
import torch
from ray.data import ActorPoolStrategy, Dataset
from ray.train import Checkpoint, FailureConfig, LoggingConfig, RunConfig
from ray.train.torch import TorchTrainer

from recray.config import Users
from recray.data.examples import aligned, list_arrays, matrix, met_in_training, sample_of
from recray.errors import ModelError
from recray.negatives.same_category import Genres, genres_of_items
from recray.schema import CROSSFIT_ITEMS, CROSSFIT_ROWS, ITEM_VECTORS, ROW_VECTORS
from recray.stages.collectives import NodesTorch
from recray.stages.embedding import EmbedHistories, EmbedUnseen, lists_of, vectors_of_folds
from recray.stages.flow import Job
from recray.stages.group import backend, scaling
from recray.stages.rowwise import read_rows, write_rows
from recray.users.crossfit import Log, confidences, folds_of, in_as_many_steps, separation, without
from recray.users.fit import Validation, fit
from recray.users.ragged import from_arrow
from recray.users.sasrec import SASRec, Shape, item_vectors, load, save
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

CURVE = "curve.json"
ROWS_AT_ONCE = 1024
ACTOR_CPUS = 0.5  # leaves room for reading on a machine of one CPU
TRUTH_ROWS, TRUTH_ITEMS = 512, 1024  # of which confidences are compared with a known truth
WHOLE = "model"


def run(job: Job) -> None:
    """Fit SASRec, then write the vector of every item and of every row's user, `row` by `row`."""
    part: Users = job.part
    items = job.workspace.table("ingest", "items", ["item"]).num_rows
    shape = Shape(items, part.dim, part.layers, part.heads, part.max_history, part.dropout)
    with tempfile.TemporaryDirectory(prefix="recray-users-") as local:
        _fit(job, shape, Path(local))
        curve, *others = [_keep(job, Path(local), name) for name in names_of(part.folds)]
        vectors = [item_vectors(load(Path(local) / name)) for name in names_of(part.folds)]
    item = pa.array(np.arange(items, dtype=np.int32))
    job.out.write_table("items", pa.table([item, lists_of(vectors[0])], schema=ITEM_VECTORS))
    for split in ("train", "validation", "test"):
        _embed(job, split)
    if others:
        folds = [
            pa.table([pa.array([fold] * items, pa.int32()), item, lists_of(own)], schema=CROSSFIT_ITEMS)
            for fold, own in enumerate(vectors[1:])
        ]
        job.out.write_table("crossfit_items", pa.concat_tables(folds))
        _embed_unseen(job)
    job.out.facts |= _best(curve)
    if others:
        job.out.facts["without_fold"] = [_best(other) for other in others]
    if job.workspace.exists("ingest", "truth"):
        job.out.facts["known_truth"] = _meet_the_truth(job)


def names_of(folds: int) -> list[str]:
    """Return the folders of the models of so many folds: of all users, and without each fold of them."""
    return [WHOLE] if folds == 1 else [WHOLE, *(f"{WHOLE}_without_fold_{fold}" for fold in range(folds))]


def _keep(job: Job, local: Path, name: str) -> list[dict[str, Any]]:
    """Move a fitted model into the stage, its curve apart; return that."""
    file = local / name / CURVE
    curve: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    file.unlink()
    job.out.write_json(name.replace(WHOLE, "curve", 1) + ".json", curve)
    job.out.write_folder(name, local / name)
    return curve


def _best(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the best pass of a curve, and how many there were."""
    best = curve[curve[-1]["best_pass"] - 1]
    found = {key: round(value, 4) for key, value in best.items() if key not in ("best_pass", "seconds")}
    return found | {"passes": len(curve)}


def _embed(job: Job, split: str) -> None:
    """Stream a split's histories through the actors."""
    dataset, rows = read_rows(job.workspace, "sequences", split, ["row", "history"])
    model = (".partial", job.out.stage, WHOLE)
    write_rows(job, split, _mapped(job, dataset, EmbedHistories, (job.workspace, model)), rows, ROW_VECTORS)


def _embed_unseen(job: Job) -> None:
    """Stream the training histories through the models that were fitted without their users."""
    dataset, rows = read_rows(job.workspace, "sequences", "train", ["row", "user_id", "history"])
    models = tuple((".partial", job.out.stage, name) for name in names_of(job.part.folds)[1:])
    vectors = _mapped(job, dataset, EmbedUnseen, (job.workspace, models, job.seed))
    write_rows(job, "crossfit_train", vectors, rows, CROSSFIT_ROWS)


def _mapped(job: Job, dataset: Dataset, actor: type, arguments: tuple[Any, ...]) -> Dataset:
    resources = job.resources
    gpu = resources.gpus_per_worker > 0
    return dataset.map_batches(
        actor,
        batch_format="pyarrow",
        batch_size=ROWS_AT_ONCE,
        compute=ActorPoolStrategy(size=resources.data_actors),
        num_cpus=ACTOR_CPUS,
        num_gpus=min(1.0, resources.gpus_per_worker) if gpu else None,
        fn_constructor_args=(*arguments, resources.threads_per_worker, gpu),
    )


def _meet_the_truth(job: Job) -> dict[str, float]:
    """Return how well confidences tell known false negatives from other items that a row's user did not meet."""
    train = job.workspace.table("sequences", "train")
    sample = sample_of(train.select(["row", "user_id"]), TRUTH_ROWS, job.seed)
    items = np.random.default_rng(job.seed).permutation(job.out.counts["items"])[:TRUTH_ITEMS]
    truth = job.workspace.table("ingest", "truth")
    liked = dict(zip(truth["user_id"].to_pylist(), list_arrays(truth["liked"]), strict=True))
    known = met_in_training(job.workspace.table("sequences", "histories"), train)
    nothing = np.zeros(0, dtype=np.int32)
    users = sample["user_id"].to_pylist()
    false = np.array([np.isin(items, liked.get(user, nothing)) for user in users], dtype=bool)
    unmet = np.array([~np.isin(items, known[user]) for user in users], dtype=bool)
    found = {
        name: separation(sure, false, unmet) for name, sure in _judgements(job, sample["row"].to_numpy(), items).items()
    }
    return {name: round(value, 4) for name, value in found.items() if np.isfinite(value)}


def _judgements(job: Job, rows: np.ndarray, items: np.ndarray) -> dict[str, np.ndarray]:
    """Return confidences of these rows' users in these items, by the model of all users and, if there are, by folds."""
    tables = {"separation": ("train", "items"), "separation_crossfit": ("crossfit_train", "crossfit_items")}
    found = {}
    for name, (by_row, by_item) in tables.items():
        if len(rows) and by_row in job.out.counts:
            table = aligned(rows, _written(job, by_row), f"users/{by_row}")
            judges = [vectors[items] for vectors in vectors_of_folds(_written(job, by_item))]
            folds = table["fold"].to_numpy() if len(judges) > 1 else np.zeros(len(rows), dtype=np.int32)
            found[name] = confidences(matrix(table["vector"]), folds, judges)
    return found


def _written(job: Job, name: str) -> pa.Table:
    return pads.dataset(job.out.path(name), filesystem=job.out.fs, format="parquet").to_table()


def _fit(job: Job, shape: Shape, folder: Path) -> None:
    """Fit on Ray Train's workers and put each best model, with its curve, into a folder of `folder`."""
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
        torch_config=NodesTorch(backend=backend(resources)),
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
    """Run on every rank; rank 0 hands over the best models. One report, from all ranks, or Ray Train would hang."""
    settings: Users = config["settings"]
    if not torch.cuda.is_available():
        torch.set_num_threads(config["threads"])
    leads = ray.train.get_context().get_world_rank() == 0
    whole = _log(config["workspace"], config["seed"])
    genres = _genres(config["workspace"]) if settings.sampler == "same_category" else None
    with tempfile.TemporaryDirectory(prefix="recray-sasrec-") as local:
        for fold, name in enumerate(names_of(settings.folds), -1):
            log, own = (whole, settings) if name == WHOLE else (without(fold, whole), in_as_many_steps(settings))
            model = SASRec(config["shape"], seed=config["seed"]).to(ray.train.torch.get_device())
            tell = partial(_tell, own.passes, None if name == WHOLE else fold) if leads else _silent
            curve = fit(model, log.histories, log.validation, own, seed=config["seed"], report=tell, genres=genres)
            if leads:
                save(model, Path(local) / name)
                (Path(local) / name / CURVE).write_text(json.dumps(curve), encoding="utf-8")
        ray.train.report({}, checkpoint=Checkpoint.from_directory(local) if leads else None)


def _log(workspace: Workspace, seed: int) -> Log:
    """Return what SASRec is fitted on."""
    histories = workspace.table("sequences", "histories", ["row", "user_id", "items"]).sort_by("row")
    rows = workspace.table("sequences", "validation").sort_by("row")
    return Log(
        from_arrow(histories["items"]),
        Validation(
            from_arrow(rows["history"]), from_arrow(rows["candidates"]), np.asarray(rows["target"], dtype=np.int32)
        ),
        *(folds_of(table["user_id"], seed=seed) for table in (histories, rows)),
    )


def _genres(workspace: Workspace) -> Genres:
    return genres_of_items(workspace.table("ingest", "items", ["item", "genres"]).sort_by("item")["genres"])


def _silent(line: dict[str, Any]) -> None:
    del line


def _tell(passes: int, fold: int | None, line: dict[str, Any]) -> None:
    logger.info(
        "users%s: pass %d of at most %d, loss %.3f nats, validation NDCG@10 %.4f, HR@10 %.4f, %.1f s",
        "" if fold is None else f" without fold {fold}",
        line["pass"],
        passes,
        line["loss"],
        line["validation_ndcg@10"],
        line["validation_hr@10"],
        line["seconds"],
    )
