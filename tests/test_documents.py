"""What the pages tell people to type can be typed: commands parse, settings, targets, files and modules are there."""

import re
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import recray.cli
from pipelines.recipes import RECIPES
from recray.config import Pipeline, setting_names
from recray.objectives import registry

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "cluster").rglob("*.md")])
NOT_NAMES = {"CHANGELOG.md", "lab.md", "settings.md"}  # of what was; and one that is checked as a whole
FOLDERS = ("recray", "pipelines", "cluster", "docker", "tests", "docs", "benchmarks")
OURS = ("recray", ".venv/bin/recray", "make", "python", ".venv/bin/python", "ray", ".venv/bin/ray")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
NOT_RUN = ("config", "recipes", "settings", "--help")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


class Command(NamedTuple):
    """One command line of a page."""

    page: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands(page: str, text: str) -> Iterator[Command]:
    """Every command of ours: in fences, and those in line that say more than their name."""
    lines = []
    for language, fence in FENCE.findall(text):
        if language in ("", "bash", "sh"):
            lines += fence.replace("\\\n", " ").splitlines()
    lines += [code for code in INLINE.findall(FENCE.sub("", text)) if " -" in code or code.startswith("make ")]
    for line in lines:
        first = line.strip().partition(" ")[0]
        if first in OURS or first.startswith("cluster/"):
            words = shlex.split(line, comments=True)
            yield Command(page, words[words.index("--") + 1 :] if "--" in words else words)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


FOUND = [each for page in PAGES for each in commands(name_of(page), page.read_text(encoding="utf-8"))]
JOB = ROOT / "cluster" / "kuberay" / "rayjob.yaml"
FOUND.append(
    Command(name_of(JOB), re.search(r"entrypoint: >-\n((?: {4}.*\n)+)", JOB.read_text()).group(1).split())  # type: ignore[union-attr]
)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What command lines ask for: settings and stages, with nothing run."""
    asked: list[Any] = []
    monkeypatch.setattr(recray.cli, "_run", lambda pipeline, _, stages, *__, **___: asked.append((pipeline, stages)))
    monkeypatch.setattr(recray.cli, "_check_places", lambda *_, **__: None)
    monkeypatch.setattr(recray.cli, "_show_audit", lambda _: False)
    return asked


def arguments_of(words: list[str]) -> list[str] | None:
    """What recray is given by a command line; None where it is not recray that is called."""
    if words[0].endswith("recray"):
        given = words[1:]
    elif words[0].endswith("python") and words[1] == "-m" and words[2].startswith("pipelines."):
        given = [words[2].removeprefix("pipelines."), *words[3:]]
    else:
        return None
    recipes = [at + 1 for at, word in enumerate(given[:-1]) if word == "--recipe"]
    return [next(iter(RECIPES)) if at in recipes and word == "NAME" else word for at, word in enumerate(given)]


@pytest.mark.parametrize("command", FOUND, ids=str)
def test_a_command_can_be_typed(command: Command, told: list[Any]) -> None:
    words = command.words
    given = arguments_of(words)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0].startswith("cluster/"):
        assert (ROOT / words[0]).stat().st_mode & stat.S_IXUSR
    elif words[0].endswith("python") and given is None:
        assert words[1] == "-m"
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
    elif given is not None:
        runs = given[0] not in NOT_RUN
        # Within a sentence the workspace may be left unsaid.
        recray.cli.app(
            [*given, *(["--workspace", "DIR"] if runs and "--workspace" not in given else [])], standalone_mode=False
        )
        assert bool(told) == runs


def test_there_is_something_to_check() -> None:
    assert sum(arguments_of(command.words) is not None for command in FOUND) > 8
    assert {"demo", "test", "check"} <= {
        word for command in FOUND if command.words[0] == "make" for word in command.words
    }


@pytest.mark.parametrize(
    "line",
    [
        "recray rn --recipe demo --workspace DIR",
        "recray run --recipe dema --workspace DIR",
        "recray run --recipe demo --workspace DIR --worker 2",
        "recray align --recipe demo --workspace DIR --set align.step=3",
        "python -m pipelines.alingn --recipe demo --workspace DIR",
        "make demoo",
    ],
)
def test_a_command_that_drifted_is_found(line: str, told: list[Any]) -> None:
    (command,) = commands("page", f"```\n{line}  # a comment\n```")
    with pytest.raises(BaseException):  # noqa: B017, PT011 - of typer, of recray, of an assertion
        test_a_command_can_be_typed(command, told)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in NOT_NAMES], ids=name_of)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if "://" not in link and not (page.parent / link).exists()]
    for code in INLINE.findall(FENCE.sub("", text)):
        missing += [code] if is_wrong(code, page.parent) else []
    assert missing == []


def is_wrong(code: str, folder: Path) -> bool:
    """Whether a word is a setting, a file or a module of ours by its looks, but not in truth."""
    word, parts = code.partition("=")[0], "|".join(Pipeline.model_fields)
    if re.fullmatch(rf"({parts})(\.[a-z_]+)+", word) and not re.search(r"\.(html|json|py|md)$", word):
        return word not in KNOWN
    if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./*-]*", word):
        return not (any(ROOT.glob(word.rstrip("/"))) or any(folder.glob(word.rstrip("/"))))
    if re.fullmatch(r"recray(\.\w+)+", word):
        return not is_python(word.split("."))
    return False


KNOWN = {*setting_names(), *(f"align.objective.{name}" for name in registry.own_settings())}


def is_python(names: list[str]) -> bool:
    """Whether a dotted name is a module, or what a module defines."""
    for length in range(len(names), 0, -1):
        place = ROOT.joinpath(*names[:length])
        source = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
        if source.is_file():
            return length == len(names) or re.search(rf"\b{names[length]}\b", source.read_text()) is not None
    return False


@pytest.mark.parametrize("code", ["align.step", "recray/nowhere.py", "recray.data.nowhere", "recray.config.Pipelines"])
def test_a_name_that_drifted_is_found(code: str) -> None:
    assert is_wrong(code, ROOT)


def test_the_tree_of_the_readme_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("## The tree") :]
    above, names = "", []
    for line in FENCE.findall(tree)[0][1].splitlines():
        below = line.startswith("  ")
        own = re.match(r"\s*((?:[\w.]+(?:/|\.py)\s?)+)", line)
        assert own is not None, line
        names += [f"{above if below else ''}{name}" for name in own.group(1).split()]
        above = above if below else own.group(1).split()[0]
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert len(names) > 15
