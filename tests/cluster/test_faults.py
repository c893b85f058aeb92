"""Faults that are done, not simulated, to fits on a cluster of several nodes; after each, a run ends as if undisturbed.

docs/faults.md lists what happened in each, how long it took to recover and what was lost.
"""

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow.fs import LocalFileSystem

from recray.train.checkpoint import CheckpointStore, Saved
from recray.train.loop import digest
from recray.train.order import Order, rows_of_step

STEPS = 20
TRACE = [digest(rows_of_step(Order(60, 12, 5), step).tolist()) for step in range(STEPS)]
TIMES = ("seconds", "tokens_per_s", "data_wait_share")


def newest(place: Path) -> Saved:
    """The newest whole checkpoint of a place's workspace."""
    saved = CheckpointStore(LocalFileSystem(), str(place / "workspace/.training/align/checkpoints")).newest()
    assert saved is not None
    return saved


def steps_of(place: Path) -> list[dict[str, Any]]:
    """What a finished run logged of its steps, but for times."""
    lines = json.loads((place / "metrics.json").read_text())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines if line["kind"] == "train"]


def weights_of(place: Path) -> dict[str, np.ndarray]:
    """The weights after the last step, which ZeRO-2 writes whole."""
    saved = newest(place)
    assert saved.step == STEPS
    root = place / "workspace/.training/align/checkpoints"
    (name,) = (name for name in saved.files if name.endswith("mp_rank_00_model_states.pt"))
    module = torch.load(root / name, weights_only=False)["module"]
    return {name: tensor.numpy() for name, tensor in module.items()}


def assert_undisturbed(place: Path, quiet: Path) -> None:
    """Every step once, on the rows it should be, with the same loss; and the same weights to the last bit."""
    assert [line["rows"] for line in steps_of(place)] == TRACE
    assert steps_of(place) == steps_of(quiet)
    ours, theirs = weights_of(place), weights_of(quiet)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def assert_undisturbed_but_for_sums(place: Path, quiet: Path) -> None:
    """Every step once, on the rows it should be; weights equal but for the order in which ranks are summed."""
    assert [line["rows"] for line in steps_of(place)] == TRACE
    theirs = weights_of(quiet)
    for name, tensor in weights_of(place).items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-5, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def quiet(drive: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of two workers went through undisturbed."""
    place = tmp_path_factory.mktemp("quiet")
    ended = drive(place)
    assert ended.status == 0, ended.output
    return place


def test_killed_workers_drivers_and_a_damaged_checkpoint_change_nothing(
    drive: Any, quiet: Path, tmp_path: Path
) -> None:
    """A worker is killed at step 7, another told that its machine goes; the driver is killed, then told to end."""
    place = tmp_path / "struck"
    killed = drive(place, "kill:7:1", "term:9:0", "kill-driver:12:0")
    assert killed.status == -9
    assert "goes on from the checkpoint of step 5" in killed.output  # the kill cost steps 6 and 7
    # With notice nothing is lost; that of step 9 is heard in it or in the one after.
    assert "a machine goes away: the checkpoint of step" in killed.output
    assert re.search("goes on from the checkpoint of step (9|10)$", killed.output, re.MULTILINE)
    saved = newest(place)
    assert saved.step == 10

    state = next(name for name in saved.files if "optim_states" in name)
    file = place / "workspace/.training/align/checkpoints" / state
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    told = drive(place, "term-driver:15:0")
    assert told.status == 3
    assert f"checkpoint {saved.number:08d}, of step 10, is passed over" in told.output
    assert "optim_states.pt is damaged" in told.output
    assert re.search("goes on from the checkpoint of step (9|10)$", told.output, re.MULTILINE)
    assert "StopRequestedError: stopped as asked" in told.output
    assert 15 <= newest(place).step < STEPS

    finished = drive(place)
    assert finished.status == 0, finished.output
    assert_undisturbed(place, quiet)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk can't be mounted here; it takes a superuser")
    yield place
    if (place / "stop.pid").exists():
        with suppress(ProcessLookupError):
            os.kill(int((place / "stop.pid").read_text()), signal.SIGKILL)
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_a_hung_worker_and_a_node_that_dies_for_good_change_nothing(
    drive: Any, quiet: Path, small_disk: Path, worker_node: Callable[[], Any]
) -> None:
    """The disk is full from step 3 to 8, a worker hangs at 11, and at 17 a node dies that nothing replaces."""
    for _ in range(2):
        worker_node()
    ended = drive(
        small_disk,
        *("fill-disk:3:0", "free-disk:8:0", "stop:11:1", "kill-node:17:1"),
        hang_after_s=75,
        worker_cpus=3.0,
        min_workers=1,
    )
    assert ended.status == 0, ended.output
    assert "could not write the checkpoint of step 5" in ended.output
    assert "goes on from the checkpoint of step 10" in ended.output
    assert "goes on from the checkpoint of step 15" in ended.output
    assert newest(small_disk).world_size == 1
    assert_undisturbed_but_for_sums(small_disk, quiet)
