"""Ranks and gathers; everything is the identity when not distributed.

The objective computes every loss on gathered scores, the same number on every rank. The gather's backward sums the
ranks' gradients, and DDP then averages them, so the result is the gradient of one process on the concatenated batch:
no loss is to be multiplied by the world size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks, 1 when not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 when not distributed."""
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return _gather(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may hand it to others too
        dist.all_reduce(gradient)  # every rank's loss depends on this rank's rows
        return gradient[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def _gather(x: Tensor) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


def all_gather(x: Tensor, *, gradient: bool = False) -> Tensor:
    """`[B, ...]` of each rank -> `[R * B, ...]` in rank order; every rank must bring the same shape.

    Args:
        gradient: let gradients flow back to the rank each row came from, summed over ranks.
    """
    if world_size() == 1:
        return x
    if gradient and x.requires_grad and torch.is_grad_enabled():
        return _Gather.apply(x)  # type: ignore[no-any-return]
    return _gather(x.detach())


def all_gather_padded(x: Tensor, *, gradient: bool = False) -> Tensor:
    """Like `all_gather` for `[B, L, ...]` whose `L` differs between ranks: zero-padded to the longest."""
    if world_size() == 1:
        return x
    longest = torch.tensor(x.shape[1], device=x.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padding = [0, 0] * (x.ndim - 2) + [0, int(longest) - x.shape[1]]
    return all_gather(torch.nn.functional.pad(x, padding), gradient=gradient)


def all_sum(x: Tensor) -> Tensor:
    """Sum of a tensor over ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x
