"""Takes the Dockerfile's steps in a folder, without a Docker engine: `python docker/try_build.py FOLDER [NAME=VALUE]`.

What is copied, installed and run is what the file says, with /home/recray moved to FOLDER and `python` this one; users
and owners are left out. At the end the image's command is run. A build with a value of ARG: give NAME=VALUE.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
HOME = "/home/recray"
LEFT_OUT = ("useradd", "chown")  # at the beginning of a RUN


def main() -> None:
    """Take all steps; the first that fails ends it with its status."""
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True)
    values = dict(argument.split("=", 1) for argument in sys.argv[2:])
    environment = {**os.environ, "HOME": str(folder)}
    environment.pop("PYTHONPATH", None)
    place = folder
    for word, rest in steps((ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")):
        text = rest.replace(HOME, str(folder))
        print(f"{word} {text}", flush=True)
        if word == "ARG":
            name, _, default = text.partition("=")
            environment[name] = values.get(name, default)
        elif word == "ENV":
            for pair in shlex.split(text):
                name, _, value = pair.partition("=")
                environment[name] = re.sub(r"\$(\w+)", lambda found: environment.get(found[1], ""), value)
        elif word == "WORKDIR":
            place = Path(text)
            place.mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            *sources, target = [part for part in shlex.split(text) if not part.startswith("--")]
            copy(sources, place / target, into=len(sources) > 1 or target.endswith("/"))
        elif word == "RUN" and not text.startswith(LEFT_OUT):
            run(["bash", "-euc", text.replace("python -m venv", f"{sys.executable} -m venv")], place, environment)
        elif word == "CMD":
            run(re.findall(r'"([^"]*)"', text), place, environment)


def steps(dockerfile: str) -> list[tuple[str, str]]:
    """Return (instruction, what follows it), lines that go on joined, comments left out."""
    lines = [line for line in dockerfile.splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def copy(sources: list[str], target: Path, *, into: bool) -> None:
    """Copy files and folders of the project."""
    for source in sources:
        found = ROOT / source
        if not found.exists():
            sys.exit(f"COPY {source}: it is not there")
        if found.is_dir():
            shutil.copytree(found, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            file = target / found.name if into else target
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, file)


def run(command: list[str], place: Path, environment: dict[str, str]) -> None:
    """Run a step, or end with its status."""
    # Looked up where the environment says, not where this process was started.
    program = shutil.which(command[0], path=environment["PATH"]) or command[0]
    done = subprocess.run([program, *command[1:]], cwd=place, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
