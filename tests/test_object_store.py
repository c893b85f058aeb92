"""Workspaces, locks and checkpoints on a server that speaks S3."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recray.errors import WorkspaceError
from recray.lock import WorkspaceLock
from recray.train.checkpoint import CheckpointStore, folder_of
from recray.train.checkpoint_writer import CheckpointWriter
from recray.workspace import Workspace

HOLD = """
import sys
from recray.lock import WorkspaceLock
from recray.workspace import Workspace
with WorkspaceLock(Workspace(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def remote(object_store: str, request: pytest.FixtureRequest) -> Workspace:
    """An empty workspace on the object store."""
    return Workspace(object_store.format(request.node.name))


def test_a_stage_is_there_whole_or_not_at_all(remote: Workspace) -> None:
    table = pa.table({"row": np.arange(5)})
    with remote.stage("sft", version=1, part={}, seed=0, inputs={}) as out:
        out.write_table("rows", table)
        assert remote.manifest("sft") is None
    assert remote.table("sft", "rows").equals(table)
    assert remote.require("sft").counts == {"rows": 5}
    with suppress(KeyError), remote.stage("align", version=1, part={}, seed=0, inputs={}) as out:
        out.write_table("rows", table)
        raise KeyError("broke")
    assert remote.manifest("align") is None
    assert remote.names(".partial") == []
    with remote.stage("sft", version=2, part={}, seed=0, inputs={}) as out:  # in place of the one before
        out.write_table("others", table)
    assert remote.names("sft") == ["manifest.json", "others"]


def test_folders_go_there_and_come_back(remote: Workspace, tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "weights").write_bytes(bytes(range(256)))
    remote.put_folder(tmp_path / "model", "sft", "model")
    local = remote.folder("sft", "model")
    assert (local / "deep" / "weights").read_bytes() == bytes(range(256))
    assert remote.folder("sft", "model") == local  # fetched once
    (tmp_path / "model" / "deep" / "weights").write_bytes(b"new")
    remote.put_folder(tmp_path / "model", "sft", "model")
    assert (remote.folder("sft", "model") / "deep" / "weights").read_bytes() == b"new"
    remote.put_json({"a": 1}, "sft", "facts.json")
    assert remote.json("sft", "facts.json") == {"a": 1}
    assert remote.names("sft") == ["facts.json", "model"]
    remote.remove("sft")
    assert not remote.exists("sft", "facts.json")


def test_a_second_writer_is_refused(remote: Workspace) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, remote.uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(WorkspaceError, match=f"is being written by process {holder.pid} "), WorkspaceLock(remote):
        pass
    holder.communicate("end\n", timeout=30)
    with WorkspaceLock(remote) as lock:
        lock.check()


def test_checkpoints_count_when_they_are_whole(remote: Workspace) -> None:
    store = CheckpointStore(remote.fs, remote.path(".training", "fit", "checkpoints"))
    writer = CheckpointWriter(store, torch.device("cpu"))
    for step in (1, 2):
        writer.keep_best({"w": torch.full((3,), float(step))})
        writer.write(step, lambda folder, step=step: (folder / "state").write_text(str(step)) and None, {"note": "n"})
        assert writer.settle()
    saved = store.newest()
    assert saved is not None
    assert saved.step == 2
    with store.opened(saved) as folder:
        assert (folder / folder_of(saved.number) / "state").read_text() == "2"
    state = next(name for name in saved.files if name.endswith("state"))
    with remote.fs.open_output_stream(store.path(state)) as stream:
        stream.write(b"3")
    before = store.newest(tell=False)
    assert before is not None
    assert before.step == 1
    store.clean(before)
    assert store.numbers() == [before.number]


def test_who_reads_it_needs_no_more_than_its_uri(remote: Workspace) -> None:
    remote.write_json([1, 2], "facts.json")
    program = "import sys; from recray.workspace import Workspace; print(Workspace(sys.argv[1]).json('facts.json'))"
    done = subprocess.run([sys.executable, "-c", program, remote.uri], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [1, 2]
    assert "testing" not in remote.uri  # the credentials come from the environment
