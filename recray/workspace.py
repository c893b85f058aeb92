"""A workspace: one folder or object-store URI in which the stages of one run meet.

WORKSPACE/
  workspace.json            whose it is: recipe and data
  STAGE/manifest.json       written last: a stage without it does not count
  STAGE/TABLE/*.parquet     tables of recray.schema
  STAGE/model/              a Hugging Face folder
  .partial/STAGE/           a stage at work; moved into place when whole, removed when it fails
  .training/STAGE-PRINT/    checkpoints of a fit under way
  .lock/                    who is writing; see recray.lock
  .cache/reference/PRINT/   scores of one model for one set of rows, in files that are only ever added; may be removed
"""

import atexit
import hashlib
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pyarrow import fs as pafs
from pydantic import BaseModel, ConfigDict

from recray import __version__
from recray.errors import WorkspaceError

VERSIONED = ("ray", "torch", "transformers", "deepspeed", "pyarrow", "numpy")


class Manifest(BaseModel):
    """Where a stage's output came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    version: int
    fingerprint: str
    part: dict[str, Any]
    seed: int
    inputs: dict[str, str]
    counts: dict[str, int]
    facts: dict[str, Any]
    seconds: float
    finished: str
    versions: dict[str, str]


class Workspace:
    """A local folder or an object-store URI; cheap to make and to pickle.

    Raises:
        WorkspaceError: if the URI names a scheme that pyarrow can't open.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(Path(uri).expanduser().resolve())
        try:
            self.fs, self.root = pafs.FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, ValueError) as error:
            raise WorkspaceError(f"--workspace {uri}: expected a folder or an s3:// or gs:// URI ({error})") from None
        self.root = self.root.rstrip("/")

    def __reduce__(self) -> tuple[type["Workspace"], tuple[str]]:
        return Workspace, (self.uri,)

    def path(self, *parts: str) -> str:
        """Return the path below the root, for use together with `fs`."""
        return "/".join([self.root, *parts])

    def exists(self, *parts: str) -> bool:
        """Return whether a file or folder is there."""
        info: pafs.FileInfo = self.fs.get_file_info(self.path(*parts))
        return bool(info.type != pafs.FileType.NotFound)

    def names(self, *parts: str) -> list[str]:
        """Return the names of what is in a folder; none where there is no such folder."""
        selector = pafs.FileSelector(self.path(*parts), allow_not_found=True)
        return sorted(info.base_name for info in self.fs.get_file_info(selector))

    def table(self, stage: str, name: str, columns: list[str] | None = None) -> pa.Table:
        """Read a whole table of a finished stage.

        Raises:
            WorkspaceError: if the stage has not finished in this workspace.
        """
        self.require(stage)
        dataset = pads.dataset(self.path(stage, name), filesystem=self.fs, format="parquet")
        return dataset.to_table(columns=columns)

    def json(self, *parts: str) -> Any:
        """Read a JSON file."""
        with self.fs.open_input_stream(self.path(*parts)) as stream:
            return json.loads(stream.read())

    def write_json(self, value: Any, *parts: str) -> None:
        """Write a JSON file, making its folder."""
        self.write_bytes(_as_json(value), *parts)

    def write_bytes(self, value: bytes, *parts: str) -> None:
        """Write a file, making its folder."""
        path = self.path(*parts)
        self.fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with self.fs.open_output_stream(path) as stream:
            stream.write(value)

    def put_table(self, table: pa.Table, *parts: str) -> None:
        """Write a Parquet file, whole or not at all, making its folder."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.put_bytes(sink.getvalue().to_pybytes(), *parts)

    def put_json(self, value: Any, *parts: str) -> None:
        """Write a JSON file, whole or not at all, making its folder."""
        self.put_bytes(_as_json(value), *parts)

    def put_bytes(self, value: bytes, *parts: str) -> None:
        """Write a file, whole or not at all, making its folder."""
        *folder, name = parts
        self.write_bytes(value, *folder, f".partial-{name}")
        self.fs.move(self.path(*folder, f".partial-{name}"), self.path(*parts))

    def folder(self, *parts: str) -> Path:
        """Return a local copy of a folder, to be read; the folder itself where the workspace is local."""
        if isinstance(self.fs, pafs.LocalFileSystem):
            return Path(self.path(*parts))
        return _local_copy(self.fs, self.path(*parts))

    def put_folder(self, local: Path, *parts: str) -> None:
        """Copy a local folder to a place in the workspace, in place of what is there."""
        self.remove(*parts)
        self.fs.create_dir(self.path(*parts), recursive=True)
        pafs.copy_files(str(local), self.path(*parts), destination_filesystem=self.fs)

    def remove(self, *parts: str) -> None:
        """Remove a file or folder, if it is there."""
        info: pafs.FileInfo = self.fs.get_file_info(self.path(*parts))
        if info.type == pafs.FileType.File:
            self.fs.delete_file(self.path(*parts))
        elif info.type == pafs.FileType.Directory:
            self.fs.delete_dir(self.path(*parts))

    def remove_all(self, prefix: str, *folder: str) -> None:
        """Remove what in a folder has a name that begins so."""
        for name in self.names(*folder):
            if name.startswith(prefix):
                self.remove(*folder, name)

    def require(self, stage: str) -> Manifest:
        """Return the manifest of a finished stage, or raise `WorkspaceError` saying how to make it."""
        manifest = self.manifest(stage)
        if manifest is None:
            raise WorkspaceError(
                f"{self.uri} holds no finished `{stage}`; run `recray {stage}` (or `recray run`) with this workspace"
            )
        return manifest

    def manifest(self, stage: str) -> Manifest | None:
        """Return the manifest of a stage, or None if it has not finished."""
        if not self.exists(stage, "manifest.json"):
            return None
        return Manifest.model_validate(self.json(stage, "manifest.json"))

    def claim(self, name: str, data: str | None) -> None:
        """Mark a new workspace as that of recipe `name` on `data`; refuse one that is another's.

        Raises:
            WorkspaceError: naming both, if the workspace belongs to another recipe or other data.
        """
        mine = {"recipe": name, "data": data}
        if not self.exists("workspace.json"):
            self.write_json(mine, "workspace.json")
            return
        theirs = self.json("workspace.json")
        if theirs != mine:
            raise WorkspaceError(
                f"{self.uri} belongs to recipe {theirs['recipe']!r} on data {theirs['data']!r}, but this run is "
                f"{name!r} on {data!r}; use another --workspace"
            )

    @contextmanager
    def stage(
        self, stage: str, *, version: int, part: Mapping[str, Any], seed: int, inputs: Mapping[str, str]
    ) -> Iterator["StageOutput"]:
        """Open `stage` for writing; whole and with its manifest afterwards, or not there at all."""
        output = StageOutput(self, stage)
        self.remove(".partial", stage)
        self.fs.create_dir(output.path(), recursive=True)
        started = time.monotonic()
        try:
            yield output
            manifest = Manifest(
                stage=stage,
                version=version,
                fingerprint=fingerprint(stage, version, part, seed, inputs),
                part=dict(part),
                seed=seed,
                inputs=dict(inputs),
                counts=output.counts,
                facts=output.facts,
                seconds=round(time.monotonic() - started, 3),
                finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                versions=versions(),
            )
        except BaseException:
            self.remove(".partial", stage)
            raise
        self.remove(stage)
        self._move(output.path(), self.path(stage))
        self.write_json(manifest.model_dump(mode="json"), stage, "manifest.json")

    def _move(self, source: str, target: str) -> None:
        if isinstance(self.fs, pafs.LocalFileSystem):
            self.fs.move(source, target)
            return
        # Object stores can't rename folders: copy, then remove; the manifest is still written last.
        pafs.copy_files(source, target, source_filesystem=self.fs, destination_filesystem=self.fs)
        self.fs.delete_dir(source)


class StageOutput:
    """What a stage writes: tables, files, counts of rows and facts for the report."""

    def __init__(self, workspace: Workspace, stage: str) -> None:
        self.workspace = workspace
        self.stage = stage
        self.counts: dict[str, int] = {}
        self.facts: dict[str, Any] = {}

    @property
    def fs(self) -> pafs.FileSystem:
        """The workspace's file system, to go with `path`."""
        return self.workspace.fs

    def path(self, *parts: str) -> str:
        """Return the path of a file or table of this stage while it is at work."""
        return self.workspace.path(".partial", self.stage, *parts)

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a whole table as one Parquet file and count its rows."""
        self.fs.create_dir(self.path(name), recursive=True)
        pq.write_table(table, self.path(name, "part-0.parquet"), filesystem=self.fs, compression="zstd")
        self.counts[name] = table.num_rows

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.workspace.write_json(value, ".partial", self.stage, name)

    def write_bytes(self, name: str, value: bytes) -> None:
        """Write a file."""
        self.workspace.write_bytes(value, ".partial", self.stage, name)

    def copy_from(self, source: str, name: str) -> None:
        """Copy a folder of the workspace, by its whole path, into the stage."""
        self.fs.create_dir(self.path(name), recursive=True)
        pafs.copy_files(source, self.path(name), source_filesystem=self.fs, destination_filesystem=self.fs)

    def write_folder(self, name: str, local: Path) -> None:
        """Copy a local folder, a model say, into the stage."""
        self.fs.create_dir(self.path(name), recursive=True)
        pafs.copy_files(str(local), self.path(name), destination_filesystem=self.fs)


_copies: dict[str, tuple[Any, Path]] = {}


def _local_copy(fs: pafs.FileSystem, path: str) -> Path:
    """Return a copy of a folder that goes when this process ends; made again when what is there has changed."""
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    now = sorted((info.path, info.size, info.mtime_ns) for info in found if info.is_file)
    if path not in _copies or _copies[path][0] != now:
        folder = Path(tempfile.mkdtemp(prefix="recray-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        pafs.copy_files(path, str(folder), source_filesystem=fs)
        _copies[path] = now, folder
    return _copies[path][1]


def _as_json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def fingerprint(stage: str, version: int, part: Mapping[str, Any], seed: int, inputs: Mapping[str, str]) -> str:
    """Return 16 hex digits that change when anything that decides a stage's output does."""
    whole = json.dumps([stage, version, part, seed, dict(inputs)], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of recray, Python and the libraries that decide results."""
    found = {name: metadata.version(name) for name in VERSIONED}
    return {"recray": __version__, "python": platform.python_version(), **found}
