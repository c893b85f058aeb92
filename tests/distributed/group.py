"""How a worker script of these tests joins its group; not a test."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist


def in_group(train: Callable[[Path, int, int, str], None]) -> None:
    """Read FOLDER RANK WORLD PORT SETTING ... from the command line, join the group, and train every setting in it."""
    folder, rank, world, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for setting in sys.argv[5:]:
        train(folder, rank, world, setting)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may outlive the group, and abort an interpreter that tears itself down meanwhile
