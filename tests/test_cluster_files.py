"""Cluster files: what is there is valid, and what would be dropped or refused by a cluster is found without one."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent


def _script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = _script("cluster/check.py")
build = _script("docker/try_build.py")


def _one(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / name).read_text())
    return found


def test_every_file_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        check.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert out == "6 objects, 0 faults\n"


def _set(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(config: Any) -> None:
        for step in path[:-1]:
            config = config[step]
        config[path[-1]] = to

    return change


CONTAINER = ("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (_set("spec", "entryPoint", to="x"), "'entryPoint' was unexpected"),
        (_set("spec", "rayClusterSpec", "authOptions", "mode", to="disabled"), "authOptions.mode is not token"),
        (_set("spec", "rayClusterSpec", "rayVersion", to="2.9.0"), "rayVersion is 2.9.0, constraints.txt pins"),
        (_set("spec", "rayClusterSpec", "workerGroupSpecs", 0, "replicas", to=-1), "-1 is less than the minimum"),
        (_set("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", to={"num-cpus": 0}), "0 is not of type"),
        (_set(*CONTAINER, "image", to=3), "is not of type"),
        (_set(*CONTAINER, "volumeMount", to=[]), "volumeMount"),
        (_set(*CONTAINER, "resources", to={}), "no limit of memory"),
        (_set(*CONTAINER[:-2], "securityContext", to={}), "runs as root"),
        (_set("spec", "entrypoint", to="python -m pipelines.run --recipe films"), "films"),
        (_set("spec", "entrypoint", to="python -m pipelines.run --recipe demo --set align.stepz=3"), "stepz"),
        (_set("spec", "entrypoint", to="echo"), "runs no pipeline"),
    ],
)
def test_a_fault_in_a_manifest_is_found(change: Callable[[Any], None], fault: str) -> None:
    one = _one("kuberay/rayjob.yaml")
    assert check.object_faults(one) == []
    change(one)
    assert any(fault in found for found in check.object_faults(one)), check.object_faults(one)


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("ray-aws.yaml", _set("available_node_type", to={}), "Additional properties are not allowed"),
        ("ray-aws.yaml", _set("head_node_type", to="boss"), "`head_node_type` must be one of"),
        ("ray-aws.yaml", _set("docker", "run_options", to=[]), "no token authentication"),
        ("ray-machines.yaml", _set("file_mounts", to={}), "no auth_token"),
        ("ray-machines.yaml", _set("cluster_name", to=7), "is not of type"),
    ],
)
def test_a_fault_in_a_cluster_is_found(name: str, change: Callable[[Any], None], fault: str) -> None:
    config = _one(name)
    assert check.cluster_faults(config) == []
    config = _one(name)
    change(config)
    assert any(fault in found for found in check.cluster_faults(config)), check.cluster_faults(config)


def test_the_steps_of_the_image_are_those_of_its_file(tmp_path: Path) -> None:
    text = '# first\nARG A=1\nRUN one \\\n    && two\nCOPY a b ./\nCMD ["recray", "--help"]\n'
    assert build.steps(text) == [
        ("ARG", "A=1"),
        ("RUN", "one && two"),
        ("COPY", "a b ./"),
        ("CMD", '["recray", "--help"]'),
    ]
    for word, rest in build.steps((ROOT / "docker" / "Dockerfile").read_text()):
        if word == "COPY":
            *sources, target = [part for part in rest.split() if not part.startswith("--")]
            build.copy(sources, tmp_path / target.lstrip("/"), into=target == "./")
    assert (tmp_path / "constraints.txt").is_file()
    assert (tmp_path / "recray" / "cli.py").is_file()
    # What the image copies, the engine is sent.
    ignored = (ROOT / ".dockerignore").read_text()
    assert all(f"!{source}\n" in ignored for source in ("constraints.txt", "recray", "docker/health.py"))
