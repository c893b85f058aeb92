"""Supervised fine-tuning: the language model learns the catalogue and the histories. Ray Train and DeepSpeed."""

import logging
import math
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from recray.config import Sft
from recray.data.catalogue import Catalogue, check_boundaries
from recray.data.prompts import find_template, training_texts
from recray.data.tokenizer import train_tokenizer
from recray.errors import ConfigError
from recray.lm.load import Model, load_model, make_model, save_model
from recray.lm.scorer import ItemScorer
from recray.lm.selfcheck import check_sharing
from recray.stages.fitting import Feed, Fit, RayContext, run_fit
from recray.stages.flow import Job
from recray.stages.recommender import (
    catalogue_from,
    dtype_of,
    engine_of,
    labels_of,
    open_from,
    sft_feed,
    sft_rows,
    validation_rows,
    write_fitted,
)
from recray.train.log import MetricsLog
from recray.train.loop import Plan, Progress, fit
from recray.train.step import MarginCentre, stream_step
from recray.train.validation import validate
from recray.workspace import Workspace

logger = logging.getLogger(__name__)


def run(job: Job) -> None:
    """Make or load the model, check that prompts and sharing are exact for it, and fit it."""
    part: Sft = job.part
    name = f"sft-{job.fingerprint}"
    start = f"{name}-start"
    catalogue = _write_start(job, start)
    rows = sft_rows(job.workspace, part, catalogue)
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
    write_fitted(job.out, fitted, job.workspace.folder(".training", start), name)
    job.out.counts["rows"] = rows
    job.workspace.remove(".training", name)
    job.workspace.remove(".training", start)


def _write_start(job: Job, name: str) -> Catalogue:
    """Write the model as it is before training, where every worker can read it; return its catalogue."""
    part: Sft = job.part
    labels = labels_of(job.workspace)
    template = find_template(part.prompt.template)
    dtype = dtype_of(part.model.dtype)
    if part.model.path is None:
        tokenizer = train_tokenizer(training_texts(template, labels), part.model.vocabulary)
        shape = part.model.model_dump(include={"hidden_size", "layers", "heads", "intermediate_size", "max_positions"})
        model = make_model(tokenizer, **shape, seed=job.seed, dtype=dtype)
    else:
        model, tokenizer = load_model(part.model.path, dtype=dtype, trust_remote_code=part.model.trust_remote_code)
    catalogue = Catalogue.build(labels, tokenizer, template, part.prompt.max_tokens)
    check_boundaries(catalogue, tokenizer)
    _refuse_too_long(catalogue, model)
    checked = validation_rows(job.workspace, 3, job.seed)
    error = check_sharing(ItemScorer(model), catalogue, checked.histories, [items[:8] for items in checked.candidates])
    logger.info("sft: shared prompts give the scores of separate ones, to %.1e nats", error)
    with TemporaryDirectory(prefix="recray-start-") as folder:
        save_model(Path(folder), model, tokenizer, catalogue)
        job.workspace.put_folder(Path(folder), ".training", name)
    job.out.facts |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
        "longest_item_tokens": int(catalogue.item_lengths.max()),
        "sharing_error_nats": error,
    }
    return catalogue


def _refuse_too_long(catalogue: Catalogue, model: Model) -> None:
    """Refuse prompts that, with the longest item behind them, leave the positions that the model knows."""
    known = getattr(model.config, "max_position_embeddings", None)
    longest = catalogue.max_prompt_tokens + int(catalogue.item_lengths.max())
    if known is not None and longest > known:
        raise ConfigError(
            f"a prompt of sft.prompt.max_tokens={catalogue.max_prompt_tokens} tokens and the longest item make "
            f"{longest}, more than the {known} positions of the model; lower sft.prompt.max_tokens, or raise "
            f"sft.model.max_positions where the model is made here"
        )


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
    context: RayContext,
    log: MetricsLog,
) -> Progress:
    """Fit the model on one rank."""
    model, catalogue = open_from(workspace, ".training", start)
    chosen = part.optimiser
    engine = engine_of(model, chosen)
    rows = validation_rows(workspace, part.validation_rows, seed)
    plan = Plan(steps, every, part.patience, chosen.learning_rate, chosen.warmup_fraction, chosen.final_fraction)
    return fit(
        engine,
        context,
        plan,
        take_step=lambda engine, unit, rate: stream_step(engine, unit, learning_rate=rate),
        validate=lambda: validate(engine, catalogue, rows, token_budget=part.tokens_per_micro_batch),
        log=log,
        centre=MarginCentre(),
    )
