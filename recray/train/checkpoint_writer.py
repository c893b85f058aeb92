"""Writing the checkpoints of `recray.train.checkpoint` beside training.

Engines write on the critical path, as their state must not change meanwhile; hashing, uploading and the manifest are a
thread's work.
"""

import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pyarrow import fs as pafs
from safetensors.torch import save_file
from torch import Tensor

from recray.distributed.collectives import sum_over_ranks, world
from recray.train.checkpoint import BEST, MANIFEST, WRITING, CheckpointStore, Saved, folder_of, hash_of

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.05
LEAVE_WITHIN_S = 10.0  # for other ranks' files, when this one leaves


class CheckpointWriter:
    """One rank's part in writing checkpoints, at most one of them under way.

    A checkpoint that can't be written, as the disk is full, costs a warning and not the run: training goes on, and the
    next one is tried.
    """

    def __init__(self, store: CheckpointStore, device: torch.device, resumed: Saved | None = None) -> None:
        self._store, self._device = store, device
        self._rank, self._world_size = world()
        self._number = 0 if resumed is None else resumed.number  # of the last checkpoint begun
        self._kept: tuple[str, str] | None = None  # file and hash of the best weights that a manifest names
        if resumed is not None and resumed.best is not None:
            self._kept = resumed.best, resumed.files[resumed.best]
        self._weights: dict[str, Tensor] | None = None  # better ones, until a manifest names them
        self._thread: threading.Thread | None = None
        self.failure: str | None = None  # of the last checkpoint, on this rank
        self._own_part_done = threading.Event()
        self._given_up = threading.Event()
        self.step: int | None = None  # of the last checkpoint begun
        self.seconds = 0.0  # that training waited

    def keep_best(self, weights: Mapping[str, Tensor]) -> None:
        """Take the best weights so far, whole on rank 0; they are written with the next checkpoint."""
        if self._rank == 0:
            self._weights = dict(weights)

    def write(self, step: int, write_state: Callable[[Path], None], texts: Mapping[str, str]) -> None:
        """Write the checkpoint of a step; a collective, which returns when the state may change again.

        Args:
            step: Steps taken.
            write_state: Writes this rank's state into a folder; a collective of the engine.
            texts: Small files, written by rank 0.
        """
        self.settle()
        started = time.perf_counter()
        self.step = step
        self._number += 1
        self.failure, self._own_part_done, self._given_up = None, threading.Event(), threading.Event()
        folder = None
        try:
            folder = self._staging()
            write_state(folder)
            if self._rank == 0:
                for name, text in texts.items():
                    (folder / name).write_text(text, encoding="utf-8")
        except (OSError, RuntimeError) as error:  # torch says RuntimeError when a disk is full
            self._fail(error)
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        else:
            self._thread = threading.Thread(target=self._work, args=(step, folder, self._weights), daemon=True)
            self._thread.start()
        self.seconds += time.perf_counter() - started

    def settle(self) -> bool:
        """Wait for the checkpoint under way; return whether the last one counts. A collective."""
        if self.step is None:
            return False
        started = time.perf_counter()
        self._own_part_done.wait()
        if self._has_failed():
            self._given_up.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failed = self._has_failed()  # rank 0 may have, at the manifest
        if failed and self._rank == 0:
            self._remove_half()
        self.seconds += time.perf_counter() - started
        return not failed

    def leave(self) -> None:
        """Let the checkpoint under way come to its end, for a while, as this rank goes; not a collective."""
        if self._thread is not None:
            self._thread.join(LEAVE_WITHIN_S)
            self._given_up.set()
            self._thread.join()
            self._thread = None

    def _has_failed(self) -> bool:
        """Return whether any rank has; a collective."""
        return bool(sum_over_ranks(torch.tensor([float(self.failure is not None)], device=self._device)).item())

    def _staging(self) -> Path:
        if self._store.is_local:
            folder = Path(self._store.path(WRITING, f"{folder_of(self._number)}-{self._rank}"))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            return folder
        return Path(tempfile.mkdtemp(prefix="recray-checkpoint-"))

    def _work(self, step: int, folder: Path, weights: dict[str, Tensor] | None) -> None:
        """In a thread: hand over this rank's files; on rank 0, wait for the others' and write the manifest."""
        try:
            files = self._hand_over(folder, weights)
            self._own_part_done.set()
            if self._rank == 0:
                self._finish(step, files, weights)
        except Exception as error:  # noqa: BLE001 - a thread's error would be lost: settle tells of it
            self._fail(error)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _hand_over(self, folder: Path, weights: dict[str, Tensor] | None) -> dict[str, str]:
        """Bring own files into the store and return their hashes."""
        files = {}
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = f"{folder_of(self._number)}/{file.relative_to(folder).as_posix()}"
            files[name] = self._bring(file, name)
        if weights is not None:
            save_file(weights, folder / BEST)
            files[self._best_file()] = self._bring(folder / BEST, self._best_file())
        if self._rank != 0:
            self._write_text(f"{folder_of(self._number)}/rank-{self._rank}.json", json.dumps(files))
        return files

    def _bring(self, file: Path, name: str) -> str:
        """Move or upload one file; return its hash."""
        found = hash_of(pafs.LocalFileSystem(), str(file))
        target = self._store.path(name)
        self._store.fs.create_dir(target.rsplit("/", 1)[0], recursive=True)
        if self._store.is_local:
            os.replace(file, target)
        else:
            pafs.copy_files(str(file), target, destination_filesystem=self._store.fs)
        return found

    def _finish(self, step: int, files: dict[str, str], weights: dict[str, Tensor] | None) -> None:
        """Wait for the other ranks' files, and make the checkpoint count."""
        store, waiting = self._store, list(range(1, self._world_size))
        while waiting:
            if self._given_up.wait(LOOK_EVERY_S):
                return
            name = f"{folder_of(self._number)}/rank-{waiting[0]}.json"
            if not store.has(name):
                continue
            try:
                files |= json.loads(store.read(name))
            except ValueError:
                continue  # still being written
            store.fs.delete_file(store.path(name))
            waiting.pop(0)
        best = self._kept if weights is None else (self._best_file(), files[self._best_file()])
        if best is not None:
            files[best[0]] = best[1]
        store.commit(Saved(self._number, step, self._world_size, files, None if best is None else best[0]))
        self._kept = best
        if self._weights is weights:  # and no better ones came meanwhile
            self._weights = None

    def _best_file(self) -> str:
        return f"{BEST}/{folder_of(self._number)}.safetensors"

    def _write_text(self, name: str, text: str) -> None:
        with self._store.fs.open_output_stream(self._store.path(name)) as stream:
            stream.write(text.encode())

    def _fail(self, error: Exception) -> None:
        self.failure = f"{type(error).__name__}: {error}"
        logger.warning(
            "rank %d could not write the checkpoint of step %s (%s); training goes on, the next one is tried",
            self._rank,
            self.step,
            self.failure,
        )
        self._own_part_done.set()

    def _remove_half(self) -> None:
        """Give a full disk its room back."""
        store, own = self._store, folder_of(self._number)
        if store.has(own) and not store.has(own, MANIFEST):
            store.fs.delete_dir(store.path(own))
        if store.has(WRITING):
            store.fs.delete_dir(store.path(WRITING))
