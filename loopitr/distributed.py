"""Communication between ranks; without torch.distributed every function is the identity.

The objective computes every loss from gathered scores, so that it is the same on every rank. The backward pass of a
gather sums the gradients of all ranks, and DDP then averages them. The result is the gradient of one process on the
concatenated batch, so no loss has to be multiplied by the world size. Ranks may have batches of different sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """The number of ranks; 1 when not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The rank of this process; 0 when not distributed."""
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Sequence[int] | None) -> Tensor:
        ctx.start = rank() * len(x) if rows is None else sum(rows[: rank()])
        ctx.count = len(x)
        return _gather(x, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # Autograd may share this tensor with others.
        dist.all_reduce(gradient)  # The losses of all ranks depend on this rank's rows.
        return gradient[ctx.start : ctx.start + ctx.count], None


def _gather(x: Tensor, rows: Sequence[int] | None) -> Tensor:
    rows = [len(x)] * world_size() if rows is None else rows
    padding = x.new_zeros(max(rows) - len(x), *x.shape[1:])  # The collective needs equal shapes.
    x = torch.cat([x, padding]) if len(padding) else x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])


def rows_of_ranks(x: Tensor) -> list[int]:
    """The number of rows of `x` on each rank, in rank order."""
    if world_size() == 1:
        return [len(x)]
    count = torch.tensor([len(x)], device=x.device)
    return [int(number) for number in _gather(count, None).tolist()]


def all_gather(x: Tensor, *, gradient: bool = False, rows: Sequence[int] | None = None) -> Tensor:
    """`[B, ...]` of each rank -> `[G, ...]`, the rows of all ranks in rank order; other dimensions must be equal.

    Args:
        gradient: propagate gradients back to the rank of each row, summed over ranks.
        rows: B of each rank (`rows_of_ranks`); None: they are equal.
    """
    if world_size() == 1:
        return x
    if gradient and x.requires_grad and torch.is_grad_enabled():
        return _Gather.apply(x, rows)  # type: ignore[no-any-return]
    return _gather(x.detach(), rows)


def all_gather_padded(x: Tensor, *, gradient: bool = False, rows: Sequence[int] | None = None) -> Tensor:
    """Like `all_gather`, for `[B, L, ...]` whose `L` differs between ranks; it is zero-padded to the longest."""
    if world_size() == 1:
        return x
    longest = torch.tensor(x.shape[1], device=x.device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padding = [0, 0] * (x.ndim - 2) + [0, int(longest) - x.shape[1]]
    return all_gather(torch.nn.functional.pad(x, padding), gradient=gradient, rows=rows)


def all_sum(x: Tensor) -> Tensor:
    """The sum of a tensor over ranks, without gradient."""
    if world_size() == 1:
        return x.detach()
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def each_rank(work: Callable[[], T]) -> list[T]:
    """The results of `work()` on all ranks, in rank order; they must be picklable, with tensors on the CPU.

    An error on one rank is raised on all ranks, since the others would otherwise wait for it forever.
    """
    if world_size() == 1:
        return [work()]
    mine, parts = _attempt(work), list[Any]([None]) * world_size()
    dist.all_gather_object(parts, mine)
    parts[rank()] = mine  # Unlike its pickled copy, the error itself has a traceback.
    return [_result(part) for part in parts]


def first_rank(work: Callable[[], T]) -> T:
    """The result on all ranks of `work()`, which only rank 0 runs; otherwise like `each_rank`."""
    if world_size() == 1:
        return work()
    box = [_attempt(work) if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return _result(box[0])  # type: ignore[no-any-return]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except (ValueError, OSError) as error:
        kind: type[Exception] = OSError if isinstance(error, OSError) else ValueError
        return None, error if _can_be_sent(error) else _general(error, kind)
    except Exception as error:
        return None, _general(error, RuntimeError)


def _general(error: Exception, kind: type[Exception]) -> Exception:
    general = kind(f"rank {rank()}: {type(error).__name__}: {error}")
    general.__cause__ = error
    return general


def _can_be_sent(error: Exception) -> bool:
    """Whether other ranks can make the error again: not if its class needs more arguments than its message."""
    try:
        copy.deepcopy(error)  # This takes an error apart and makes it again in the same way.
    except Exception:
        return False
    return True


def _result(part: Any) -> Any:
    result, error = part
    if error is not None:
        raise error
    return result


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average `.grad` over ranks, as DDP does in its backward pass; the same parameters must have one on all ranks."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    waiting = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
    for handle, gradient in zip(waiting, gradients, strict=True):
        handle.wait()
        gradient /= world_size()
