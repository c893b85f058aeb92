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


def assert_undisturbed(place: Path, quiet: Path, *, alike_to: int) -> None:
    """Every step once, on the rows it should be; the first so many with the same figures to the last bit.

    What one worker does after two it sums in another order.
    """
    assert [line["rows"] for line in steps_of(place)] == TRACE
    assert steps_of(place)[:alike_to] == steps_of(quiet)[:alike_to]
    theirs = weights_of(quiet)
    for name, tensor in weights_of(place).items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-5, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def quiet(drive: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run of two workers went through undisturbed."""
    place = tmp_path_factory.mktemp("quiet")
    ended = drive(place)
    assert ended.status == 0, ended.output
    (place / "log.txt").write_text(ended.output)
    return place


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB, or an ordinary folder where none can be made."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0  # it takes a superuser
    yield place
    if (place / "stop.pid").exists():
        with suppress(ProcessLookupError):
            os.kill(int((place / "stop.pid").read_text()), signal.SIGKILL)
    if mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def damage(place: Path, saved: Saved) -> None:
    """Turn one bit of a checkpoint."""
    state = next(name for name in saved.files if "optim_states" in name)
    file = place / "workspace/.training/align/checkpoints" / state
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_faults_change_nothing(drive: Any, quiet: Path, small_disk: Path, worker_node: Callable[[], Any]) -> None:
    """Two drivers, six faults, and a checkpoint that is damaged between them; nothing replaces the node that dies.

    A worker is killed at step 7, another told that its machine goes at 9, the driver told to end at 12. In the second
    the disk is full from step 13 to 16, a worker hangs at 17 and a node dies at 18.
    """
    place, full = small_disk, os.path.ismount(small_disk)
    told = drive(place, "kill:7:1", "term:9:0", "term-driver:12:0")
    assert told.status == 3
    assert "goes on from the checkpoint of step 5" in told.output  # the kill cost steps 6 and 7
    # With notice nothing is lost; that of step 9 is heard in it or in the one after.
    assert "a machine goes away: the checkpoint of step" in told.output
    assert re.search("goes on from the checkpoint of step (9|10)$", told.output, re.MULTILINE)
    assert "StopRequestedError: stopped as asked" in told.output
    saved = newest(place)
    assert 12 <= saved.step < 15

    damage(place, saved)
    for _ in range(2):
        worker_node()
    filled = ("fill-disk:13:0", "free-disk:16:0") if full else ()
    ended = drive(place, *filled, "stop:17:1", "kill-node:18:1", hang_after_s=75, worker_cpus=3.0, min_workers=1)
    assert ended.status == 0, ended.output
    assert f"checkpoint {saved.number:08d}, of step {saved.step}, is passed over" in ended.output
    assert "optim_states.pt is damaged" in ended.output
    assert re.search("goes on from the checkpoint of step (9|10)$", ended.output, re.MULTILINE)
    assert ("could not write the checkpoint of step 15" in ended.output) == full
    assert "goes on from the checkpoint of step 15" in ended.output
    assert newest(place).world_size == 1
    assert_undisturbed(place, quiet, alike_to=15)


def test_the_log_of_a_job_is_plain_lines(quiet: Path) -> None:
    """No colours, no bars that are drawn anew: nothing that a file of lines can't show."""
    log = (quiet / "log.txt").read_bytes().decode()
    assert re.findall(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]", log) == []
    assert "%|" not in log
    assert "step 0: ndcg@10" in log
