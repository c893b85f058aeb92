"""Which stages there are, what each reads, and when one may be skipped. Imports neither torch nor ray."""

import importlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

from recray.config import Part, Pipeline, Resources
from recray.errors import ConfigError, WorkspaceError
from recray.lock import WorkspaceLock
from recray.stages.cost import Meter
from recray.workspace import Manifest, StageOutput, Workspace, fingerprint

logger = logging.getLogger(__name__)


class Stage(NamedTuple):
    """One stage: its module is `recray.stages.NAME`, its settings `pipeline.NAME`."""

    name: str
    version: int  # raise it when the same settings and inputs give another output
    inputs: tuple[str, ...]
    lays_over: tuple[str, ...] = ()  # further parts of the settings that decide its output
    rows: tuple[str, ...] = ()  # counts that say together how many rows it worked on; a fit: its steps say so


STAGES = {
    stage.name: stage
    for stage in (
        Stage("ingest", 1, (), rows=("interactions",)),
        Stage("sequences", 1, ("ingest",), rows=("histories", "train", "validation", "test")),
        Stage("audit", 1, ("ingest", "sequences")),
        Stage("users", 1, ("ingest", "sequences"), rows=("train", "validation", "test")),
        Stage("sft", 1, ("ingest", "sequences")),
        Stage("negatives", 1, ("ingest", "sequences"), rows=("train",)),
        Stage("reference", 1, ("ingest", "sequences", "sft", "negatives"), rows=("train",)),
        Stage("align", 1, ("ingest", "sequences", "users", "sft", "negatives", "reference")),
        Stage("evaluate", 4, ("ingest", "sequences", "users", "sft", "align"), rows=("rows",)),
        Stage(
            "report",
            5,
            ("ingest", "sequences", "audit", "users", "sft", "negatives", "reference", "align", "evaluate"),
        ),
        Stage("tune", 2, ("ingest", "sequences", "users", "sft", "negatives", "reference"), ("align",)),
        Stage("compare", 1, ("ingest", "sequences", "users", "sft", "negatives", "reference"), ("align", "evaluate")),
    )
}

MAIN_JOB = tuple(name for name in STAGES if name not in ("tune", "compare"))


@dataclass(frozen=True)
class Job:
    """What a stage is given: its own part of the settings, its inputs, and where to write."""

    part: Any  # the stage's own class of recray.config
    seed: int
    resources: Resources
    workspace: Workspace
    out: StageOutput
    fingerprint: str
    pipeline: Pipeline  # for the report and for the search, which lay settings over it; others read `part`
    forced: bool = False  # asked for although it may be up to date: nothing kept from before counts


def run_stages(
    pipeline: Pipeline,
    workspace: Workspace,
    names: tuple[str, ...],
    *,
    force: frozenset[str],
    resume: bool = False,
    ray: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Run the named stages in order, skipping those that are up to date.

    Args:
        pipeline: All settings.
        workspace: Where the stages meet.
        names: Stages, in the order of `STAGES`.
        force: Stages to run although they are up to date.
        resume: Whether one that has to run, a search or a comparison, may only go on with what it had done before.
        ray: Holds a connection to Ray; entered when the first stage has to run. The default is for callers that hold
            one.

    Raises:
        ConfigError: if a name is no stage.
        WorkspaceError: if the workspace is another run's or being written, an input is missing or out of date, or there
            is nothing to resume.
    """
    for name in (*names, *force):
        if name not in STAGES:
            raise ConfigError(f"no stage {name!r}; there are: {', '.join(STAGES)}")
    workspace.claim(pipeline.name, pipeline.ingest.data)
    connected = False
    with WorkspaceLock(workspace) as lock, ExitStack() as stack:
        for name in names:
            due = _due(pipeline, workspace, STAGES[name], force=name in force)
            if due is None:
                continue
            if resume:
                _refuse_to_begin(workspace, name, due.fingerprint)
            if not connected:
                stack.enter_context(ray())
                connected = True
            _run_stage(pipeline, workspace, STAGES[name], due, lock)


def _refuse_to_begin(workspace: Workspace, name: str, print_now: str) -> None:
    kept = {entry.split("-")[1] for entry in workspace.names(".training") if entry.startswith(f"{name}-")}
    if print_now not in kept:
        others = f" (those of other settings are: {', '.join(sorted(kept))})" if kept else ""
        raise WorkspaceError(
            f"no `{name}` with these settings, {print_now}, was stopped in {workspace.uri}{others}; "
            "without --resume one is begun"
        )


class _Due(NamedTuple):
    """A stage that has to run."""

    settings: dict[str, Any]
    inputs: dict[str, str]
    fingerprint: str
    reason: str
    forced: bool


def _due(pipeline: Pipeline, workspace: Workspace, stage: Stage, *, force: bool) -> _Due | None:
    """Return what makes a stage run, or None if it is up to date."""
    part: Part = getattr(pipeline, stage.name)
    settings = part.model_dump(mode="json")
    settings |= {name: getattr(pipeline, name).model_dump(mode="json") for name in stage.lays_over}
    inputs = _input_prints(pipeline, workspace, stage)
    print_now = fingerprint(stage.name, stage.version, settings, pipeline.seed, inputs)
    done = workspace.manifest(stage.name)
    if done is not None and done.fingerprint == print_now and not force:
        logger.info("%s: up to date (%s), skipped", stage.name, print_now)
        return None
    return _Due(settings, inputs, print_now, _reason(done, settings, inputs, force=force), force)


def _run_stage(pipeline: Pipeline, workspace: Workspace, stage: Stage, due: _Due, lock: WorkspaceLock) -> None:
    logger.info("%s: %s", stage.name, due.reason)
    module = importlib.import_module(f"recray.stages.{stage.name}")
    with (
        workspace.stage(
            stage.name, version=stage.version, part=due.settings, seed=pipeline.seed, inputs=due.inputs
        ) as out,
        Meter(stage.name, pipeline.name) as meter,
    ):
        module.run(
            Job(
                getattr(pipeline, stage.name),
                pipeline.seed,
                pipeline.resources,
                workspace,
                out,
                due.fingerprint,
                pipeline,
                due.forced,
            )
        )
        out.facts["cost"] = meter.cost(out, _rows(stage, out, getattr(pipeline, stage.name)))
        lock.check()
    done = workspace.require(stage.name)
    counts = ", ".join(f"{name} {count:,}" for name, count in done.counts.items())
    logger.info("%s: done in %.1f s (%s)", stage.name, done.seconds, counts)


def _rows(stage: Stage, out: StageOutput, part: Part) -> int | None:
    """Return how many rows a stage worked on; None where that is not the measure of it."""
    if "steps" in out.counts and hasattr(part, "global_batch"):
        return int(out.counts["steps"] * part.global_batch)
    return sum(out.counts.get(name, 0) for name in stage.rows) or None


def _input_prints(pipeline: Pipeline, workspace: Workspace, stage: Stage) -> dict[str, str]:
    """Return the fingerprints of a stage's inputs, refusing inputs made with other settings than these."""
    if stage.name == "ingest":
        module = importlib.import_module("recray.data.logs")
        return {"data": module.data_print(pipeline.ingest)}
    prints = {}
    for name in (*stage.inputs, *getattr(getattr(pipeline, stage.name), "more_inputs", ())):
        manifest = workspace.require(name)
        settings = getattr(pipeline, name).model_dump(mode="json")
        if manifest.part != settings or manifest.seed != pipeline.seed:
            raise WorkspaceError(
                f"`{name}` in {workspace.uri} was made with other settings than these "
                f"({_difference(manifest, settings, pipeline.seed)}); run `recray {name}` again, or `recray run`"
            )
        for source, found in manifest.inputs.items():
            if source in STAGES and workspace.require(source).fingerprint != found:
                raise WorkspaceError(
                    f"`{name}` in {workspace.uri} was made from another `{source}` than the one that is there now; "
                    f"run `recray {name}` again, or `recray run`"
                )
        prints[name] = manifest.fingerprint
    return prints


def _reason(done: Manifest | None, settings: dict[str, Any], inputs: dict[str, str], *, force: bool) -> str:
    if done is None:
        return "starts"
    if force:
        return "starts again, as forced"
    if done.part != settings:
        return f"starts again, settings changed: {_difference(done, settings, done.seed)}"
    changed = [name for name, found in inputs.items() if done.inputs.get(name) != found]
    return f"starts again, changed: {', '.join(changed) or 'stage version or seed'}"


def _difference(manifest: Manifest, settings: dict[str, Any], seed: int) -> str:
    old, new = _flat(manifest.part), _flat(settings)
    pairs = [f"{key} was {old[key]!r}, now {new[key]!r}" for key in old if key in new and old[key] != new[key]]
    pairs += [f"{key} is new, {new[key]!r}" for key in new if key not in old]
    pairs += [f"{key} is gone, it was {old[key]!r}" for key in old if key not in new]
    if manifest.seed != seed:
        pairs.append(f"seed was {manifest.seed}, now {seed}")
    return "; ".join(pairs[:3]) + ("; ..." if len(pairs) > 3 else "")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
