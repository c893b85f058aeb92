"""Whether the files of this folder are what Ray, KubeRay and Kubernetes expect; offline. `make cluster-check`.

Clusters of `ray up` are checked by Ray's own schema, pods and other objects by Kubernetes' own, KubeRay's objects by
kuberay/schema.json, which lists the fields of its API; entry points by recray's own command line. Besides: what Ray is
started with (a memory-backed object store, token authentication), and that image, manifests and pins name one Ray.
"""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

HERE = Path(__file__).parent
KUBERNETES = "1.33"
TOKEN = "RAY_AUTH_MODE=token"


def main() -> None:
    """Check every file, print what is wrong, and exit with 1 if anything is."""
    wrong, checked = [], 0
    for file in sorted(HERE.glob("ray-*.yaml")):
        checked += 1
        wrong += [f"{file.name}: {fault}" for fault in cluster_faults(_read(file)[0])]
    for file in sorted((HERE / "kuberay").glob("*.yaml")):
        for number, one in enumerate(_read(file)):
            checked += 1
            wrong += [f"kuberay/{file.name}, object {number}: {fault}" for fault in object_faults(one)]
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{checked} objects, {len(wrong)} faults")
    sys.exit(1 if wrong else 0)


def _read(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def cluster_faults(config: dict[str, Any]) -> list[str]:
    """Return what is wrong with a configuration of `ray up`."""
    try:
        validate_config({**prepare_config(config), "cluster_synced_files": []})
    except Exception as error:  # noqa: BLE001 - Ray raises many kinds
        return [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    lines = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    everywhere = f"--env {TOKEN}" in config.get("docker", {}).get("run_options", [])
    without = [line for line in lines if "ray start" in line and TOKEN not in line and not everywhere]
    faults = [f"no token authentication: {line}" for line in without]
    if not any("auth_token" in target for target in config.get("file_mounts", {})):
        faults.append("file_mounts has no auth_token: every node needs the same")
    return faults


def object_faults(one: dict[str, Any]) -> list[str]:
    """Return what is wrong with a Kubernetes object."""
    if not str(one.get("apiVersion", "")).startswith("ray.io/"):
        return list(_kubernetes_faults(one))
    schema = json.loads((HERE / "kuberay" / "schema.json").read_text(encoding="utf-8"))
    found = jsonschema.Draft202012Validator(schema).iter_errors(one)
    faults = [f"{'/'.join(map(str, error.absolute_path))}: {error.message}" for error in found]
    if faults:
        return faults
    job = one["spec"].get("jobTemplate", one["spec"])
    cluster = job.get("rayClusterSpec", job)
    if "entrypoint" in job:
        faults += entrypoint_faults(job["entrypoint"])
    return faults + list(_ray_faults(cluster))


def _ray_faults(cluster: dict[str, Any]) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches the cluster could run code on it"
    if cluster.get("rayVersion") != pinned_ray():
        yield f"rayVersion is {cluster.get('rayVersion')}, constraints.txt pins {pinned_ray()}"
    groups = [("head", cluster["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in cluster.get("workerGroupSpecs", [])]
    for name, group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": group["template"].get("spec", {})}
        for fault in _kubernetes_faults(pod):
            yield f"{name}: {fault}"
        if not pod["spec"].get("securityContext", {}).get("runAsNonRoot"):
            yield f"{name}: runs as root"
        for container in pod["spec"].get("containers", []):
            if container.get("resources", {}).get("limits", {}).get("memory") is None:
                yield f"{name}: no limit of memory, which Ray needs to know how much there is"


def _kubernetes_faults(one: dict[str, Any]) -> Iterator[str]:
    try:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        yield f"{'/'.join(map(str, getattr(error, 'path', [])))}: {getattr(error, 'message', error)}"
    except (kubernetes_validate.SchemaNotFoundError, kubernetes_validate.InvalidSchemaError) as error:
        yield str(error)


def entrypoint_faults(entrypoint: str) -> list[str]:
    """Return what is wrong with the commands of an entry point that run recray: its options and settings."""
    from recray.cli import resolve
    from recray.errors import ConfigError

    commands = re.findall(r"python -m pipelines\.\w+[^&;']*", entrypoint)
    faults = [] if commands else [f"runs no pipeline: {entrypoint}"]
    for command in commands:
        words = shlex.split(command)[3:]
        pairs = list(zip(words[::2], words[1::2], strict=True))
        given = dict(pairs)
        try:
            resolve(
                given["--recipe"],
                data=given.get("--data"),
                settings=[value for name, value in pairs if name == "--set"],
                workers=int(given["--workers"]) if "--workers" in given else None,
            )
        except (ConfigError, KeyError) as error:
            faults.append(f"{command}: {error}")
    return faults


def pinned_ray() -> str:
    """Return the version of Ray in constraints.txt."""
    text = (HERE.parent / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(r"^ray==(\S+)$", text, re.MULTILINE)
    assert found is not None, "constraints.txt does not pin ray"
    return found[1]


if __name__ == "__main__":
    main()
