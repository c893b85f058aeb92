"""DeepSpeed's checkpoints for another number of ranks: its universal form, made where one is loaded, once a machine."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from recray.distributed.collectives import world
from recray.errors import CheckpointError


@contextmanager
def universal_copy(folder: Path, tag: str) -> Iterator[Path]:
    """Yield a folder that holds `tag` in universal form, the same on every rank of a machine; a collective.

    The first rank of each machine makes it in the temporary folder, and removes it when all have loaded from it.

    Raises:
        CheckpointError: with what the converter said, on the rank whose machine it failed on.
    """
    first = int(os.environ.get("LOCAL_RANK", str(world()[0]))) == 0
    # The port tells this group from another of the same machine.
    name = hashlib.sha256(f"{folder}/{tag}:{os.environ.get('MASTER_PORT', '')}".encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"recray-universal-{name}"
    try:
        if first:
            shutil.rmtree(target, ignore_errors=True)
            _convert(folder / tag, target / tag)
        _wait()
        yield target
        _wait()
    finally:
        if first:
            shutil.rmtree(target, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    # A process of its own: the converter prints, and what it reads into memory goes with it.
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--no_strict"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(
            f"DeepSpeed could not convert {source} to another number of ranks; resume it with as many workers as it "
            f"was written by, or remove the run's folder below .training to start again. It said:\n"
            f"{done.stderr[-2000:]}"
        )


def _wait() -> None:
    if world()[1] > 1:
        dist.barrier()
