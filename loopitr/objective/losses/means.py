"""Masked means, and the input checks that the losses share."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision converted to float32; float32 and float64 are returned as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def lowest(x: Tensor) -> float:
    """The lowest finite number, used for -inf: its exponential is 0 too, but its differences are not NaN."""
    return torch.finfo(x.dtype).min


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """The mean of `values` where `mask`, of the same shape, is true; zero, attached to the graph, if it never is."""
    # Clamping the count avoids `if mask.any()`, for which the host would wait for the device.
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def mean_of_row_means(values: Tensor, mask: Tensor) -> Tensor:
    """`[Q, C]` -> scalar: the mean of each row over `mask`, then the mean over the rows in which it is ever true."""
    rows = torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)  # [Q]
    return masked_mean(rows, mask.any(-1))


def check_same_shape(**tensors: Tensor) -> None:
    """Raise a ValueError unless all have one shape `[Q, C]`, and those named valid, hard or positives* are bool."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 2 for shape in shapes.values()):
        raise ValueError(f"expected tensors of one shape [Q, C], got {shapes}")
    for name, tensor in tensors.items():
        if name.startswith(("valid", "hard", "positives")) and tensor.dtype != torch.bool:
            raise ValueError(f"expected {name} to be a bool mask, got {tensor.dtype}")


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"expected {name} > 0, got {value}")
