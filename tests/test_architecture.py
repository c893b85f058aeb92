"""The import rules and the budgets of ARCHITECTURE.md, read from the source of every file."""

import ast
import fnmatch
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ("data", "users", "negatives", "objectives", "lm", "ranking", "distributed")
ENGINES = ("train", "report")
# Pure integer plans of who reads what: an engine's, but all may use them.
PLANS = ("recray.train.order",)
# Names and settings without the maths: a kernel's, but the base may read them.
NAMES = ("recray.objectives.registry",)
# What stages may share: which stages there are, the Ray they stand on, how fits and models are set up on it.
SHARED_BY_STAGES = (
    "flow",
    "cluster",
    "cost",
    "group",
    "embedding",
    "feed",
    "fitting",
    "board",
    "collectives",
    "notice",
    "recommender",
    "alignment",
    "rowwise",
    "scoring",
    "item_scores",
    "pools",
    "refreshing",
    "alone",
    "searching",
    "comparing",
)
# The only importers of heavy libraries: patterns of module names.
IMPORTERS = {
    "ray": ("recray.stages.*", "pipelines.*"),
    "peft": ("recray.lm.*",),
    "transformers": ("recray.lm.*", "recray.data.catalogue", "recray.data.tokenizer", "recray.data.prompts"),
    "tokenizers": ("recray.lm.*", "recray.data.catalogue", "recray.data.tokenizer", "recray.data.prompts"),
    "deepspeed": ("recray.train.engine*",),
    "typer": ("recray.cli",),
}
# Ranks, configuration, paths, clocks and the process's own random state have no place in the maths.
IMPURE = (
    "recray.config",
    "recray.workspace",
    "recray.distributed",
    "pathlib",
    "os",
    "time",
    "datetime",
    "random",
)
PURE = ("recray.objectives", "recray.negatives")
SEEDED_NUMPY = {"Generator", "default_rng", "SeedSequence", "Philox", "PCG64", "BitGenerator"}
TREE = {
    *("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"),
    *("Makefile", "pyproject.toml", "constraints.txt"),
    *("pipelines", "recray", "cluster", "docker", "tests", "benchmarks", "docs"),
}
LONGEST, NINETIETH = 80, 40
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def module_name(path: Path) -> str:
    """`recray/data/__init__.py` is recray.data."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[str]:
    """Every module that `source` imports, wherever it does; `a.b` for `from a import b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(module: str) -> int:
    """0 base, 1 kernels, 2 engines, 3 stages, 4 command line and pipelines."""
    if any(below(module, plan) for plan in PLANS):
        return 1
    if any(below(module, names) for names in NAMES):
        return 0
    package, _, rest = module.partition(".")
    part = rest.partition(".")[0] or "__init__"
    if package == "pipelines" or part in {"cli", "__main__"}:
        return 4
    if part == "stages":
        return 3
    if part in ENGINES:
        return 2
    # `from recray import errors` and `from recray import __version__` are the base, too.
    return 1 if part in KERNELS else 0


def wrong_imports(module: str, source: str) -> list[str]:
    """What `module` imports against the rules."""
    found = []
    for name in imports(source):
        top = name.partition(".")[0]
        if top in IMPORTERS and not any(fnmatch.fnmatch(module, pattern) for pattern in IMPORTERS[top]):
            found.append(f"{module} imports {top}, which only {IMPORTERS[top]} may")
        if any(below(module, pure) for pure in PURE) and any(
            below(name, impure) for impure in (*IMPURE, "torch.distributed")
        ):
            found.append(f"{module} has to be pure, but imports {name}")
        if top in {"recray", "pipelines"}:
            found += wrong_layer(module, name)
    return found


def wrong_layer(module: str, name: str) -> list[str]:
    mine, other = layer(module), layer(name)
    if other > mine:
        return [f"{module} imports {name}, which stands above it"]
    own_package = ".".join(module.split(".")[:2])
    if mine == 2 == other and not below(name, own_package):
        return [f"{module} imports {name}: train and report do not know each other"]
    if mine == 3 == other and not any(below(name, f"recray.stages.{shared}") for shared in SHARED_BY_STAGES):
        return [f"{module} imports {name}: stages meet through tables"]
    return []


def unseeded(source: str) -> list[str]:
    """Uses of the process-wide generators of numpy and torch, and generators without a seed."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"np.random", "numpy.random"}:
            found += [] if node.attr in SEEDED_NUMPY else [ast.unparse(node)]
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("default_rng") and not node.args:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {
            "torch.rand",
            "torch.randn",
            "torch.randint",
        }:
            found += [] if any(word.arg == "generator" for word in node.keywords) else [ast.unparse(node)]
    return found


FILES = sorted([*(ROOT / "recray").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")])
FUNCTIONS = [
    (path, node)
    for path in FILES
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_keep_to_their_layer(path: Path) -> None:
    assert wrong_imports(module_name(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("recray.train.loop", "import ray"),
        ("recray.train.loop", "def f():\n    from ray.train import report"),
        ("recray.data.logs", "import ray.data as rd"),
        ("recray.stages.align", "from recray.stages.sft import run"),
        ("recray.stages.align", "from recray.stages import sft"),
        ("recray.data.logs", "from recray.train.loop import fit"),
        ("recray.data.logs", "from recray import train"),
        ("recray.report.html", "from recray.train import log"),
        ("recray.config", "from recray.data import logs"),
        ("recray.stages.align", "from pipelines.recipes import find"),
        ("recray.objectives.napo", "from recray.config import Objective"),
        ("recray.objectives.napo", "import torch.distributed as dist"),
        ("recray.negatives.uniform", "from time import monotonic"),
        ("recray.users.fit", "from transformers import AutoModel"),
        ("recray.stages.align", "import deepspeed"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str) -> None:
    assert wrong_imports(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "recray.stages.align",
            "import ray\nfrom recray.stages.flow import Job\nfrom recray.train.loop import fit",
        ),
        ("recray.train.engine", "import deepspeed\nfrom recray import errors"),
        ("recray.lm.lora", "import peft"),
        ("recray.cli", "from pipelines.recipes import find"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert wrong_imports(module, source) == []


@pytest.mark.parametrize("path", [path for path in FILES if module_name(path).startswith(PURE)], ids=module_name)
def test_the_maths_draws_from_seeded_generators_only(path: Path) -> None:
    assert unseeded(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", ["np.random.rand(3)", "np.random.default_rng()", "torch.randn(3)"])
def test_an_unseeded_generator_is_found(source: str) -> None:
    assert unseeded(source)


def test_every_function_says_what_it_returns() -> None:
    assert [f"{path.name}:{node.lineno} {node.name}" for path, node in FUNCTIONS if node.returns is None] == []


def test_functions_keep_to_their_budget() -> None:
    lengths = sorted(
        ((node.end_lineno or 0) - node.lineno + 1, f"{path.name}:{node.lineno} {node.name}") for path, node in FUNCTIONS
    )
    assert [each for each in lengths if each[0] > LONGEST] == []
    assert lengths[int(0.9 * (len(lengths) - 1))][0] <= NINETIETH


def test_files_are_named_for_what_they_hold() -> None:
    assert [str(path) for path in FILES if path.stem in BANNED_NAMES] == []


def test_scripts_are_thin() -> None:
    scripts = (ROOT / "pipelines").glob("*.py")
    assert [path.name for path in scripts if len(path.read_text().splitlines()) > 60] == []


def test_the_tree_is_that_of_the_architecture_page() -> None:
    ignored = ("workspace*", "build", "dist", "*.egg-info", "__pycache__", ".*")
    there = {path.name for path in ROOT.iterdir()}
    there = {name for name in there if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)}
    assert there <= TREE
    assert {"README.md", "ARCHITECTURE.md", "LICENSE", "Makefile", "constraints.txt"} <= there


def test_no_test_folder_shadows_a_library() -> None:
    assert not (ROOT / "tests" / "ray").exists()


def loaded_after(code: str) -> set[str]:
    """The top-level modules that a fresh Python has after `code`."""
    program = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import recray", {"torch", "ray", "pyarrow", "pydantic"}),
        ("import recray.config, recray.errors", {"torch", "ray", "pyarrow"}),
        ("import recray.schema, recray.workspace, recray.stages.flow", {"torch", "ray"}),
        (
            "from pipelines.recipes import RECIPES\n[each.make() for each in RECIPES.values()]",
            {"torch", "ray"},
        ),
        (
            "from recray.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass",
            {"torch", "ray", "pyarrow", "pydantic", "numpy"},
        ),
        # What processes of a fit import that only pass things on: it is a second and 200 MB in each.
        ("import recray.stages.board", {"torch", "ray", "pyarrow"}),
        ("import recray.stages.feed, recray.stages.group", {"torch", "transformers"}),
        ("import recray.stages.fitting, recray.train.feeding", {"peft", "deepspeed"}),
    ],
    ids=["recray", "config", "flow", "recipes", "help", "board", "feed", "fit"],
)
def test_light_things_import_nothing_heavy(code: str, absent: set[str]) -> None:
    assert loaded_after(code) & absent == set()
