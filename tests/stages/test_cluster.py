import json
import logging
import os
import socket
from pathlib import Path

import pytest
import ray

from recray.config import Resources
from recray.errors import CatalogueError, ConfigError, DataError, ModelError, RecrayError
from recray.stages import cluster
from recray.stages.collectives import INTERFACE, interface_of, use_node_address


@pytest.fixture
def lonely(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No cluster and no job: returns the folder where a cluster would leave its note."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path / "ray"


@pytest.mark.usefixtures("lonely")
def test_an_address_in_the_environment_is_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cluster.running_cluster() is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.running_cluster() == "10.0.0.1:6379"


def test_a_cluster_started_here_is_found_by_its_note(lonely: Path) -> None:
    lonely.mkdir()
    (lonely / "ray_current_cluster").write_text("127.0.0.1:6379\n")
    assert cluster.running_cluster() == "127.0.0.1:6379"


def test_an_address_that_is_given_comes_first(lonely: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lonely.mkdir()
    (lonely / "ray_current_cluster").write_text("127.0.0.1:6379\n")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    asked: list[str | None] = []
    monkeypatch.setattr(cluster, "_start", lambda where, _: asked.append(where))
    monkeypatch.setattr(cluster, "_check_size", lambda *_: None)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for address in (None, "10.0.0.2:6379", "local"):
        with cluster.connect(Resources(), address):
            pass
    assert asked == ["10.0.0.1:6379", "10.0.0.2:6379", None]


def test_gpus_that_nothing_uses_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="recray"):
        cluster._check_size(Resources(), None, {"CPU": 4.0, "GPU": 2.0})
        assert "the 2 GPUs that are there are not used" in caplog.text
        caplog.clear()
        cluster._check_size(Resources(gpus_per_worker=1), None, {"CPU": 4.0, "GPU": 2.0})
        assert caplog.text == ""


@pytest.mark.usefixtures("lonely")
def test_workers_hear_of_threads_and_accelerator() -> None:
    environment = cluster.worker_environment(Resources(threads_per_worker=3))
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in cluster.worker_environment(Resources(gpus_per_worker=1))


@pytest.mark.usefixtures("lonely")
def test_workers_never_get_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HOME", "/models")
    environment = cluster.worker_environment(Resources())
    assert environment["HF_HOME"] == "/models"
    assert "secret" not in environment.values()


def test_what_a_job_sets_for_its_workers_wins(lonely: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del lonely
    job = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "7"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert "OMP_NUM_THREADS" not in cluster.worker_environment(Resources())
    assert "TOKENIZERS_PARALLELISM" in cluster.worker_environment(Resources())


def test_too_small_a_machine_is_refused_but_a_cluster_may_grow(caplog: pytest.LogCaptureFixture) -> None:
    wanted = Resources(num_workers=4, cpus_per_worker=1, gpus_per_worker=1)
    have = {"CPU": 2.0}
    with pytest.raises(ConfigError, match=r"5 CPUs \(4 workers x 1, 1 to feed them\).*2 are there.*4 GPUs"):
        cluster._check_size(wanted, None, have)
    with caplog.at_level(logging.WARNING, logger="recray"):
        cluster._check_size(wanted, "10.0.0.1:6379", have)
    assert "5 CPUs" in caplog.text
    assert "10.0.0.1:6379" in caplog.text


def test_a_machine_just_large_enough_is_taken() -> None:
    cluster._check_size(Resources(num_workers=2, cpus_per_worker=0.5), None, {"CPU": 2.0})
    with pytest.raises(ConfigError):
        cluster._check_size(Resources(num_workers=2, cpus_per_worker=0.6), None, {"CPU": 2.0})


@pytest.mark.usefixtures("ray_cluster")
def test_a_ray_that_is_there_stays_there() -> None:
    with cluster.connect(Resources()):
        assert ray.is_initialized()
    assert ray.is_initialized()


def test_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1 .*RAY_ADDRESS"):
        cluster._knock("127.0.0.1:1")


def test_an_address_where_somebody_listens_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        cluster._knock(f"127.0.0.1:{server.getsockname()[1]}")
    for left_to_ray in ("auto", "ray://nowhere:10001"):
        cluster._knock(left_to_ray)


def test_the_interface_with_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.7") is None


def test_collectives_use_the_interface_that_ray_knows_the_node_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.delenv(INTERFACE, raising=False)
    use_node_address()
    assert os.environ[INTERFACE] == "lo"
    monkeypatch.setenv(INTERFACE, "eth7")  # what the user says goes first
    use_node_address()
    assert os.environ[INTERFACE] == "eth7"


def broken_batch(batch: dict[str, object]) -> dict[str, object]:
    del batch
    raise DataError("file a.csv, row 3: no user")


class BrokenReplica:
    """A model that can't be opened."""

    def __init__(self) -> None:
        raise CatalogueError("trained with catalogue 1, but these items are 2; train again")

    def __call__(self, batch: dict[str, object]) -> dict[str, object]:
        return batch


@ray.remote
def broken_task() -> None:
    raise ModelError("no such model")


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_a_worker_is_found_in_what_ray_makes_of_it() -> None:
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.data.range(4, override_num_blocks=1).map_batches(broken_batch).materialize()
    own = cluster.own_error(caught.value)
    assert type(own) is DataError
    assert str(own) == "file a.csv, row 3: no user"
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(broken_task.remote())
    own = cluster.own_error(caught.value)
    assert type(own) is ModelError
    assert str(own) == "no such model"


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_a_replica_that_can_not_be_made_is_found() -> None:
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.data.range(4).map_batches(BrokenReplica, compute=ray.data.ActorPoolStrategy(size=1)).materialize()
    own = cluster.own_error(caught.value)
    assert type(own) is CatalogueError
    assert str(own) == "trained with catalogue 1, but these items are 2; train again"


class Failures(Exception):
    """As Ray Train's: one failure a rank."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__()
        self.worker_failures = worker_failures


def caused(error: Exception, cause: BaseException) -> Exception:
    error.__cause__ = cause
    return error


def test_an_error_is_found_below_causes_and_failures_of_ranks() -> None:
    own = ModelError("x")
    for error in (own, caused(ValueError(), own), Failures({1: caused(OSError(), own)})):
        assert cluster.own_error(error) is own
    assert cluster.own_error(caused(ValueError("recray.errors.DataError: y"), KeyError())) is None


def test_errors_in_a_circle_end_the_search() -> None:
    one, two = ValueError(), KeyError()
    one.__cause__, two.__cause__ = two, one
    assert cluster.own_error(one) is None


def test_every_own_error_can_be_made_from_its_message() -> None:
    assert all(str(kind("x")) == "x" for kind in (RecrayError, *RecrayError.__subclasses__()))


def test_recrays_lines_are_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    package = logging.getLogger("recray")
    before = (package.handlers, package.propagate, package.level)
    try:
        cluster.log_lines()
        cluster.log_lines()
        logging.getLogger("recray.some.module").info("hello")
        assert capsys.readouterr().err.count("hello") == 1
    finally:
        package.handlers, package.propagate = before[:2]
        package.setLevel(before[2])
