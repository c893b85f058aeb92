"""Supervised fine-tuning: the language model learns the catalogue and the histories. Ray Train and DeepSpeed."""

import logging
import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.compute as pc

from recray.config import Sft
from recray.data.catalogue import Catalogue, check_boundaries
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.lm.attention import known_positions
from recray.lm.load import Model, Tokenizer, load_model, make_model, save_model
from recray.lm.lora import add_adapter, check_targets, require_nf4
from recray.lm.scorer import ItemScorer
from recray.lm.selfcheck import choose_sharing
from recray.ranking.baselines import item_popularity
from recray.stages.feed import Feed
from recray.stages.fitting import Fit, run_fit
from recray.stages.flow import Job
from recray.stages.recommender import (
    catalogue_from,
    dtype_of,
    engine_of,
    labels_of,
    open_from,
    sft_feed,
    sft_rows,
    share_untaught,
    validation_rows,
    warn_of_dropout,
    write_fitted,
)
from recray.train.context import WorkerContext
from recray.train.log import MetricsLog
from recray.train.loop import Plan, Progress, fit
from recray.train.step import MarginCentre, stream_step
from recray.train.validation import ValidationRows, validate
from recray.workspace import Workspace

logger = logging.getLogger(__name__)


def run(job: Job) -> None:
    """Make or load the model, check that prompts and sharing are exact for it, and fit it."""
    part: Sft = job.part
    if part.model.quantization == "nf4":
        require_nf4()
    name = f"sft-{job.fingerprint}"
    start = f"{name}-start"
    catalogue = _write_start(job, start)
    rows = sft_rows(job.workspace, part, catalogue)
    _warn_of_untaught(job, part, catalogue)
    steps = max(1, math.ceil(part.passes * rows / part.global_batch))
    every = max(1, round(part.validate_every * rows / part.global_batch))
    logger.info("sft: %d rows a pass, at most %d steps of %d", rows, steps, part.global_batch)
    fitted = run_fit(
        Fit(
            name="sft",
            run=name,
            steps=steps,
            make_feed=partial(make_feed, job.workspace, start, part, job.seed),
            work=partial(_work, job.workspace, start, part, job.seed, steps, every),
        ),
        job.workspace,
        job.resources,
    )
    folder = job.workspace.folder(".training", start)
    write_fitted(job.out, fitted, folder, name, lora=part.lora, base=part.model.path)
    job.out.counts["rows"] = rows
    job.workspace.remove(".training", name)
    job.workspace.remove(".training", start)


def _warn_of_untaught(job: Job, part: Sft, catalogue: Catalogue) -> None:
    """Say so if windows of histories are longer than prompts may be: their oldest items are then never a target."""
    untaught = share_untaught(job.workspace, part, catalogue)
    job.out.facts["share_of_items_untaught"] = round(untaught, 4)
    if untaught > 0:
        logger.warning(
            "sft: %.1f %% of the histories' items are not taught, as windows of sft.window_items=%d items take more "
            "than %d tokens; lower it, or raise sft.prompt.max_tokens",
            100 * untaught,
            part.window_items,
            catalogue.max_prompt_tokens,
        )


def _write_start(job: Job, name: str) -> Catalogue:
    """Write the model as it is before training, where every worker can read it; return its catalogue."""
    part: Sft = job.part
    labels = labels_of(job.workspace)
    template = find_template(part.prompt.template)
    dtype = dtype_of(part.model.dtype)
    if part.model.path is None:
        tokenizer = trained_tokenizer(job.workspace, part, labels)
        shape = part.model.model_dump(include={"hidden_size", "layers", "heads", "intermediate_size", "max_positions"})
        model = make_model(tokenizer, **shape, seed=job.seed, dtype=dtype)
    else:
        model, tokenizer = load_model(part.model.path, dtype=dtype, trust_remote_code=part.model.trust_remote_code)
    catalogue = _within_positions(
        Catalogue.build(labels, tokenizer, template, part.prompt.max_tokens), model, tokenizer
    )
    check_boundaries(catalogue, tokenizer)
    rows = validation_rows(job.workspace, part.validation_rows, job.seed)
    error = choose_sharing(
        ItemScorer(model), catalogue, rows.histories[:3], [items[:8] for items in rows.candidates[:3]]
    )
    logger.info("sft: item scores are the model's own, to %.1e nats", error)
    with TemporaryDirectory(prefix="recray-start-") as folder:
        save_model(Path(folder), model, tokenizer, catalogue)
        job.workspace.put_folder(Path(folder), ".training", name)
    if part.lora is not None:
        check_targets(model, part.lora)
        warn_of_dropout("sft", part.lora)
        if part.model.path is None:
            logger.warning("sft.lora trains an adapter on random weights, as sft.model.path names no model")
    job.out.facts |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "longest_item_tokens": int(catalogue.item_lengths.max()),
        "prompts_shared": catalogue.shares_prompt,
        "sharing_error_nats": error,
        "longest_prompt_tokens": catalogue.max_prompt_tokens,
        "share_of_validation_prompts_cut": _share_cut(catalogue, rows),
    }
    return catalogue


def trained_tokenizer(workspace: Workspace, part: Sft, labels: list[str]) -> Tokenizer:
    """Return a tokenizer trained on the catalogue; if titles may be tokens, with those met in training, most first."""
    texts = training_texts(find_template(part.prompt.template), labels)
    if part.model.tokens == "words":
        return train_tokenizer(texts, part.model.vocabulary)
    histories = workspace.table("sequences", "histories", columns=["items"])
    counts = item_popularity(pc.list_flatten(histories["items"]).to_numpy(), len(labels))
    met_most = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return train_tokenizer(texts, part.model.vocabulary, whole=[labels[item] for item in met_most])


def _within_positions(catalogue: Catalogue, model: Model, tokenizer: Tokenizer) -> Catalogue:
    """Return the catalogue with prompts short enough that the longest item behind them stays in known positions.

    The oldest items of a history go, never the instruction or the candidates.

    Raises:
        CatalogueError: if no history would fit.
    """
    known, asked = known_positions(model), catalogue.max_prompt_tokens
    longest_item = int(catalogue.item_lengths.max())
    if known is None or asked + longest_item <= known:
        return catalogue
    room = known - longest_item
    logger.warning(
        "sft: prompts are cut to %d tokens, not sft.prompt.max_tokens=%d: the model knows %d positions, and the "
        "longest item takes %d; the oldest items of a history go",
        room,
        asked,
        known,
        longest_item,
    )
    return Catalogue.build(catalogue.labels, tokenizer, catalogue.template, room)


def _share_cut(catalogue: Catalogue, rows: ValidationRows) -> float:
    """Return the share of prompts that don't hold the whole history their row has."""
    cut = [
        catalogue.kept_history(history, items) < history.size
        for history, items in zip(rows.histories, rows.candidates, strict=True)
    ]
    return round(float(np.mean(cut)), 4)


def make_feed(workspace: Workspace, start: str, part: Sft, seed: int, world_size: int) -> Feed:
    """Return the feed of supervised fine-tuning, with the catalogue of the starting model."""
    return sft_feed(workspace, catalogue_from(workspace, ".training", start), part, seed, world_size)


def _work(
    workspace: Workspace,
    start: str,
    part: Sft,
    seed: int,
    steps: int,
    every: int,
    context: WorkerContext,
    log: MetricsLog,
) -> Progress:
    """Fit the model on one rank."""
    model, catalogue = open_from(workspace, ".training", start, quantization=part.model.quantization)
    if part.lora is not None:
        add_adapter(model, part.lora, seed=seed)
    chosen = part.optimiser
    engine = engine_of(model, chosen)
    rows = validation_rows(workspace, part.validation_rows, seed)
    plan = Plan(
        steps,
        every,
        part.patience,
        chosen.learning_rate,
        chosen.warmup_fraction,
        chosen.final_fraction,
        most_skipped=chosen.most_skipped,
    )
    return fit(
        engine,
        context,
        plan,
        take_step=lambda engine, unit, rate: stream_step(engine, unit, learning_rate=rate),
        validate=lambda _: validate(engine, catalogue, rows, token_budget=part.tokens_per_micro_batch),
        log=log,
        centre=MarginCentre(),
    )
