"""The three ways to run it, from a clean clone, as a user types them: `make quickstarts`.

A local Ray, a cluster that `cluster/local_start.sh` started, and a job on it have to end with the same metrics. Then,
on that cluster: two jobs at once, a third that wants the workspace of the first, and one that is stopped and goes on.
About fifteen minutes on two cores, and an install; `quickstarts.py --here` takes this checkout and its environment.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from clusters import CONTROL, ROOT, Jobs, environment, expect, furthest_apart, metrics, step_of_align, timed

DASHBOARD = "http://127.0.0.1:8265"


def main() -> None:
    """Go all three ways, then have several jobs at once."""
    with tempfile.TemporaryDirectory(prefix="rq", dir="/tmp", ignore_cleanup_errors=True) as folder:
        place = Path(folder)
        root = ROOT if "--here" in sys.argv[1:] else cloned(place)
        env = environment(place, root / ".venv" / "bin")
        workspaces = {name: place / name for name in ("local", "attached", "job", "other", "stopped")}
        with timed("a local Ray"):
            run(root, env, "--address", "local", "--workspace", str(workspaces["local"]))
        subprocess.run([root / "cluster" / "local_start.sh"], env=env, check=True)
        try:
            with timed("a cluster that runs"):
                run(root, env, "--workspace", str(workspaces["attached"]))
            several(Jobs(DASHBOARD, env, root=root), workspaces)
        finally:
            subprocess.run([root / "cluster" / "local_stop.sh"], env=env, check=True)
        for name, workspace in workspaces.items():
            apart = furthest_apart(metrics(workspaces["local"]), metrics(workspace))
            expect((apart == 0) == (name != "other"), f"{name} differs from local by {apart}")
        left = subprocess.run(["pgrep", "-f", str(place)], capture_output=True, text=True, check=False).stdout
        expect(not left, f"processes are left: {left}")
    print("passed")


def cloned(place: Path) -> Path:
    """Return a clean clone, installed."""
    with timed("clone and install"):
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place / "clone")], check=True)
        subprocess.run(["make", "--silent", ".venv/.installed"], cwd=place / "clone", check=True)
    return place / "clone"


def run(root: Path, env: dict[str, str], *options: str) -> None:
    """Run the command line."""
    command = ["recray", "run", "--recipe", "demo", "--config", "tests/ways/small.json", *options]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    expect(done.returncode == 0, (done.stdout + done.stderr)[-5000:])


def several(jobs: Jobs, workspaces: dict[str, Path]) -> None:
    """Two jobs side by side and a third that may not; then one that is stopped and goes on."""
    with timed("two jobs at once"):
        jobs.submit("one", "--workspace", str(workspaces["job"]))
        while not (workspaces["job"] / "ingest" / "manifest.json").exists():
            time.sleep(0.5)
        jobs.submit("two", "--workspace", str(workspaces["other"]), "--seed", "1")
        jobs.submit("intruder", "--workspace", str(workspaces["job"]))
        expect(jobs.wait("intruder") == "FAILED", "a second writer was let in")
        expect("is being written by process" in jobs.log("intruder"), jobs.log("intruder")[-2000:])
        for name in ("one", "two"):
            expect(jobs.wait(name, within_s=1800) == "SUCCEEDED", jobs.log(name)[-5000:])
        found = CONTROL.search(jobs.log("one"))
        expect(found is None, f"a job's log has control characters: {found and found[0]!r}")
    with timed("a job that is stopped in `align`, and goes on"):
        jobs.submit("first", "--workspace", str(workspaces["stopped"]))
        while step_of_align(workspaces["stopped"]) < 20:
            expect("FAILED" not in jobs.ray("status", "first").stdout, jobs.log("first")[-5000:])
            time.sleep(0.5)
        jobs.ray("stop", "first")
        expect(jobs.wait("first") == "STOPPED", jobs.log("first")[-2000:])
        kept = step_of_align(workspaces["stopped"])
        jobs.submit("second", "--workspace", str(workspaces["stopped"]))
        expect(jobs.wait("second") == "SUCCEEDED", jobs.log("second")[-5000:])
        print(f"{kept} steps were kept", flush=True)


if __name__ == "__main__":
    main()
