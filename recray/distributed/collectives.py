"""Reductions over ranks, each the identity where there is one process and no process group.

Nothing here is differentiable: the step never backpropagates through a collective (ARCHITECTURE.md, "The step").
"""

import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """Return (rank, number of ranks); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over all ranks, on every rank; a new tensor, detached."""
    total = tensor.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total
