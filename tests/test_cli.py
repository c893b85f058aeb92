import json
import os
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from ray.exceptions import RayTaskError

import recray.cli
import recray.stages.cluster
import recray.stages.flow
from pipelines.recipes import RECIPES, find
from recray import __version__
from recray.config import Pipeline
from recray.errors import ConfigError, DataError, StopRequestedError
from recray.schema import AUDIT
from recray.stages.flow import MAIN_JOB, STAGES
from recray.workspace import Workspace

ROOT = Path(__file__).parents[1]


class Terminal:
    """Runs command lines in this process, with a stand-in for Ray and for the stages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = monkeypatch, capsys
        self.ran: list[dict[str, Any]] = []
        self.started_ray = False
        self.address: str | None = None
        self.error: BaseException | None = None
        monkeypatch.setattr(recray.stages.cluster, "connect", self._connect)
        monkeypatch.setattr(recray.stages.flow, "run_stages", self._run_stages)
        monkeypatch.setattr(recray.stages.cluster, "log_lines", lambda: None)

    def _connect(self, resources: object, address: str | None = None) -> nullcontext[None]:
        del resources
        self.started_ray, self.address = True, address
        return nullcontext()

    def _run_stages(
        self, pipeline: Pipeline, workspace: object, names: object, *, force: object, resume: bool, ray: Any
    ) -> None:
        with ray():
            if self.error is not None:
                raise self.error
        found = {"pipeline": pipeline, "workspace": workspace, "names": names, "force": force, "resume": resume}
        self.ran.append(found)

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["recray", *arguments])
        code: Any = 0
        try:
            recray.cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = self._capture.readouterr()
        return code, out, err


@pytest.fixture
def recray_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    return Terminal(monkeypatch, capsys)


def test_there_is_a_command_for_every_stage(recray_line: Terminal) -> None:
    assert list(recray.cli.STAGE_HELP) == list(STAGES)
    code, out, _ = recray_line("--help")
    assert code == 0
    assert all(f" {name} " in out for name in (*STAGES, "run", "recipes", "config"))


def test_help_is_there_in_half_a_second() -> None:
    def seconds() -> float:
        before = os.times()
        subprocess.run([sys.executable, "-m", "recray", "--help"], check=True, capture_output=True, cwd=ROOT)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # Of processor time, so that a busy machine does not fail it.
    assert min(seconds() for _ in range(3)) < 0.5


def test_the_version_is_the_packages(recray_line: Terminal) -> None:
    assert recray_line("--version") == (0, f"recray {__version__}\n", "")


def test_recipes_are_listed_with_what_they_are(recray_line: Terminal) -> None:
    code, out, _ = recray_line("recipes")
    assert code == 0
    assert len(out.splitlines()) == len(RECIPES)
    assert all(name in out and recipe.summary in out for name, recipe in RECIPES.items())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_named_as_it_is_found(name: str) -> None:
    pipeline = find(name).make()
    assert pipeline.name == name
    assert Pipeline.model_validate(pipeline.model_dump(mode="json")) == pipeline
    assert pipeline.ingest.data is None


def test_config_prints_what_run_would_run(recray_line: Terminal, tmp_path: Path) -> None:
    options = ("--recipe", "demo", "--set", "align.steps=5", "--seed", "3", "--workers", "2")
    code, out, _ = recray_line("config", *options)
    printed = json.loads(out)
    assert code == 0
    assert (printed["align"]["steps"], printed["seed"], printed["resources"]["num_workers"]) == (5, 3, 2)
    recray_line("run", "--workspace", str(tmp_path / "w"), *options)
    assert recray_line.ran[0]["pipeline"].model_dump(mode="json") == printed


def test_run_runs_the_main_job(recray_line: Terminal, tmp_path: Path) -> None:
    assert recray_line("run", "--recipe", "demo", "--workspace", str(tmp_path))[0] == 0
    assert recray_line.started_ray
    assert recray_line.ran[0]["names"] == MAIN_JOB
    assert recray_line.ran[0]["force"] == frozenset()


ALONE = tuple(name for name in STAGES if name != "audit")


def test_a_stage_command_runs_that_stage(recray_line: Terminal, tmp_path: Path) -> None:
    for name in ALONE:
        line = (name, "--recipe", "demo", "--workspace", str(tmp_path), "--force", name, "--force", "sft")
        assert recray_line(*line)[0] == 0
    assert [run["names"] for run in recray_line.ran] == [(name,) for name in ALONE]
    assert recray_line.ran[0]["force"] == {"ingest", "sft"}


def _write_audit(folder: Path, verdict: str) -> None:
    numbers = {"metric": "hr@1", "value": 0.8, "low": 0.7, "high": 0.9, "chance": 0.05}
    texts = {"verdict": verdict, "reason": "More than behaviour.", "advice": "Take another split."}
    rule = {"rule": "smallest id above", "kind": "suspect", **numbers, **texts}
    with Workspace(str(folder)).stage("audit", version=1, part={}, seed=0, inputs={}) as out:
        out.write_table("rules", pa.Table.from_pylist([rule], schema=AUDIT))
        out.write_json("facts.json", [{"fact": "cold targets", "number": None, "of": None, "note": "no clock"}])


@pytest.mark.parametrize(("verdict", "code"), [("leak", 1), ("look", 0), ("clear", 0)])
def test_audit_runs_what_it_needs_and_ends_with_1_at_a_leak(
    recray_line: Terminal, tmp_path: Path, verdict: str, code: int
) -> None:
    _write_audit(tmp_path, verdict)
    line = ("audit", "--recipe", "demo", "--workspace", str(tmp_path), "--fresh-candidates")
    ended, out, err = recray_line(*line)
    assert ended == code
    assert out.startswith(f"{verdict:<5}  smallest id above")
    assert "HR@1 0.800 [0.700, 0.900]  (chance 0.050)" in out
    assert "cold targets: not known" in out
    assert ("Take another split." in err) == (verdict == "leak")
    assert recray_line.ran[0]["names"] == ("ingest", "sequences", "audit")
    assert recray_line.ran[0]["pipeline"].sequences.fresh_candidates


def test_run_tells_of_a_leak_and_goes_on(recray_line: Terminal, tmp_path: Path) -> None:
    _write_audit(tmp_path, "leak")
    code, _, err = recray_line("run", "--recipe", "demo", "--workspace", str(tmp_path))
    assert code == 0
    assert "Take another split." in err


def test_data_is_found_from_any_folder(recray_line: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.csv").touch()
    monkeypatch.chdir(tmp_path)
    for given in ("logs", "logs/*.csv"):
        line = ("run", "--recipe", "movielens", "--data", given, "--workspace", given.replace("/", "-"))
        assert recray_line(*line)[0] == 0
        assert recray_line.ran[-1]["pipeline"].ingest.data == str(tmp_path / given)
    recray_line("run", "--recipe", "movielens", "--data", "s3://bucket/logs", "--workspace", "w")
    assert recray_line.ran[-1]["pipeline"].ingest.data == "s3://bucket/logs"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "movielen"], ["'movielen'", "nearest is 'movielens'"]),
        (["--recipe", "demo", "--set", "align.step=3"], ["align.step", "align.steps"]),
        (["--recipe", "demo", "--set", "align.steps=many"], ["align.steps", "integer", "many"]),
        (["--recipe", "demo", "--config", "nowhere.json"], ["nowhere.json", "no such file"]),
        (["--recipe", "demo", "--data", "nowhere"], ["--data", "nowhere", "no such file"]),
        (["--recipe", "demo", "--data", "*.nothing"], ["--data", "no file matches"]),
        (["--recipe", "demo", "--set", "ingest.items=nowhere"], ["ingest.items", "nowhere"]),
        (["--recipe", "demo", "--set", "sft.model.path=./nowhere"], ["sft.model.path", "nowhere"]),
        (["--recipe", "demo", "--set", "sft.prompt.template=title"], ["sft.prompt.template", "'titles'", "'title'"]),
        (["--recipe", "demo", "--force", "aling"], ["--force", "'aling'", "'align'"]),
        (["--recipe", "demo", "--workers", "0"], ["resources.num_workers", "0"]),
        (["--recipe", "movielens"], ["'movielens'", "--data"]),
    ],
)
def test_a_wrong_configuration_is_told_before_anything_starts(
    recray_line: Terminal, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    workspace = tmp_path / "w"
    code, _, err = recray_line("run", "--workspace", str(workspace), *arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert all(word in err for word in words)
    assert not recray_line.started_ray
    assert not workspace.exists()


def test_a_workspace_of_another_run_is_refused_before_anything_starts(recray_line: Terminal, tmp_path: Path) -> None:
    recray_line("run", "--recipe", "demo", "--workspace", str(tmp_path))
    recray_line.started_ray = False
    code, _, err = recray_line("run", "--recipe", "sdpo", "--data", str(ROOT), "--workspace", str(tmp_path))
    assert code == 1
    assert "belongs to recipe 'demo'" in err
    assert not recray_line.started_ray


@pytest.mark.parametrize(("error", "code"), [(DataError("row 3"), 1), (ConfigError("row 3"), 2)])
def test_an_error_of_recrays_own_has_no_traceback(
    recray_line: Terminal, tmp_path: Path, error: Exception, code: int
) -> None:
    recray_line.error = error
    line = recray_line("run", "--recipe", "demo", "--workspace", str(tmp_path))
    assert line == (code, "", "error: row 3\n")


def test_a_fault_of_the_program_keeps_its_traceback(recray_line: Terminal, tmp_path: Path) -> None:
    recray_line.error = KeyError("bug")
    with pytest.raises(KeyError):
        recray_line("run", "--recipe", "demo", "--workspace", str(tmp_path))


@pytest.mark.parametrize("name", ["run", *STAGES])
def test_a_script_does_what_its_command_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(recray.cli, "main", called.append)
    runpy.run_module(f"pipelines.{name}", run_name="__main__")
    assert called == [name]


def test_an_address_is_handed_to_ray(recray_line: Terminal, tmp_path: Path) -> None:
    for command in ("sft", "run", "audit", "compare"):
        recray_line(command, "--recipe", "demo", "--workspace", str(tmp_path / command), "--address", "10.0.0.1:6379")
        assert recray_line.address == "10.0.0.1:6379", command


@pytest.mark.parametrize("name", ["tune", "compare"])
def test_what_may_only_go_on_is_told_so(name: str, recray_line: Terminal, tmp_path: Path) -> None:
    for option in ([], ["--resume"]):
        recray_line(name, "--recipe", "demo", "--workspace", str(tmp_path), *option)
    assert [ran["resume"] for ran in recray_line.ran] == [False, True]


def test_an_interrupted_run_says_how_to_go_on(recray_line: Terminal, tmp_path: Path) -> None:
    recray_line.error = KeyboardInterrupt()
    code, _, err = recray_line("sft", "--recipe", "demo", "--workspace", str(tmp_path / "w"))
    assert code == 130
    assert err == "interrupted; the same command goes on where this one was\n"


def test_what_a_worker_refused_is_told_in_its_own_words(recray_line: Terminal, tmp_path: Path) -> None:
    said = StopRequestedError("stopped as asked: the checkpoint of step 9 is written")
    trace = f"Traceback (most recent call last):\n  File ...\nrecray.errors.StopRequestedError: {said}\n"
    recray_line.error = RayTaskError("run", trace, said).as_instanceof_cause()
    assert isinstance(recray_line.error, StopRequestedError)
    code, _, err = recray_line("sft", "--recipe", "demo", "--workspace", str(tmp_path / "w"))
    assert (code, err) == (143, f"error: {said}\n")


def test_where_no_terminal_is_every_line_of_a_worker_is_printed() -> None:
    """Ray leaves out lines that look alike, and says so in colour, unless it was told otherwise before its import."""
    asked = (
        "import recray.cli; recray.cli._print_every_line(); from ray._private import ray_constants as read; "
        "print(read.RAY_DEDUP_LOGS)"
    )
    env = {name: value for name, value in os.environ.items() if name != "RAY_DEDUP_LOGS"}
    found = [
        subprocess.run(
            [sys.executable, "-c", asked], env=each, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for each in (env, {**env, "RAY_DEDUP_LOGS": "1"})
    ]
    assert found == [["False"], ["True"]]
