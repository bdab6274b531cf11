"""A GPU where there is none: tensors that say `cuda` and lie on the CPU, and errors where devices meet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
TAKES_BOTH = {"copy_", "__set__", "_has_compatible_shallow_copy_type", "__getitem__", "__setitem__"}
WAITS = {"item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "unique"}


class PretendGPU(TorchFunctionMode):
    """Tensors moved to or made on `cuda` are remembered as such; so is what comes of them.

    Operations on tensors of both devices raise, as a GPU's would. `waits`: what made the CPU wait for the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Any] = {}  # kept alive: an address must not be used again
        self.waits: list[str] = []

    def has(self, x: Tensor) -> bool:
        return x.untyped_storage()._cdata in self.storages

    def _put(self, out: Any) -> Any:
        for x in tree_iter(out):
            if isinstance(x, Tensor):
                self.storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            return self._attribute(func, args[0])
        if name in ("to", "cpu", "cuda"):
            return self._move(func, name, *args, **kwargs)
        if kwargs.get("device") is not None:
            out = func(*args, **{**kwargs, "device": CPU})
            return self._put(out) if torch.device(kwargs["device"]).type == "cuda" else out
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        there = [self.has(x) for x in tensors]
        mixed = len({on for on, x in zip(there, tensors, strict=True) if x.ndim}) > 1
        if mixed and (name not in TAKES_BOTH or (name == "__getitem__" and not there[0])):
            devices = ", ".join(f"{tuple(x.shape)} on {'cuda' if on else 'cpu'}" for on, x in zip(there, tensors))
            raise RuntimeError(f"{name}: {devices}")
        masks = name == "__getitem__" and any(x.dtype == torch.bool for x in tensors[1:])  # how many rows?
        if any(there) and (name in WAITS or masks):
            self.waits.append(name)
        out = func(*args, **kwargs)
        return self._put(out) if any(there) else out

    def _attribute(self, func: Any, x: Tensor) -> Any:
        name = func.__self__.__name__
        if name == "device" and self.has(x):
            return GPU
        if name in ("is_cuda", "is_cpu"):
            return self.has(x) == (name == "is_cuda")
        out = func(x)
        return self._put(out) if name in ("grad", "data") and self.has(x) and out is not None else out

    def _move(self, func: Any, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        there = target = self.has(x)
        if name != "to":
            target = name == "cuda"
            out = x
        else:
            values = [*args, *kwargs.values()]
            targets = [torch.device(v).type == "cuda" for v in values if isinstance(v, (str, torch.device))]
            targets += [self.has(v) for v in values if isinstance(v, Tensor)]
            target = targets[0] if targets else there
            out = func(
                x,
                *(CPU if isinstance(v, (str, torch.device)) else v for v in args),
                **{key: CPU if isinstance(v, (str, torch.device)) else v for key, v in kwargs.items()},
            )
        if target == there:
            return self._put(out) if there else out
        if there:
            self.waits.append("cpu")
        if out.untyped_storage()._cdata == x.untyped_storage()._cdata:
            out = out.clone()
        return self._put(out) if target else out
