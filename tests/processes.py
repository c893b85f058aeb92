"""Groups of processes for tests: each runs a script as from a command line, forked from one that has torch imported."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

# Imports take five seconds a process, and tests start dozens.
_fresh = multiprocessing.get_context("forkserver")
_fresh.set_forkserver_preload(["pytest", "recray.lm.load", "recray.train.engine", "recray.train.step"])


def run_together(script: Path, commands: Sequence[Sequence[object]], log: Path, *, timeout_s: float = 240.0) -> None:
    """Run a script once for each list of arguments, side by side, and wait for all.

    Args:
        script: Run as `__main__`.
        commands: Its arguments, a list a process.
        log: Folder for what the processes print.
        timeout_s: For each.

    Raises:
        AssertionError: if a process is not done in time, or ends with another status than 0; with what it printed.
    """
    log.mkdir(parents=True, exist_ok=True)
    started = []
    for number, arguments in enumerate(commands):
        printed = log / f"{script.stem}-{number}.log"
        process = _fresh.Process(target=_as_main, args=(script, [str(each) for each in arguments], printed))
        process.start()
        started.append((process, printed))
    for process, printed in started:
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0, f"{script.name}: {process.exitcode}\n{printed.read_text()[-3000:]}"


def _as_main(script: Path, arguments: list[str], printed: Path) -> None:
    with printed.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    runpy.run_path(str(script), run_name="__main__")
