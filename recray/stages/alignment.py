"""Preference optimisation on Ray, for one setting: what `align` does once and `tune` many times."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from recray.config import Align, Resources, Sft
from recray.data.examples import (
    ExampleShards,
    join_examples,
    list_arrays,
    matrix,
    met_in_training,
    write_shards,
)
from recray.errors import ConfigError
from recray.lm.lora import add_adapter
from recray.lm.scorer import ItemScorer
from recray.stages.fitting import Feed, Fit, Fitted, RayContext, run_fit
from recray.stages.recommender import catalogue_from, engine_of, open_from, sft_feed, validation_rows
from recray.train.audit import known_false_negatives
from recray.train.engine import Engine
from recray.train.feeding import AlignFeed, Share
from recray.train.log import MetricsLog
from recray.train.loop import Plan, Progress, fit
from recray.train.order import Order
from recray.train.reference import ReferencePass, scores_of_copy, scores_without_adapter
from recray.train.step import AlignStep, MarginCentre, StepResult, stream_step
from recray.train.units import Unit
from recray.train.validation import validate
from recray.workspace import Workspace

AUDITED_STEPS = 20


@dataclass(frozen=True)
class Alignment:
    """One setting of preference optimisation, ready to run from a workspace."""

    workspace: Workspace
    examples: str  # folder below .training that `write_examples` filled
    part: Align
    num_negatives: int
    seed: int
    reference: str  # recray.config.Reference.source
    watch_seed: int  # of the sample of validation rows


def write_examples(workspace: Workspace, name: str) -> int:
    """Join all that is known of each example into shards that trainers' feeds read; return their number.

    Raises:
        WorkspaceError: if the reference scores are another model's.
    """
    train = workspace.table("sequences", "train")
    met = met_in_training(workspace.table("sequences", "histories"), train)
    table = join_examples(
        train,
        workspace.table("negatives", "train"),
        workspace.table("reference", "train") if _reference_source(workspace) == "table" else None,
        workspace.table("users", "train"),
        met,
    )
    with TemporaryDirectory(prefix="recray-examples-") as folder:
        write_shards(Path(folder), table)
        workspace.put_folder(Path(folder), ".training", name)
    return int(table.num_rows)


def alignment(
    workspace: Workspace, part: Align, seed: int, examples: str, *, watch_seed: int | None = None
) -> Alignment:
    """Return a checked setting; `watch_seed` is of the sample of validation rows, as `seed` where it is None.

    Raises:
        ConfigError: if it asks for more negatives than were drawn, or for fewer than the prompts show.
    """
    drawn = int(workspace.require("negatives").part["num"])
    wanted = part.num_negatives or drawn
    if wanted > drawn:
        raise ConfigError(f"align.num_negatives is {wanted}, but `negatives` drew {drawn}; raise negatives.num")
    source, template = _reference_source(workspace), str(workspace.require("sft").part["prompt"]["template"])
    if wanted < drawn and source == "table" and "candidates" in template:
        raise ConfigError(
            f"align.num_negatives is {wanted}, but the prompt template shows all {drawn} negatives that were drawn and "
            f"reference scores are under those prompts; set negatives.num={wanted}"
        )
    watched = seed if watch_seed is None else watch_seed
    return Alignment(workspace, examples, part, wanted, seed, source, watched)


def run_alignment(
    setting: Alignment, resources: Resources, *, run: str, name: str, callbacks: list[Any] | None = None
) -> Fitted:
    """Fit one setting; a run of the same name goes on where it was."""
    fitting = Fit(
        name=name,
        run=run,
        steps=setting.part.steps,
        make_feed=partial(make_feed, setting),
        work=partial(_work, setting),
    )
    return run_fit(fitting, setting.workspace, resources, callbacks=callbacks)


def make_feed(setting: Alignment, world_size: int) -> Feed:
    """Return the feed of a setting, for as many ranks."""
    workspace, part = setting.workspace, setting.part
    catalogue = catalogue_from(workspace, "sft", "model")
    if part.objective.name == "sft":
        sft = Sft.model_validate(workspace.require("sft").part)
        # Another seed than sft itself had: the control goes on with new shuffles, not with the first ones again.
        return sft_feed(workspace, catalogue, sft, setting.seed + 1, world_size)
    shards = ExampleShards(workspace.folder(".training", setting.examples))
    vectors = matrix(workspace.table("users", "items").sort_by("item")["vector"])
    return AlignFeed(
        shards,
        catalogue,
        torch.tensor(vectors),
        Order(shards.num_rows, part.global_batch, setting.seed, part.window_rows),
        Share(world_size, part.tokens_per_micro_batch, part.micro_batches),
        part.objective,
        num_negatives=setting.num_negatives,
    )


def meet_the_truth(setting: Alignment) -> dict[str, float]:
    """Return how often sharing and margins meet a known false negative, in steps from all over the run."""
    workspace, objective = setting.workspace, setting.part.objective
    feed = make_feed(setting, 1)
    if not isinstance(feed, AlignFeed):
        return {}
    truth = workspace.table("ingest", "truth")
    liked = dict(zip(truth["user_id"].to_pylist(), list_arrays(truth["liked"]), strict=True))
    users = workspace.table("sequences", "train", columns=["row", "user_id"]).sort_by("row")["user_id"].to_pylist()
    nothing = np.zeros(0, dtype=np.int32)
    steps = np.unique(np.linspace(0, setting.part.steps - 1, AUDITED_STEPS).astype(int)).tolist()
    return known_false_negatives(
        feed,
        steps,
        [liked.get(user, nothing) for user in users],
        base=objective.margin_base,
        slope=objective.margin_slope,
    )


def _reference_source(workspace: Workspace) -> str:
    return str(workspace.require("reference").part["source"])


def _reference_pass(setting: Alignment) -> ReferencePass | None:
    """Return what scores the reference in every step, or None where the units bring its scores."""
    if setting.reference == "adapter_off":
        return scores_without_adapter
    if setting.reference == "frozen_copy":
        return scores_of_copy(ItemScorer(open_from(setting.workspace, "sft", "model")[0]))
    return None


def _work(setting: Alignment, context: RayContext, log: MetricsLog) -> Progress:
    """Fit the model on one rank."""
    workspace, part = setting.workspace, setting.part
    model, catalogue = open_from(workspace, "sft", "model")
    if part.lora is not None:
        add_adapter(model, part.lora, seed=setting.seed)
    chosen = part.optimiser
    engine = engine_of(model, chosen)
    rows = validation_rows(workspace, part.validation_rows, setting.watch_seed)
    centre = MarginCentre()
    step = None
    if part.objective.name != "sft":
        step = AlignStep(part.objective, centre, _reference_pass(setting))

    def take_step(engine: Engine, unit: Unit, rate: float) -> StepResult:
        if step is None:
            return stream_step(engine, unit, learning_rate=rate)
        return step(engine, unit, learning_rate=rate)

    plan = Plan(
        part.steps,
        part.validate_every,
        None,
        chosen.learning_rate,
        chosen.warmup_fraction,
        chosen.final_fraction,
        clock_limit_s=part.seconds,
        most_skipped=chosen.most_skipped,
    )
    return fit(
        engine,
        context,
        plan,
        take_step=take_step,
        validate=lambda: validate(engine, catalogue, rows, token_budget=part.tokens_per_micro_batch),
        log=log,
        centre=centre,
    )
