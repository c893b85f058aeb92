"""Checkpoints without Ray: what counts, what is passed over, what is kept, and a disk that is full."""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pyarrow import fs as pafs
from safetensors.torch import load_file

from recray.errors import CheckpointError
from recray.train.checkpoint import CheckpointStore, Saved, folder_of
from recray.train.checkpoint_writer import CheckpointWriter

CPU = torch.device("cpu")


def state_of(step: int) -> Callable[[Path], None]:
    """What an engine would write at a step."""

    def write(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "state" / "rank.pt").write_bytes(b"%d" % step * 1000)

    return write


def store_at(folder: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(pafs.LocalFileSystem(), str(folder), keep=keep)


def filled(store: CheckpointStore, steps: list[int], bests: tuple[int, ...] = (1,)) -> CheckpointWriter:
    """A writer that has written these steps, some of them with better weights."""
    writer = CheckpointWriter(store, CPU)
    for step in steps:
        if step in bests:
            writer.keep_best({"weight": torch.full((2,), float(step))})
        writer.write(step, state_of(step), {"progress.json": json.dumps({"step": step})})
        assert writer.settle()
    return writer


def test_what_was_written_is_found_whole_with_its_hashes(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    filled(store, [1, 2])
    saved = store.newest()
    assert saved is not None
    assert (saved.step, saved.world_size, saved.best) == (2, 1, "best/00000001.safetensors")
    assert set(saved.files) == {"00000002/state/rank.pt", "00000002/progress.json", "best/00000001.safetensors"}
    assert json.loads(store.read("00000002/progress.json")) == {"step": 2}
    with store.opened(saved) as folder:
        assert (folder / "00000002/state/rank.pt").read_bytes() == b"2" * 1000
        assert load_file(folder / "best/00000001.safetensors")["weight"].tolist() == [1.0, 1.0]


def test_the_newest_are_kept_and_the_best_weights_they_name(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    filled(store, [1, 2, 3, 4, 5], bests=(1, 3))
    assert store.numbers() == [4, 5]
    assert [file.name for file in (tmp_path / "best").iterdir()] == ["00000003.safetensors"]
    assert not list((tmp_path / ".writing").iterdir())


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("00000002/state/rank.pt", _flip, "state/rank.pt is damaged"),
        ("00000002/state/rank.pt", _cut, "state/rank.pt is damaged"),
        ("00000002/state/rank.pt", Path.unlink, "state/rank.pt is missing"),
        ("00000002/manifest.json", _cut, "its manifest can't be read"),
        ("00000002/manifest.json", Path.unlink, "it has no manifest, so it was not finished"),
        ("best/00000002.safetensors", _flip, "00000002.safetensors is damaged"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: Callable[[Path], None], reason: str
) -> None:
    store = store_at(tmp_path)
    filled(store, [1, 2], bests=(1, 2))
    harm(tmp_path / name)
    saved = store.newest()
    assert saved is not None
    assert saved.step == 1
    assert "checkpoint 00000002" in caplog.text
    assert reason in caplog.text
    store.clean(saved)
    assert store.numbers() == [1]


def test_training_does_not_wait_for_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gate = store_at(tmp_path), threading.Event()
    committed = store.commit

    def late(saved: Saved) -> None:
        gate.wait(30)
        committed(saved)

    monkeypatch.setattr(store, "commit", late)
    writer = CheckpointWriter(store, CPU)
    writer.write(1, state_of(1), {})
    assert store.newest() is None
    # Better weights that come meanwhile go with the next checkpoint.
    writer.keep_best({"weight": torch.ones(1)})
    gate.set()
    writer.write(2, state_of(2), {})
    assert writer.settle()
    saved = store.newest()
    assert saved is not None
    assert (saved.step, saved.best) == (2, "best/00000002.safetensors")


def test_a_state_that_cannot_be_written_costs_a_warning_and_the_one_before_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_at(tmp_path)
    writer = filled(store, [1])

    def full(folder: Path) -> None:
        state_of(2)(folder)
        raise OSError(28, "No space left on device")

    writer.keep_best({"weight": torch.ones(1)})
    writer.write(2, full, {})
    assert not writer.settle()
    assert "could not write the checkpoint of step 2 (OSError: [Errno 28] No space left on device)" in caplog.text
    assert store.numbers() == [1]
    assert not (tmp_path / ".writing").exists()
    writer.write(3, state_of(3), {})
    assert writer.settle()
    saved = store.newest()
    assert saved is not None
    assert (saved.step, saved.best) == (3, "best/00000003.safetensors")


def test_a_damaged_copy_from_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    remote = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    store = CheckpointStore(remote, "store")
    assert not store.is_local
    filled(store, [1])
    saved = store.newest()
    assert saved is not None
    with store.opened(saved) as folder:
        assert (folder / folder_of(1) / "state/rank.pt").read_bytes() == b"1" * 1000
    _flip(tmp_path / "store/00000001/state/rank.pt")
    with pytest.raises(CheckpointError, match="its manifest says"), store.opened(saved):
        pytest.fail("opened")
    assert not folder.exists()


def test_old_checkpoints_that_cannot_be_removed_cost_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = store_at(tmp_path, keep=1)

    def stuck() -> None:
        raise OSError("stuck")

    monkeypatch.setattr(store, "_remove_old", stuck)
    with caplog.at_level(logging.WARNING):
        filled(store, [1, 2])
    assert store.numbers() == [1, 2]
    assert "could not be removed: stuck" in caplog.text
