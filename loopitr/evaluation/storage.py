"""Storage of tokens between encoding and reranking: in memory, in a memory-mapped file, or none."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from loopitr.data import DataError
from loopitr.models.packing import send

KINDS = ("auto", "memory", "disk", "recompute")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GIB = 2**30


class TokenStore:
    """Tokens `[count, ...]` in one tensor, in memory or mapped from a file; any rows can be read back."""

    def __init__(self, rows: Tensor, name: Callable[[int], str], *, on_disk: bool) -> None:
        """`name` gives the name of the image or caption of a row, for errors."""
        self.rows, self.name, self.on_disk = rows, name, on_disk

    def write(self, index: Tensor, tokens: Tensor) -> None:
        """Store `tokens [n, ...]` as the rows `index [n]` (on the CPU).

        Raises:
            DataError: tokens are NaN, or too large for the type of the storage.
        """
        stored = tokens.to(self.rows.dtype)
        if not stored.isfinite().all():
            bad = int(index[(~stored.isfinite()).flatten(1).any(1).cpu()][0])
            kind = next(name for name, dtype in DTYPES.items() if dtype == stored.dtype)
            raise DataError(f"{self.name(bad)}: its tokens hold NaN or values beyond {kind}; keep them in bf16 or fp32")
        self.rows[index.to(self.rows.device)] = stored.to(self.rows.device)

    def read(self, index: Tensor) -> Tensor:
        """A copy of the rows `index [n]`, in the type and on the device of the storage."""
        return self.rows.index_select(0, *send([index], self.rows.device))  # [n, ...]


@dataclass(frozen=True)
class TokenStorage:
    """Where and how tokens are stored between encoding and reranking.

    Args:
        kind: `memory` (of the model's device); `disk`, a memory-mapped file in `folder`, which is deleted afterwards;
            `recompute`, so that the backbones run again for every block; or `auto`: memory up to `memory` bytes, else
            disk if half of its free space is enough, else recompute.
        dtype: the type in which tokens are stored: fp32, fp16 or bf16.
        memory: for `auto`, the most bytes for image tokens, and as many for caption tokens, on each rank.
        folder: for `disk`; None: the system's folder for temporary files.

    Raises:
        ValueError: `kind` or `dtype` is unknown, or `memory` is below 0.
    """

    kind: str = "auto"
    dtype: str = "fp32"
    memory: int = GIB // 2
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"token_storage must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.memory < 0:
            raise ValueError(f"token_memory must be at least 0, got {self.memory}")
        if self.dtype not in DTYPES:
            raise ValueError(f"token_dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def open(
        self, count: int, *shape: int, device: torch.device, name: Callable[[int], str], may_map: bool = True
    ) -> TokenStore | None:
        """A store for rows `[count, *shape]`; None: they are to be computed again.

        Args:
            name: the name of the image or caption of a row, for errors.
            may_map: False: with `disk`, compute again (or read from a cache) instead of using a file.

        Raises:
            DataError: there is not enough space; nothing has been written.
        """
        size = count * math.prod(shape) * DTYPES[self.dtype].itemsize
        folder = Path(self.folder or tempfile.gettempdir())
        kind = self.kind
        if kind == "auto":
            kind = "memory" if size <= self.memory else "disk"
            if kind == "disk" and (not may_map or 2 * size > _free_disk(folder)):
                kind = "recompute"
        if kind == "recompute" or (kind == "disk" and not may_map):
            return None
        if kind == "disk" and size:
            return TokenStore(_map(folder, size, self.dtype).view(count, *shape), name, on_disk=True)
        if size > (free := _free_memory(device)):
            raise DataError(_no_room("memory", size, free))
        return TokenStore(torch.empty(count, *shape, dtype=DTYPES[self.dtype], device=device), name, on_disk=False)


def _map(folder: Path, size: int, dtype: str) -> Tensor:
    """A flat tensor mapped from a new file of `size` bytes.

    The file's name is deleted before it is used, so that nothing is left in the folder however the process ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=folder, prefix="loopitr-tokens-")  # noqa: SIM115 (closed by `with` below)
    except OSError as error:
        raise DataError(f"token_folder {folder} cannot be written to: {error}") from error
    with file:
        if size > (free := _free_disk(folder)):
            raise DataError(_no_room(str(folder), size, free))
        if hasattr(os, "posix_fallocate"):
            # The space is reserved now, because a write to a map kills the process silently if the disk is full.
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:  # Another process has used the space in the meantime.
                raise DataError(f"{_no_room(str(folder), size, _free_disk(folder))} ({error.strerror})") from error
        return torch.from_file(file.name, shared=True, size=size // DTYPES[dtype].itemsize, dtype=DTYPES[dtype])


def _no_room(where: str, size: int, free: int) -> str:
    return f"{where}: keeping tokens needs {size / GIB:.1f} GiB, {free / GIB:.1f} are free"


def _free_disk(folder: Path) -> int:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
