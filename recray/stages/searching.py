"""Ray Tune around a search: trials start where there is room, report as they validate, and end early if told to.

What is known of a search is in `recray.train.search`, written down trial by trial: Tune hands trials to processes,
starts those again that crashed, and forgets. So a search whose driver died is simply run again.
"""

import importlib.util
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
import ray.tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from recray.config import Align, Resources, Tune, point_of_space
from recray.errors import ConfigError, MachineLeavingError, RecrayError, StopRequestedError
from recray.stages.alignment import alignment, fit_of, run_alignment
from recray.stages.alone import FIT_SECONDS, fit_alone, needs_alone, nodes_alive, processes_at_once
from recray.stages.cluster import DATA_CPUS
from recray.stages.feed import FEED_CPUS
from recray.train.search import POPULARITY, RANKING, Search
from recray.workspace import Workspace

logger = logging.getLogger(__name__)

DRIVER_CPUS = 0.05
WAITING_S = 60.0  # until a trial that got nowhere is looked at, and between two lines on it
ASK_EVERY_S = 2.0
ENDED, AS_PLANNED, REFUSED, TOLD = "ended", "as planned", "refused", "told"
# No files of results by Tune, and not its way with Ctrl-C, which would take half a search for a whole one.
SWITCHED = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # tables of its own, whatever it is told of verbosity
}


@dataclass(frozen=True)
class Trials:
    """What all trials of a search have in common."""

    workspace: Workspace
    base: Align  # what points are laid over
    examples: str  # folder below .training
    name: str  # of the search; trial n's checkpoints are NAME-n
    resources: Resources
    watch_seed: int  # of the sample of validation rows: the same for all
    alone: bool  # each in one process, which is kept for the next; else with a group of workers of its own
    board: Any  # says when the run shall end

    @property
    def needs(self) -> dict[str, float]:
        """What one trial holds of the cluster."""
        resources, number = self.resources, self.resources.num_workers
        if self.alone:
            return needs_alone(resources)
        gpus = {"GPU": number * resources.gpus_per_worker} if resources.gpus_per_worker > 0 else {}
        return {"CPU": number * resources.cpus_per_worker + FEED_CPUS + DRIVER_CPUS} | gpus


def trials_at_once(needs: Mapping[str, float], cluster: Mapping[str, float]) -> int:
    """Return how many trials with groups of workers fit into a cluster, with a CPU left that all data tasks share.

    At least one. More would deadlock: trials whose workers hold every CPU wait for data that no CPU is left to read.
    """
    cluster = {**cluster, "CPU": cluster.get("CPU", 0.0) - DATA_CPUS}
    return max(1, min(int(cluster.get(name, 0.0) // need) for name, need in needs.items()))


def lacking(needs: Mapping[str, float], free: Mapping[str, float], there: Mapping[str, float]) -> list[str]:
    """Return a line for each resource of which fewer are free than a trial needs; none if there is enough of all."""
    return [
        f"{need:g} {name} {'is' if need == 1 else 'are'} needed, {free.get(name, 0.0):g} of {there.get(name, 0.0):g} "
        "are free"
        for name, need in needs.items()
        if free.get(name, 0.0) < need
    ]


def room_for(trials: Trials, most: int | None) -> int:
    """Return how many trials run side by side on the cluster that there is, `most` at most."""
    if trials.alone:
        found = processes_at_once(trials.needs, nodes_alive())
    else:
        found = trials_at_once(trials.needs, ray.cluster_resources())
    return min(found, most or found)


def refuse_missing_trackers(part: Tune) -> None:
    """Raise `ConfigError` for a tracker that is not installed."""
    for tracker in part.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise ConfigError(
                f"tune.trackers asks for {tracker}, which is not installed here; run `pip install {tracker}`, or leave "
                "it out"
            )


def go_through(search: Search, trials: Trials, part: Tune) -> int:
    """Run all trials that are left; return how many ran side by side.

    Raises:
        StopRequestedError: if the run was told to end; what has ended is written down.
    """
    at_once = room_for(trials, part.at_once)
    driver = Driver(search, trials, at_once)
    needs = trials.needs if trials.alone else {"CPU": DRIVER_CPUS}
    with _switched():
        Tuner(
            ray.tune.with_resources(partial(run_trial, trials=trials), needs),
            tune_config=TuneConfig(
                num_samples=search.left,
                search_alg=_Next(driver),
                scheduler=_Early(driver),
                reuse_actors=True,
            ),
            run_config=RunConfig(
                name=trials.name,
                storage_path=trials.workspace.path(".training"),
                storage_filesystem=trials.workspace.fs,
                failure_config=FailureConfig(max_failures=part.retries),
                callbacks=[_Watch(driver), *_trackers(part, trials.name)],
                verbose=0,
            ),
        ).fit()
    if search.left:
        raise StopRequestedError(
            f"the search was stopped: {len(search.trials)} trials had begun, {search.left} are left; run again to go on"
        )
    return at_once


def run_trial(config: Mapping[str, Any], *, trials: Trials) -> None:
    """Run one trial; its validations, and at last what came of it, go to Tune."""
    began, number = time.monotonic(), int(config["number"])
    run, name = f"{trials.name}-{number}", f"tune, trial {number}"
    try:
        part = point_of_space(trials.base, config["settings"])
        setting = alignment(trials.workspace, part, int(config["seed"]), trials.examples, watch_seed=trials.watch_seed)
        if trials.alone:
            fitted, seconds = fit_alone(
                fit_of(setting, run=run, name=name),
                trials.workspace,
                trials.resources,
                report=lambda metrics: ray.tune.report({**metrics, "seconds": time.monotonic() - began}),
                board=trials.board,
            )
        else:
            fitted = run_alignment(setting, trials.resources, run=run, name=name, callbacks=[TuneReportCallback()])
            seconds = fitted.progress.seconds
    except StopRequestedError:
        ray.tune.report({ENDED: TOLD})
        return
    except MachineLeavingError:
        raise  # to be started again elsewhere
    except RecrayError as error:  # would be refused again
        ray.tune.report({ENDED: REFUSED, "error": str(error)})
        return
    curve = [
        {"step": float(line["step"]), RANKING: line[RANKING], POPULARITY: line[POPULARITY]}
        for line in fitted.metrics
        if line["kind"] == "validation"
    ]
    costs = {
        "seconds": time.monotonic() - began,
        FIT_SECONDS: seconds,
        "step_seconds": fitted.progress.seconds,
        "steps": float(fitted.progress.step),
    }
    ray.tune.report({ENDED: AS_PLANNED, "curve": curve, "took": costs})


class Driver:
    """What Tune's hooks share: the search, and what is known of trials beside it."""

    def __init__(self, search: Search, trials: Trials, at_once: int) -> None:
        self.search, self.trials, self.at_once = search, trials, at_once
        self.running: set[int] = set()
        self.told = False

    def next(self) -> dict[str, Any] | None:
        """Return what the next trial is given, None if there is no room for one, or none left."""
        if self.told or len(self.running) >= self.at_once:
            return None
        trial = self.search.next()
        if trial is None:
            return None
        self.running.add(trial.number)
        _tell(trial.number, "starts", f"point {trial.point}, seed {trial.seed}: {dict(trial.settings)}")
        return {"number": trial.number, "settings": dict(trial.settings), "seed": trial.seed}

    def heard(self, number: int, result: Mapping[str, Any]) -> bool:
        """Take note of what a trial reports; return whether it goes on."""
        ended = result.get(ENDED)
        if ended is None:
            look = {name: float(result[name]) for name in ("step", RANKING, POPULARITY)}
            costs = {name: float(result[name]) for name in ("seconds", FIT_SECONDS) if name in result}
            good = self.search.looked(number, look, costs or {"seconds": float(result.get("time_total_s", 0.0))})
            if not good and number in self.running:
                _tell(number, "ends early", f"{RANKING} {look[RANKING]:.4f} at step {look['step']:.0f}")
            # One that is alone hears of it by itself, and writes a checkpoint first.
            return good and (self.trials.alone or not self.told)
        if ended == AS_PLANNED and number in self.running:
            costs = {name.partition("/")[2]: value for name, value in result.items() if name.startswith("took/")}
            self.search.done(number, result["curve"], costs)
            best = self.search.trials[number].best or {}
            _tell(number, "done", f"best {RANKING} {best[RANKING]:.4f} at step {best['step']:.0f}")
        elif ended == REFUSED:
            self.search.failed(number, str(result["error"]))
            _tell(number, "failed", str(result["error"]))
        self.told = self.told or ended == TOLD
        return True


class _Next(Searcher):  # type: ignore[misc]  # ray.tune is untyped
    """Asks the search which trial is next."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # noqa: ARG002 - trials have numbers of their own
        found = self._driver.next()
        finished: str = Searcher.FINISHED
        return finished if found is None and not self._driver.running else found

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the search hears of it elsewhere."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is known is written down trial by trial."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a search is run again, never restored."""


class _Early(FIFOScheduler):  # type: ignore[misc]
    """Tells the search what trials report, and ends those that it does not want to go on."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self._driver = driver

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:  # noqa: ARG002
        good = self._driver.heard(trial.config["number"], result)
        decision: str = FIFOScheduler.CONTINUE if good else FIFOScheduler.STOP
        return decision


class _Watch(Callback):  # type: ignore[misc]
    """Notes trials that end or crash, and says what one lacks that does not get on."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._since: dict[str, float] = {}  # of trials that have not reported yet; when they were last looked at
        self._asked = time.monotonic()

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
        now = time.monotonic()
        if now - self._asked < ASK_EVERY_S:
            return
        self._asked = now
        if self._driver.trials.board is not None and not self._driver.told:
            self._driver.told = bool(ray.get(self._driver.trials.board.told.remote()))
        for trial in trials:
            if trial.status not in ("PENDING", "RUNNING") or trial.last_result:
                self._since.pop(trial.trial_id, None)
            elif now - self._since.setdefault(trial.trial_id, now) > WAITING_S:
                self._since[trial.trial_id] = now
                self.say_what_is_lacking(trial.config["number"], self._waits_for(trial))

    def _waits_for(self, trial: Any) -> dict[str, float]:
        """Return what a trial that got nowhere may be waiting for."""
        alone = self._driver.trials.alone
        if trial.status == "PENDING":
            return self._driver.trials.needs if alone else {"CPU": DRIVER_CPUS}
        if alone:
            return {}  # it has what it needs, and is slow
        for group in ray.util.placement_group_table().values():  # of its workers
            if group["state"] == "PENDING":
                return dict(sum((Counter(bundle) for bundle in group["bundles"].values()), Counter()))
        return {"CPU": FEED_CPUS}

    def say_what_is_lacking(self, number: int, needs: Mapping[str, float]) -> None:
        """Warn of the resources that keep a trial waiting, if there are any."""
        found = lacking(needs, ray.available_resources(), ray.cluster_resources())
        if found:
            logger.warning(
                "tune: trial %d has waited for %.0f s: %s; lower resources.*, or wait for others to finish or the "
                "cluster to grow",
                number,
                WAITING_S,
                "; ".join(found),
            )

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        _tell(trial.config["number"], "crashed, starts again", _first_line(trial))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        self._driver.running.discard(trial.config["number"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        number, why = trial.config["number"], _first_line(trial)
        self._driver.search.failed(number, why)
        self._driver.running.discard(number)
        _tell(number, "failed", why)


def _tell(number: int, what: str, more: str) -> None:
    logger.info("tune: trial %d %s: %s", number, what, more)


def _first_line(trial: Any) -> str:
    """Return what a trial died of: the last line of its traceback says it."""
    error = trial.get_error()
    lines = [line for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return lines[-1].strip()


def _trackers(part: Tune, name: str) -> list[Any]:
    """Return Tune's callbacks for what results are sent to besides; where to, their own environment variables say."""
    found: list[Any] = []
    if "mlflow" in part.trackers:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        found.append(MLflowLoggerCallback(experiment_name=name))
    if "wandb" in part.trackers:
        from ray.air.integrations.wandb import WandbLoggerCallback

        found.append(WandbLoggerCallback(project="recray", group=name))
    return found


@contextmanager
def _switched() -> Iterator[None]:
    """Hold Tune's switches, which it reads from the environment, and its tongue: what failed is told here."""
    tune = logging.getLogger("ray.tune")
    level = tune.level
    tune.setLevel(logging.CRITICAL)
    before = {name: os.environ.get(name) for name in SWITCHED}
    os.environ.update(SWITCHED)
    try:
        yield
    finally:
        tune.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
