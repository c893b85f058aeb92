"""Checkpoints: every rank's state in one place, valid when its manifest is there and every file is what it says.

ROOT/00000007/manifest.json         written last: step, number of ranks, the SHA-256 of every file
ROOT/00000007/state/...             of the engine, each rank's own
ROOT/00000007/progress.json, metrics.jsonl
ROOT/best/00000005.safetensors      the best weights up to then; several checkpoints may share one
ROOT/.writing/00000007-3/           what rank 3 is writing, on a local file system

Folders are numbered as they are begun, not by step: what is whole is never written over.

ROOT is a folder of any file system that pyarrow knows: a disk, a share, an object store. What writes there is
`recray.train.checkpoint_writer`; here is no torch, for the processes that only look which checkpoint is the newest.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import fs as pafs

from recray.errors import CheckpointError

logger = logging.getLogger(__name__)

MANIFEST, BEST, WRITING = "manifest.json", "best", ".writing"
READ_AT_ONCE = 1 << 22  # bytes


class Saved(NamedTuple):
    """A checkpoint that is whole."""

    number: int  # of its folder
    step: int
    world_size: int  # ranks that wrote it
    files: dict[str, str]  # path below the store's root → SHA-256
    best: str | None  # the file among them that holds the best weights


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        fs: The file system.
        root: A folder of it, made when something is written.
        keep: How many checkpoints to keep, the newest ones.
    """

    def __init__(self, fs: pafs.FileSystem, root: str, *, keep: int = 2) -> None:
        self.fs, self.root, self.keep = fs, root, keep
        self.is_local = isinstance(fs, pafs.LocalFileSystem)

    def path(self, *parts: str) -> str:
        """Return a path below the root, for use together with `fs`."""
        return "/".join([self.root, *parts])

    def newest(self, *, tell: bool = True) -> Saved | None:
        """Return the newest checkpoint that is whole, and say which newer ones are not, and why, if told to tell."""
        for number in sorted(self.numbers(), reverse=True):
            saved, wrong = self._read(number)
            if saved is not None and wrong is None:
                return saved
            if not tell:
                continue
            logger.warning(
                "checkpoint %s%s is passed over: %s; the one before it is looked at",
                folder_of(number),
                "" if saved is None else f", of step {saved.step},",
                wrong,
            )
        return None

    def numbers(self) -> list[int]:
        """Return the numbers of all checkpoints, whole or not, oldest first."""
        if self.fs.get_file_info(self.root).type == pafs.FileType.NotFound:
            return []
        names = [info.base_name for info in self.fs.get_file_info(pafs.FileSelector(self.root))]
        return sorted(int(name) for name in names if name.isdigit())

    def clean(self, saved: Saved | None) -> None:
        """Remove everything newer than `saved` and everything half-written, before training goes on from it."""
        for number in self.numbers():
            if saved is None or number > saved.number or not self.has(folder_of(number), MANIFEST):
                self.fs.delete_dir(self.path(folder_of(number)))
        if self.has(WRITING):
            self.fs.delete_dir(self.path(WRITING))

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        with self.fs.open_input_stream(self.path(name)) as stream:
            content: bytes = stream.read()
        return content

    @contextmanager
    def opened(self, saved: Saved, *names: str) -> Iterator[Path]:
        """Yield a local folder with these files of a checkpoint, or all of them.

        That is the store's own, or a copy, which is checked again, where the store is no local one.

        Raises:
            CheckpointError: if a copy is not what the manifest says.
        """
        if self.is_local:
            yield Path(self.root)
            return
        with tempfile.TemporaryDirectory(prefix="recray-resume-") as folder:
            for name in names or saved.files:
                target = Path(folder) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                pafs.copy_files(self.path(name), str(target), source_filesystem=self.fs)
                if (found := hash_of(pafs.LocalFileSystem(), str(target))) != saved.files[name]:
                    raise CheckpointError(
                        f"{self.path(name)}: got SHA-256 {found}, its manifest says {saved.files[name]}; run again"
                    )
            yield Path(folder)

    def commit(self, saved: Saved) -> None:
        """Write the manifest, which makes the checkpoint count, and remove those that are too many."""
        manifest = json.dumps(saved._asdict(), indent=1, sort_keys=True).encode()
        target = self.path(folder_of(saved.number), MANIFEST)
        with self.fs.open_output_stream(f"{target}.partial") as stream:
            stream.write(manifest)
        self.fs.move(f"{target}.partial", target)
        try:
            self._remove_old()
        except OSError as error:
            logger.warning("old checkpoints below %s could not be removed: %s", self.root, error)

    def _remove_old(self) -> None:
        whole = [number for number in self.numbers() if self.has(folder_of(number), MANIFEST)]
        for number in whole[: -self.keep]:
            self.fs.delete_file(self.path(folder_of(number), MANIFEST))  # first, so that what is left never counts
            self.fs.delete_dir(self.path(folder_of(number)))
        self._remove_other_bests(whole[-self.keep :])

    def _remove_other_bests(self, numbers: list[int]) -> None:
        if not self.has(BEST):
            return
        used = {self.manifest(number).best for number in numbers}
        for info in self.fs.get_file_info(pafs.FileSelector(self.path(BEST))):
            if f"{BEST}/{info.base_name}" not in used:
                self.fs.delete_file(info.path)

    def _read(self, number: int) -> tuple[Saved | None, str | None]:
        """Return what the manifest says, and what is wrong with it or with a file it names."""
        if not self.has(folder_of(number), MANIFEST):
            return None, "it has no manifest, so it was not finished"
        try:
            saved = self.manifest(number)
        except (ValueError, TypeError, KeyError) as error:
            return None, f"its manifest can't be read ({error})"
        for name, expected in saved.files.items():
            if not self.has(name):
                return saved, f"{name} is missing"
            if (found := hash_of(self.fs, self.path(name))) != expected:
                return saved, f"{name} is damaged (its SHA-256 is {found[:12]}…, not {expected[:12]}…)"
        return saved, None

    def manifest(self, number: int) -> Saved:
        """Return what the manifest of a checkpoint says, its files not looked at."""
        found: dict[str, Any] = json.loads(self.read(f"{folder_of(number)}/{MANIFEST}"))
        return Saved(number, int(found["step"]), int(found["world_size"]), dict(found["files"]), found["best"])

    def has(self, *parts: str) -> bool:
        """Return whether a file or folder is there."""
        return bool(self.fs.get_file_info(self.path(*parts)).type != pafs.FileType.NotFound)


def folder_of(number: int) -> str:
    """Return the name of a checkpoint's folder, below the store's root."""
    return f"{number:08d}"


def hash_of(fs: pafs.FileSystem, path: str) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with fs.open_input_stream(path, buffer_size=0) as stream:
        while block := stream.read(READ_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
