"""Ray clusters for the scripts of this folder, and jobs on them, as a user starts them: by Ray's own commands."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SMALL = Path(__file__).with_name("small.json")
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def environment(place: Path, binaries: Path) -> dict[str, str]:
    """Return what every command runs in: token authentication, this project's Python, Ray's files in one folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "HOME": str(place),  # with a token of its own
        "RAY_TMPDIR": str(place),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RECRAY_CLUSTER_STATE": str(place / "cluster"),
    }


class Jobs:
    """Jobs on a cluster, submitted from the project's root.

    Args:
        address: Of the dashboard.
        env: Of the commands.
        prefix: What each command is run by, to be on some host.
        root: The project.
    """

    def __init__(self, address: str, env: dict[str, str], *, prefix: tuple[str, ...] = (), root: Path = ROOT) -> None:
        self._address, self._env, self._prefix, self._root = address, env, prefix, root

    def ray(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run a command of `ray job`."""
        action, *rest = arguments
        command = [*self._prefix, "ray", "job", action, "--address", self._address, *rest]
        return subprocess.run(command, env=self._env, cwd=self._root, capture_output=True, text=True, check=False)

    def submit(self, name: str, *options: str) -> None:
        """Submit the pipeline without waiting for it."""
        run = ("python", "-m", "pipelines.run", "--recipe", "demo", "--config", f"tests/ways/{SMALL.name}", *options)
        done = self.ray("submit", "--no-wait", "--submission-id", name, "--working-dir", ".", "--", *run)
        expect(done.returncode == 0, f"{name} could not be submitted: {done.stdout}{done.stderr}")

    def wait(self, name: str, *, within_s: float = 900.0) -> str:
        """Return how a job ended: SUCCEEDED, FAILED or STOPPED."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            found = re.search(r"(SUCCEEDED|FAILED|STOPPED)", self.ray("status", name).stdout.upper())
            if found:
                return found[1]
            time.sleep(8)  # each look starts a Python that imports Ray
        raise TimeoutError(f"{name} did not end in {within_s:.0f} s:\n{self.log(name)[-3000:]}")

    def log(self, name: str) -> str:
        """Return a job's own log."""
        return self.ray("logs", "--log-color", "false", name).stdout


def expect(truth: bool, otherwise: str) -> None:
    """End the script, saying what is wrong, unless something holds."""
    if not truth:
        sys.exit(f"FAILED: {otherwise}")


def metrics(workspace: Path) -> dict[str, dict[str, Any]]:
    """Return what `evaluate` found, by model."""
    return {each["model"]: each for each in json.loads((workspace / "evaluate" / "metrics.json").read_text())}


def furthest_apart(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> float:
    """Return the largest difference of any metric of any model."""
    expect(ours.keys() == theirs.keys(), f"models {sorted(ours)} and {sorted(theirs)}")
    apart = [0.0]
    for model, own in ours.items():
        for name, found in own.items():
            if isinstance(found, dict) and "value" in found:
                apart.append(abs(found["value"] - theirs[model][name]["value"]))
    expect(len(apart) > len(ours), "no metric was found to compare")
    return max(apart)


def step_of_align(workspace: Path) -> int:
    """Return the step of the newest checkpoint of `align` that counts."""
    steps = [0]
    for file in workspace.glob(".training/align-*/checkpoints/*/manifest.json"):
        try:
            steps.append(int(json.loads(file.read_text())["step"]))
        except (OSError, ValueError):
            continue  # just being removed
    return max(steps)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say how long something took."""
    print(f"{what} ...", flush=True)
    started = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)
