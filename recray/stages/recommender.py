"""Recommender folders and evaluation rows in a workspace: shared by `sft`, `reference`, `align` and `tune`."""

import hashlib
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from safetensors.torch import load_file

from recray.config import Lora, Optimiser, Sft
from recray.data.catalogue import Catalogue
from recray.data.examples import list_arrays, sample_of
from recray.errors import WorkspaceError
from recray.lm.load import Model, load_model, open_catalogue, open_recommender, save_model, stored_dtype
from recray.lm.lora import add_adapter, merge_adapter, save_adapter
from recray.lm.scorer import ItemScorer
from recray.ranking.rows import refuse_faulty
from recray.stages.feed import Feed
from recray.stages.fitting import Fitted, log_folder
from recray.train.collapse import collapse
from recray.train.engine import Engine, kept_names, make_engine
from recray.train.feeding import ExampleFeed, Share, StreamFeed, windows_of
from recray.train.loop import WATCHED
from recray.train.order import Order
from recray.train.validation import ValidationRows
from recray.workspace import StageOutput, Workspace

logger = logging.getLogger(__name__)

WINDOWS_LOOKED_AT = 10_000


def labels_of(workspace: Workspace) -> list[str]:
    """Return the items' labels in item order."""
    items = workspace.table("ingest", "items", columns=["item", "label"]).sort_by("item")
    labels: list[str] = items["label"].to_pylist()
    return labels


def open_from(workspace: Workspace, *folder: str, quantization: str = "none") -> tuple[Model, Catalogue]:
    """Return the recommender in a folder of the workspace, with the workspace's catalogue."""
    local = workspace.folder(*folder)
    return open_recommender(local, labels_of(workspace), dtype=stored_dtype(local), quantization=quantization)


def catalogue_from(workspace: Workspace, *folder: str) -> Catalogue:
    """Return the catalogue of the recommender in a folder of the workspace, without its model."""
    return open_catalogue(workspace.folder(*folder), labels_of(workspace))


def engine_of(model: Model, optimiser: Optimiser) -> Engine:
    """Return the engine that trains this model as the settings say."""
    if optimiser.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return make_engine(
        ItemScorer(model),
        kind=optimiser.engine,
        weight_decay=optimiser.weight_decay,
        clip_norm=optimiser.clip_norm,
        zero_stage=optimiser.zero_stage,
    )


def validation_rows(workspace: Workspace, count: int, seed: int) -> ValidationRows:
    """Return a seeded sample of the validation split; the same for every stage of a run."""
    table = workspace.table("sequences", "validation")
    refuse_faulty(table, workspace.require("ingest").counts["items"], "sequences/validation")
    table = sample_of(table, count, seed)
    return ValidationRows(
        histories=list_arrays(table["history"]),
        targets=table["target"].to_numpy().astype(np.int64),
        candidates=list_arrays(table["candidates"]),
    )


def sft_feed(workspace: Workspace, catalogue: Catalogue, part: Sft, seed: int, world_size: int) -> Feed:
    """Return the feed of supervised fine-tuning: windows of histories for a stream, examples for an instruction."""
    share = Share(world_size, part.tokens_per_micro_batch)
    order = Order(sft_rows(workspace, part, catalogue), part.global_batch, seed)
    if catalogue.streams:
        return StreamFeed(
            _histories(workspace),
            catalogue,
            order,
            share,
            window_items=part.window_items,
            shuffled=part.shuffled,
            replaced=part.replaced,
        )
    table = workspace.table("sequences", "train").sort_by("row")
    targets = table["target"].to_numpy().astype(np.int64)
    return ExampleFeed(list_arrays(table["history"]), targets, catalogue, order, share)


def sft_rows(workspace: Workspace, part: Sft, catalogue: Catalogue) -> int:
    """Return the rows of one pass of supervised fine-tuning."""
    if not catalogue.streams:
        return int(workspace.table("sequences", "train", columns=["row"]).num_rows)
    lengths = np.array([history.size for history in _histories(workspace)], dtype=np.int64)
    return int(windows_of(lengths, part.window_items)[0].size)


def share_untaught(workspace: Workspace, part: Sft, catalogue: Catalogue) -> float:
    """Return the share of the histories' items that windows of them leave out, as their titles take too many tokens."""
    if not catalogue.streams:
        return 0.0
    histories = _histories(workspace)
    of, number, _ = windows_of(np.array([history.size for history in histories], dtype=np.int64), part.window_items)
    looked_at = np.unique(np.linspace(0, of.size - 1, min(of.size, WINDOWS_LOOKED_AT)).astype(np.int64))
    windows = [histories[of[row]][number[row] * part.window_items :][: part.window_items] for row in looked_at]
    kept = sum(catalogue.kept_history(window) for window in windows)
    return 1 - kept / sum(len(window) for window in windows)


def _histories(workspace: Workspace) -> list[ndarray]:
    return list_arrays(workspace.table("sequences", "histories").sort_by("row")["items"])


def scorer_print(workspace: Workspace, stage: str) -> dict[str, Any]:
    """Return what decides a model's scores: its weights, catalogue (tokenizer, items, prompt) and number format."""
    with workspace.fs.open_input_stream(workspace.path(stage, "model", "model.safetensors")) as stream:
        weights = hashlib.sha256(stream.read()).hexdigest()[:16]
    prompt = workspace.json(stage, "model", "recray_prompt.json")
    config = workspace.json(stage, "model", "config.json")
    return {"weights": weights, "catalogue": prompt["fingerprint"], "dtype": config.get("dtype")}


def refuse_other_reference(workspace: Workspace) -> None:
    """Raise `WorkspaceError` with both fingerprints unless the reference scores are those of sft/model."""
    scored_by, model = workspace.json("reference", "fingerprint.json"), scorer_print(workspace, "sft")
    if scored_by != model:
        raise WorkspaceError(
            f"reference scores were made by {scored_by}, but sft/model is {model}; run `recray reference` again"
        )


def warn_of_dropout(stage: str, lora: Lora | None) -> None:
    """Say that an adapter's dropout gives up what holds without it."""
    if lora is not None and lora.dropout > 0:
        logger.warning(
            "%s.lora.dropout is %g; at 0 loss and gradient are the same on any number of workers, above they are not",
            stage,
            lora.dropout,
        )


def write_fitted(
    out: StageOutput, fitted: Fitted, start: Path, run: str, *, lora: Lora | None = None, base: str | None = None
) -> None:
    """Write a fit's best weights as a recommender's folder like `start`, its metrics, and its TensorBoard events.

    Where an adapter was trained, `adapter` is it alone, and `model` the whole with the adapter merged into it.

    Args:
        out: Gets `model`, `metrics.jsonl`, `tensorboard`, and `adapter` if there is one.
        fitted: What the run left.
        start: The recommender that it started from.
        run: The run's name.
        lora: The adapter's settings, if one was trained.
        base: What the adapter's folder says it belongs to.
    """
    with TemporaryDirectory(prefix="recray-model-") as name:
        folder, adapter = Path(name) / "model", Path(name) / "adapter"
        write_best(fitted, start, folder, adapter, lora=lora, base=base)
        if lora is not None:
            out.write_folder("adapter", adapter)
        out.write_folder("model", folder)
    lines = [json.dumps(line) for line in fitted.metrics]
    out.write_bytes("metrics.jsonl", ("\n".join(lines) + "\n").encode())
    events = f"{log_folder(out.workspace, run)}/tensorboard"
    out.copy_from(events, "tensorboard")
    out.workspace.fs.delete_dir(log_folder(out.workspace, run))
    out.counts["steps"] = fitted.progress.step
    out.facts |= _facts(fitted)


def write_best(
    fitted: Fitted, start: Path, folder: Path, adapter: Path, *, lora: Lora | None, base: str | None = None
) -> None:
    """Write a fit's best weights to `folder` as a recommender like `start`; an adapter's own also to `adapter`."""
    with fitted.weights() as file:
        write_trained(file, start, folder, adapter, lora=lora, base=base)


def write_trained(
    weights_file: Path, start: Path, folder: Path, adapter: Path, *, lora: Lora | None, base: str | None = None
) -> None:
    """Write what was trained, all weights or an adapter, to `folder` as a recommender like `start`."""
    if lora is None:
        write_weights(weights_file, start, folder)
    else:
        write_adapted(weights_file, start, folder, adapter, lora=lora, base=base)


def write_weights(weights_file: Path, start: Path, folder: Path) -> None:
    """Write the recommender of `start` with the weights of an `ItemScorer` in it."""
    model, tokenizer = load_model(start, dtype=stored_dtype(start))
    missing, unexpected = ItemScorer(model).load_state_dict(load_file(weights_file), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if unexpected or {name.removeprefix("model.") for name in missing} - tied:
        raise RuntimeError(f"{weights_file} does not fit {start}: missing {missing}, unexpected {unexpected}")
    save_model(folder, model, tokenizer, open_catalogue(start))


def write_adapted(
    weights_file: Path, start: Path, folder: Path, adapter: Path, *, lora: Lora, base: str | None
) -> None:
    """Write the adapter of an `ItemScorer` on `start` to `adapter`, and the recommender merged with it to `folder`."""
    model, tokenizer = load_model(start, dtype=stored_dtype(start))
    add_adapter(model, lora, seed=0, base=base)  # its weights come from the file
    scorer = ItemScorer(model)
    missing, unexpected = scorer.load_state_dict(load_file(weights_file), strict=False)
    missing = sorted(kept_names(scorer) & set(missing))
    if unexpected or missing:
        raise RuntimeError(f"{weights_file} does not fit {start}: missing {missing}, unexpected {unexpected}")
    save_adapter(adapter, model)
    merge_adapter(model)
    save_model(folder, model, tokenizer, open_catalogue(start))


def _facts(fitted: Fitted) -> dict[str, Any]:
    progress = fitted.progress
    return {
        "best_step": progress.best_step,
        "best_validation_ndcg@10": progress.best,
        "training_seconds": round(progress.seconds, 1),
        "skipped_steps": progress.skipped,
        "collapsed": collapse(fitted.metrics, WATCHED) is not None,
    }


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of a name in the configuration."""
    found: torch.dtype = getattr(torch, name)
    return found
