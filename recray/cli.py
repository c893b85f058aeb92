"""The command line: `recray run` for the whole job, one command a stage, and what recipes there are.

Everything that can be wrong with a configuration is found before Ray starts. Only `typer` is imported at the
top: `recray --help` needs neither torch nor ray.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recray import __version__
from recray.errors import ConfigError, RecrayError, StopRequestedError

if TYPE_CHECKING:
    from recray.config import Pipeline
    from recray.workspace import Workspace

STATUS = {ConfigError: 2, StopRequestedError: 128 + 15}  # exit statuses; that of other errors is 1
STAGE_HELP = {
    "ingest": "Read logs and catalogue into one schema; set aside what can't be used.",
    "sequences": "Put histories in time order, split them, draw evaluation candidates.",
    "audit": "Score rules that need no model; exit with 1 if the evaluation leaks. Runs what it needs first.",
    "users": "Fit SASRec and compute a vector for every user and item.",
    "sft": "Teach the language model the catalogue and the histories.",
    "negatives": "Draw the items that each positive is compared with.",
    "reference": "Score positives and negatives under the frozen SFT model.",
    "align": "Optimise preferences from the SFT model.",
    "evaluate": "Rank the test split with every model and baseline.",
    "report": "Write the report of the run as one HTML file.",
    "tune": "Search over settings of align, judged on validation; not part of `run`.",
    "compare": "Methods of alignment side by side, from one SFT model; not part of `run`.",
}

app = typer.Typer(
    help="Interaction logs in, an aligned LLM recommender out, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeOption = Annotated[str, typer.Option("--recipe", metavar="NAME", help="See `recray recipes`.")]
DataOption = Annotated[str | None, typer.Option("--data", metavar="PATH", help="File, folder, glob or URI of logs.")]
WorkspaceOption = Annotated[str, typer.Option("--workspace", metavar="DIR", help="Folder or URI of the run.")]
ConfigOption = Annotated[str | None, typer.Option("--config", metavar="FILE", help="JSON laid over the recipe.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="One setting; repeatable.")]
ForceOption = Annotated[
    list[str] | None,
    typer.Option("--force", metavar="STAGE", help="Run it though it is up to date; repeatable."),
]
ResumeOption = Annotated[
    bool,
    typer.Option("--resume", help="Refuse to begin: there has to be one with these settings that was stopped."),
]
SeedOption = Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of the whole run.")]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="HOST:PORT", help="A running Ray cluster, as RAY_ADDRESS; `local` for none."),
]
WorkersOption = Annotated[int | None, typer.Option("--workers", metavar="N", help="Training workers.")]


def main(command: str | None = None) -> None:
    """Run the command line, `command` before the arguments; recray's own errors print without a traceback.

    Exits with 2 if the configuration is wrong and with 1 after any other error.
    """
    arguments = sys.argv[1:] if command is None else [command, *sys.argv[1:]]
    try:
        app(arguments, prog_name="recray" if command is None else f"python -m pipelines.{command}")
    except Exception as error:
        own = _own_error(error)
        if own is None:
            raise
        typer.echo(f"error: {own}", err=True)
        sys.exit(STATUS.get(type(own), 1))


def _own_error(error: Exception) -> RecrayError | None:
    """Return what recray itself has to say, looking into errors that Ray wrapped around it."""
    if "ray" in sys.modules:  # whose wrapper is an instance of what it wraps, with a traceback for a text
        from recray.stages.cluster import own_error

        return own_error(error)
    return error if isinstance(error, RecrayError) else None


def _print_every_line() -> None:
    """Have Ray print each line of every worker as it is, where no terminal shows them.

    It would leave out lines that look alike, which those of two trials do, and say so in green. It reads this variable
    as it is imported.
    """
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"recray {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version  # its callback has dealt with it


@app.command("recipes", help="List the recipes.")
def list_recipes() -> None:
    """Print every recipe with its first line."""
    from pipelines.recipes import RECIPES

    width = max(map(len, RECIPES))
    for name, recipe in RECIPES.items():
        typer.echo(f"{name:<{width}}  {recipe.summary}{'' if recipe.needs_data else ' Runs without --data.'}")


@app.command("config", help="Print the resolved configuration as JSON.")
def print_config(
    recipe: RecipeOption,
    data: DataOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
) -> None:
    """Print what `run` with the same options would run; the output is a valid --config file."""
    pipeline = resolve(recipe, data=data, file=config, settings=settings, seed=seed, workers=workers)
    typer.echo(pipeline.model_dump_json(indent=1))


@app.command("settings", help="Print an index of every setting, as Markdown: docs/settings.md.")
def print_settings() -> None:
    """Print every setting with its default, type, unit, meaning and where it acts."""
    from recray.settings_index import markdown
    from recray.stages.flow import STAGES

    reads = {name: stage.inputs for name, stage in STAGES.items()}
    typer.echo(markdown(reads, {name: stage.lays_over for name, stage in STAGES.items()}), nl=False)


def resolve(
    recipe: str,
    *,
    data: str | None = None,
    file: str | None = None,
    settings: list[str] | None = None,
    seed: int | None = None,
    workers: int | None = None,
) -> "Pipeline":
    """Return the settings of a run: the recipe, then the file, then single settings, then the other options.

    Raises:
        ConfigError: if the recipe or a setting is unknown, or a value is wrong.
    """
    import json

    from pipelines.recipes import find
    from recray.config import override

    options = {"ingest.data": data, "seed": seed, "resources.num_workers": workers}
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    pipeline = override(find(recipe).make(), file=file, settings=[*(settings or []), *given])
    places = {"data": _absolute(pipeline.ingest.data), "items": _absolute(pipeline.ingest.items)}
    return pipeline.model_copy(update={"ingest": pipeline.ingest.model_copy(update=places)})


def _absolute(path: str | None) -> str | None:
    """Return a path that means the same in whatever folder Ray's workers run."""
    if path is None or "://" in path:
        return path
    return str(Path(path).expanduser().resolve())


def _check_places(pipeline: "Pipeline", *, needs_data: bool) -> None:
    """Refuse paths that are not there: all that can be told without reading the data."""
    import glob

    if needs_data and pipeline.ingest.data is None:
        raise ConfigError(f"recipe {pipeline.name!r} needs --data PATH: a file, folder, glob or URI of logs")
    places = {"--data": pipeline.ingest.data, "ingest.items": pipeline.ingest.items}
    for option, place in places.items():
        if place is not None and "://" not in place and not Path(place).exists() and not glob.glob(place):
            raise ConfigError(f"{option} {place}: no such file or folder, and no file matches it as a pattern")
    model = pipeline.sft.model.path
    if model is not None and model.startswith(("/", ".", "~")) and not Path(model).expanduser().is_dir():
        raise ConfigError(f"sft.model.path {model}: no such folder")


def _check_names(names: list[str]) -> frozenset[str]:
    import difflib

    for name in names:
        if name not in STAGE_HELP:
            near = difflib.get_close_matches(name, STAGE_HELP, n=1, cutoff=0.0)[0]
            raise ConfigError(f"--force {name!r}: no such stage; the nearest is {near!r}")
    return frozenset(names)


def _add_command(name: str, stages: tuple[str, ...] | None, summary: str) -> Callable[..., None]:
    def command(
        recipe: RecipeOption,
        workspace: WorkspaceOption,
        data: DataOption = None,
        config: ConfigOption = None,
        settings: SetOption = None,
        force: ForceOption = None,
        seed: SeedOption = None,
        workers: WorkersOption = None,
        address: AddressOption = None,
    ) -> None:
        from pipelines.recipes import find

        pipeline = resolve(recipe, data=data, file=config, settings=settings, seed=seed, workers=workers)
        _check_places(pipeline, needs_data=find(recipe).needs_data)
        _run(pipeline, workspace, stages, _check_names(force or []), address)

    return app.command(name, help=summary)(command)


_add_command("run", None, "The whole job: every stage that is not up to date, then the report.")
for _name, _summary in STAGE_HELP.items():
    if _name not in ("audit", "compare", "tune"):
        _add_command(_name, (_name,), _summary)


@app.command("audit", help=STAGE_HELP["audit"])
def audit(
    recipe: RecipeOption,
    workspace: WorkspaceOption,
    data: DataOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    force: ForceOption = None,
    seed: SeedOption = None,
    address: AddressOption = None,
    fresh_candidates: Annotated[
        bool, typer.Option("--fresh-candidates", help="Same as --set sequences.fresh_candidates=true.")
    ] = False,
) -> None:
    """Run what the audit needs and the audit, print one line a rule, and exit with 1 if there is a leak."""
    from pipelines.recipes import find

    fresh = ["sequences.fresh_candidates=true"] if fresh_candidates else []
    pipeline = resolve(recipe, data=data, file=config, settings=[*(settings or []), *fresh], seed=seed)
    _check_places(pipeline, needs_data=find(recipe).needs_data)
    _run(pipeline, workspace, ("ingest", "sequences", "audit"), _check_names(force or []), address)
    if _show_audit(workspace):
        raise typer.Exit(1)


@app.command("compare", help=STAGE_HELP["compare"])
def compare(
    recipe: RecipeOption,
    workspace: WorkspaceOption,
    data: DataOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    force: ForceOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    resume: ResumeOption = False,
    objectives: Annotated[
        str | None,
        typer.Option("--objectives", metavar="A,B,...", help="Names, each with settings: 'dpo,napo margin=none'."),
    ] = None,
    seeds: Annotated[int | None, typer.Option("--seeds", metavar="N", help="Runs of each objective.")] = None,
) -> None:
    """Compare methods in a workspace whose reference scores are there."""
    import json

    from pipelines.recipes import find

    asked = list(settings or [])
    if objectives is not None:
        asked.append(f"compare.objectives={json.dumps([each.strip() for each in objectives.split(',')])}")
    if seeds is not None:
        asked.append(f"compare.seeds={seeds}")
    pipeline = resolve(recipe, data=data, file=config, settings=asked, seed=seed, workers=workers)
    _check_places(pipeline, needs_data=find(recipe).needs_data)
    _run(pipeline, workspace, ("compare",), _check_names(force or []), address, resume=resume)


@app.command("tune", help=STAGE_HELP["tune"])
def tune(
    recipe: RecipeOption,
    workspace: WorkspaceOption,
    data: DataOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    force: ForceOption = None,
    seed: SeedOption = None,
    workers: WorkersOption = None,
    address: AddressOption = None,
    resume: ResumeOption = False,
) -> None:
    """Search in a workspace whose reference scores are there."""
    from pipelines.recipes import find

    pipeline = resolve(recipe, data=data, file=config, settings=settings, seed=seed, workers=workers)
    _check_places(pipeline, needs_data=find(recipe).needs_data)
    _run(pipeline, workspace, ("tune",), _check_names(force or []), address, resume=resume)


def _run(
    pipeline: "Pipeline",
    uri: str,
    stages: tuple[str, ...] | None,
    force: frozenset[str],
    address: str | None,
    *,
    resume: bool = False,
) -> None:
    from functools import partial

    _print_every_line()
    from recray.stages.flow import MAIN_JOB, run_stages
    from recray.workspace import Workspace

    workspace = Workspace(uri)
    workspace.claim(pipeline.name, pipeline.ingest.data)

    from recray.stages.cluster import connect, log_lines

    log_lines()
    names = MAIN_JOB if stages is None else stages
    try:
        ray = partial(connect, pipeline.resources, address)
        run_stages(pipeline, workspace, names, force=force, resume=resume, ray=ray)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on where this one was", err=True)
        raise typer.Exit(128 + signal.SIGINT) from None
    if "report" in names:
        _show_report(workspace)
        _show_leaks(workspace)


def _show_report(workspace: "Workspace") -> None:
    if workspace.exists("report", "report.html"):
        typer.echo(f"Report: {workspace.path('report', 'report.html')}")


def _show_audit(uri: str) -> bool:
    """Print a line a rule and a line a fact; return whether a rule is a leak."""
    from recray.ranking.verdicts import line
    from recray.workspace import Workspace

    workspace = Workspace(uri)
    for rule in workspace.table("audit", "rules").to_pylist():
        typer.echo(line(rule))
    for fact in workspace.json("audit", "facts.json"):
        counted = "not known" if fact["number"] is None else f"{fact['number']:,} of {fact['of']:,}"
        typer.echo(f"fact   {fact['fact']}: {counted}; {fact['note']}")
    return _show_leaks(workspace)


def _show_leaks(workspace: "Workspace") -> bool:
    """Print every leak with what to do about it, where it is not overlooked; return whether there is one."""
    from recray.ranking.verdicts import leaks

    found = leaks(workspace.table("audit", "rules").to_pylist()) if workspace.exists("audit", "manifest.json") else []
    for rule in found:
        typer.echo(f"LEAK   {rule['rule']} (HR@1 {rule['value']:.3f}): {rule['reason']} {rule['advice']}", err=True)
    return bool(found)
