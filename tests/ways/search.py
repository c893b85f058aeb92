"""A search of twelve trials whose driver is killed half-way, and gone on with: `make search`.

Margin x number of negatives on the demo's logs, whose false negatives are known. What had ended by then must not be run
again, nothing that trials share may be made again, and the report has the best point and the front. Prints how much of
the wall time was not training. About ten minutes on two cores; alone on the machine, or its times mean nothing.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clusters import ROOT, environment, expect, timed

TRIALS = 12
BEFORE = ("ingest", "sequences", "users", "sft", "negatives", "reference")
SPACE = {"margin_base": {"uniform": [0, 2]}, "num_negatives": {"choice": [1, 3, 5, 7]}}
# From an SFT model that is not done learning, so that there is something to find.
SETTINGS = (
    *("sft.passes=2", "negatives.sampler=popularity", "align.objective.reference=false"),
    *("align.optimiser.learning_rate=1e-4", "resources.threads_per_worker=1"),
    *(f"tune.trials={TRIALS}", f"tune.space={json.dumps(SPACE)}", "tune.steps=60", "tune.validate_every=20"),
)


def main() -> None:
    """Make what a search reads, search, kill, go on, and look."""
    with tempfile.TemporaryDirectory(prefix="rs", dir="/tmp", ignore_cleanup_errors=True) as folder:
        place, workspace = Path(folder), Path(folder) / "workspace"
        env = environment(place, Path(sys.executable).parent)
        with timed("what a search reads"):
            for stage in BEFORE:
                expect(command(env, workspace, stage).wait() == 0, f"{stage} failed")
        with timed("half of the search, then kill -9"):
            driver = command(env, workspace, "tune")
            while (found := len(ended(workspace))) < TRIALS // 2:
                expect(driver.poll() is None, f"the search ended with {found} trials")
                time.sleep(0.2)
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
        first = ended(workspace)
        expect(TRIALS // 2 <= len(first) < TRIALS, f"{len(first)} trials had ended")
        with timed("the rest"):
            expect(command(env, workspace, "tune", "--resume").wait() == 0, "the search did not go on")
        look(workspace / "tune", first)
    print("passed")


def command(env: dict[str, str], workspace: Path, stage: str, *options: str) -> "subprocess.Popen[bytes]":
    """Start a stage on a local Ray, as the leader of a group of processes."""
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    words = ["recray", stage, "--recipe", "demo", "--workspace", str(workspace), "--address", "local"]
    return subprocess.Popen([*words, *settings, *options], cwd=ROOT, env=env, start_new_session=True)


def ended(workspace: Path) -> dict[int, dict[str, Any]]:
    """Return what is written down of trials that have ended."""
    kept = (json.loads(file.read_text()) for file in workspace.glob(".training/tune-*-trials/[0-9]*.json"))
    return {trial["number"]: trial for trial in kept if trial["state"] != "running"}


def look(tune: Path, first: dict[int, dict[str, Any]]) -> None:
    """Hold what the search left against what had ended before the kill, and print what it cost."""
    trials = {trial["number"]: trial for trial in json.loads((tune / "trials.json").read_text())}
    manifest = json.loads((tune / "manifest.json").read_text())
    counts, facts = manifest["counts"], manifest["facts"]
    expect(sorted(trials) == list(range(TRIALS)), f"trials {sorted(trials)}")
    expect(all(trial["state"] == "done" for trial in trials.values()), "a trial is not done")
    expect(all(trials[number] == trial for number, trial in first.items()), "a trial was run again")
    expect(counts["done_before"] == len(first), f"{counts['done_before']} counted as done before, {len(first)} were")
    made = {name: count for name, count in counts.items() if name.endswith("_made")}
    expect(len(made) > 0 and not any(made.values()), f"made again: {made}")
    page = (tune / "search.html").read_text()
    expect(f"Best of {TRIALS} points" in page, "the report lacks the best point")
    expect("front of ranking against popularity" in page and facts["front"], "the report lacks the front")
    expect((tune / "best.json").exists(), "there is no best.json")
    looks = [len(trial["curve"]) for trial in trials.values()]
    print(f"{len(first)} of {TRIALS} trials had ended and were kept; validations a trial: {min(looks)} to {max(looks)}")
    for name in ("at_once", "search_seconds", "seconds_of_fits", "share_outside_fits", "best", "front"):
        print(f"{name}: {facts[name]}")


if __name__ == "__main__":
    main()
