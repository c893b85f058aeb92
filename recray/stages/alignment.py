"""Preference optimisation on Ray, for one setting: what `align` does once and `tune` many times."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from safetensors.torch import save_file

from recray.config import Align, Resources, Sft, unscored_reuse
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
from recray.ranking.baselines import item_popularity
from recray.stages.embedding import vectors_of_folds
from recray.stages.feed import Feed
from recray.stages.fitting import Fit, Fitted, checkpoints, run_fit
from recray.stages.recommender import (
    catalogue_from,
    engine_of,
    open_from,
    sft_feed,
    validation_rows,
    write_trained,
)
from recray.stages.refreshing import Drawn, draw_again
from recray.stages.scoring import training_of
from recray.train.audit import audit_guard, known_false_negatives
from recray.train.context import WorkerContext
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
WHOLE = "whole.json"  # written last into a folder that is read only when it is whole

_start_metrics: dict[Hashable, dict[str, float]] = {}  # see `start_once`


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
    until: int | None = None  # stop at this step, to go on with other examples; None: at the last
    policy: str | None = None  # folder below .training that then gets the model as it is by then


def write_examples(workspace: Workspace, name: str, drawn: Drawn | None = None) -> int:
    """Join all that is known of each example into shards that trainers' feeds read; return their number.

    Args:
        workspace: With all tables.
        name: Folder below `.training` for the shards.
        drawn: Negatives and their reference scores; None: those of the stages.

    Raises:
        WorkspaceError: if the reference scores are another model's.
    """
    if drawn is None:
        scored = _reference_source(workspace) == "table"
        drawn = Drawn(workspace.table("negatives", "train"), workspace.table("reference", "train") if scored else None)
    train = workspace.table("sequences", "train")
    met = met_in_training(workspace.table("sequences", "histories"), train)
    crossfit = workspace.table("users", "crossfit_train") if workspace.exists("users", "crossfit_train") else None
    table = join_examples(train, drawn.negatives, drawn.reference, workspace.table("users", "train"), met, crossfit)
    with TemporaryDirectory(prefix="recray-examples-") as folder:
        write_shards(Path(folder), table)
        workspace.put_folder(Path(folder), ".training", name)
    workspace.write_json({"rows": table.num_rows}, ".training", name, WHOLE)
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
    if problem := unscored_reuse(part.objective, source):
        raise ConfigError(f"align.objective: {problem}")
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
    every = setting.part.refresh_every
    if every is None or setting.part.objective.name == "sft" or every >= setting.part.steps:
        return _run_part(setting, resources, run, name, callbacks)
    return _run_in_parts(setting, resources, run, name, callbacks, every)


def _run_part(setting: Alignment, resources: Resources, run: str, name: str, callbacks: list[Any] | None) -> Fitted:
    """Fit up to where the setting says."""
    return run_fit(fit_of(setting, run=run, name=name), setting.workspace, resources, callbacks=callbacks)


def fit_of(setting: Alignment, *, run: str, name: str) -> Fit:
    """Return the fit of a setting, up to where it says, without running it."""
    return Fit(
        name=name,
        run=run,
        steps=setting.until or setting.part.steps,
        make_feed=partial(make_feed, setting),
        work=partial(_work, setting),
    )


def _run_in_parts(
    setting: Alignment, resources: Resources, run: str, name: str, callbacks: list[Any] | None, every: int
) -> Fitted:
    """Fit `every` steps at a time, each part on negatives from what the model ranks highest when it begins.

    What a part needs is kept until `remove_parts`: a run that was stopped anywhere goes on with the part it was in.
    """
    workspace, steps = setting.workspace, setting.part.steps
    saved = checkpoints(workspace, run, resources).newest(tell=False)
    part = 0 if saved is None else min(saved.step, steps - 1) // every
    if part and not _whole(workspace, _examples(run, part)) and not _whole(workspace, _policy(run, part)):
        part -= 1  # stopped between its last checkpoint and handing its model over: it has that left to do
    while True:
        examples, until = setting.examples, min(steps, (part + 1) * every)
        if part:
            examples = _examples(run, part)
            if not _whole(workspace, examples):
                model = (".training", _policy(run, part))
                again = draw_again(workspace, resources, model=model, version=part, seed=setting.seed)
                write_examples(workspace, examples, again)
        handed_over = _policy(run, part + 1) if until < steps else None
        here = replace(setting, examples=examples, until=until, policy=handed_over)
        fitted = _run_part(here, resources, run, name, callbacks)
        if until == steps or fitted.progress.step < until:  # or the clock has stopped it
            return fitted
        part += 1


def _examples(run: str, part: int) -> str:
    return f"{run}-part-{part}-examples"


def _policy(run: str, part: int) -> str:
    return f"{run}-part-{part}-policy"


def _whole(workspace: Workspace, name: str) -> bool:
    return workspace.exists(".training", name, WHOLE)


def remove_parts(workspace: Workspace, run: str) -> None:
    """Remove what a run in parts kept for going on: for whoever has written its result."""
    workspace.remove_all(f"{run}-part-", ".training")


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
        judges=_judges(workspace),
    )


def _judges(workspace: Workspace) -> list[torch.Tensor]:
    """Return the item vectors of the model that judges each fold of users; none where one model judges all."""
    if not workspace.exists("users", "crossfit_items"):
        return []
    return [torch.from_numpy(vectors) for vectors in vectors_of_folds(workspace.table("users", "crossfit_items"))]


def meet_the_truth(setting: Alignment) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the guard keeps borrowers from, in steps from all over the run, and the items it most often does.

    On logs whose truth is known also how often that is right, and how often sharing and margins meet a known false
    negative. Of the negatives that the first step begins with, where they are drawn again later.
    """
    liked = _liked_unmet(setting.workspace) if setting.workspace.exists("ingest", "truth") else None
    # What is lent is the same for any number of ranks, and one rank alone may not hold what a large batch shares.
    feed, objective = make_feed(setting, setting.part.global_batch if liked is None else 1), setting.part.objective
    if not isinstance(feed, AlignFeed):
        return {}, []
    steps = np.unique(np.linspace(0, setting.part.steps - 1, AUDITED_STEPS).astype(int)).tolist()
    facts: dict[str, Any] = {} if liked is None else {"known_truth": known_false_negatives(feed, steps, liked)}
    if not (objective.shares_scores or objective.reuses_items):
        return facts, []
    labels = catalogue_from(setting.workspace, "sft", "model").labels
    found = audit_guard(feed, steps, labels, liked)
    return facts | {"guard": found.facts}, found.items


def _liked_unmet(workspace: Workspace) -> list[Int[ndarray, " _"]]:
    """Return for each training row the items that its user would like but never met."""
    truth = workspace.table("ingest", "truth")
    liked = dict(zip(truth["user_id"].to_pylist(), list_arrays(truth["liked"]), strict=True))
    users = workspace.table("sequences", "train", columns=["row", "user_id"]).sort_by("row")["user_id"].to_pylist()
    nothing = np.zeros(0, dtype=np.int32)
    return [liked.get(user, nothing) for user in users]


def _reference_source(workspace: Workspace) -> str:
    return str(workspace.require("reference").part["source"])


def _reference_pass(setting: Alignment) -> ReferencePass | None:
    """Return what scores the reference in every step, or None where the units bring its scores."""
    if setting.reference == "adapter_off":
        return scores_without_adapter
    if setting.reference == "frozen_copy":
        return scores_of_copy(ItemScorer(open_from(setting.workspace, "sft", "model")[0]))
    return None


def start_once(start: Hashable, look: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Return what `look` finds, or found for the same start before in this process.

    A search and a comparison fit many times in a process, all from one model; an adapter changes nothing before its
    first step. Groups of workers are new processes for every fit, so that all ranks of one look, or none.
    """
    if start not in _start_metrics:
        _start_metrics[start] = look()
    return _start_metrics[start]


def _work(setting: Alignment, context: WorkerContext, log: MetricsLog) -> Progress:
    """Fit the model on one rank."""
    workspace, part = setting.workspace, setting.part
    model, catalogue = open_from(workspace, "sft", "model")
    if part.lora is not None:
        add_adapter(model, part.lora, seed=setting.seed)
    chosen = part.optimiser
    engine = engine_of(model, chosen)
    rows = validation_rows(workspace, part.validation_rows, setting.watch_seed)
    training = training_of(workspace)
    popularity = item_popularity(training.items, training.num_items)
    came_from = [workspace.require(stage).fingerprint for stage in ("sequences", "sft")]
    start = (workspace.root, *came_from, part.validation_rows, setting.watch_seed, part.tokens_per_micro_batch)
    centre = MarginCentre()
    step = None
    if part.objective.name != "sft":
        step = AlignStep(part.objective, centre, _reference_pass(setting))

    def take_step(engine: Engine, unit: Unit, rate: float) -> StepResult:
        if step is None:
            return stream_step(engine, unit, learning_rate=rate)
        return step(engine, unit, learning_rate=rate)

    def look() -> dict[str, float]:
        return validate(engine, catalogue, rows, token_budget=part.tokens_per_micro_batch, popularity=popularity)

    plan = Plan(
        part.steps,
        part.validate_every,
        None,
        chosen.learning_rate,
        chosen.warmup_fraction,
        chosen.final_fraction,
        clock_limit_s=part.seconds,
        most_skipped=chosen.most_skipped,
        until=setting.until,
    )
    progress = fit(
        engine,
        context,
        plan,
        take_step=take_step,
        validate=lambda number: start_once(start, look) if number == 0 else look(),
        log=log,
        centre=centre,
    )
    if setting.policy is not None and progress.step == plan.end:
        _hand_over(setting, engine, context.rank, progress.step)
    return progress


def _hand_over(setting: Alignment, engine: Engine, rank: int, step: int) -> None:
    """Write the model as it is now, not at its best, for negatives to be drawn from; a collective."""
    assert setting.policy is not None
    weights = engine.whole_weights()
    if rank:
        return
    with TemporaryDirectory(prefix="recray-policy-") as name:
        folder, file = Path(name) / "model", Path(name) / "weights.safetensors"
        save_file(weights, file)
        start = setting.workspace.folder("sft", "model")
        write_trained(file, start, folder, Path(name) / "adapter", lora=setting.part.lora)
        setting.workspace.put_folder(folder, ".training", setting.policy)
    setting.workspace.write_json({"step": step}, ".training", setting.policy, WHOLE)
