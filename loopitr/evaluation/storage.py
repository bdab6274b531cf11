"""Where tokens wait between encoding and reranking: in memory, in a memory-mapped file, or nowhere."""

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
    """Tokens `[count, ...]` in one flat tensor, in memory or mapped from a file; any rows can be read back."""

    def __init__(self, rows: Tensor, name: Callable[[int], str], *, on_disk: bool) -> None:
        """`name` says whose tokens a row holds."""
        self.rows, self.name, self.on_disk = rows, name, on_disk

    def write(self, index: Tensor, tokens: Tensor) -> None:
        """Keep `tokens [n, ...]` as the rows `index [n]` (on the CPU).

        Raises:
            DataError: NaN, or values too large for the type they are kept in.
        """
        kept = tokens.to(self.rows.dtype)
        if not kept.isfinite().all():
            bad = int(index[(~kept.isfinite()).flatten(1).any(1).cpu()][0])
            kind = next(name for name, dtype in DTYPES.items() if dtype == kept.dtype)
            raise DataError(f"{self.name(bad)}: its tokens hold NaN or values beyond {kind}; keep them in bf16 or fp32")
        self.rows[index.to(self.rows.device)] = kept.to(self.rows.device)

    def read(self, index: Tensor) -> Tensor:
        """The rows `index [n]`, a copy, in the type and on the device that they are kept in."""
        return self.rows.index_select(0, *send([index], self.rows.device))  # [n, ...]


@dataclass(frozen=True)
class TokenStorage:
    """How tokens are kept.

    kind: `memory` (of the model's device), `disk` (in `folder`; None: the system's temporary one), `recompute`, or
    `auto`: memory up to `memory` bytes, else disk if at most half of what is free is needed, else recompute. `disk` is
    a memory-mapped file, of which only the rows in use are read, and which is gone afterwards; with `recompute` the
    backbones run again for every block.
    dtype: fp32, fp16 or bf16, what they are kept in.
    memory: bytes of the images' tokens, and as many of the captions', of each rank.

    Raises:
        ValueError: an unknown kind or dtype, or less than no memory.
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
        """Room for rows `[count, *shape]`; None: they are to be computed again.

        Args:
            may_map: whether a file is of use; if not, `disk` means computing (or reading) again.

        Raises:
            DataError: not enough room, before anything is written.
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
    """`size` bytes of disk as a flat tensor.

    The file has no name any more when it is used: whatever ends the process, nothing is left in the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=folder, prefix="loopitr-tokens-")  # noqa: SIM115 (closed by `with` below)
    except OSError as error:
        raise DataError(f"token_folder {folder} cannot be written to: {error}") from error
    with file:
        if size > (free := _free_disk(folder)):
            raise DataError(_no_room(str(folder), size, free))
        if hasattr(
            os, "posix_fallocate"
        ):  # Writing to a map when the disk is full kills the process without a message.
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:  # another process used the room first
                raise DataError(f"{_no_room(str(folder), size, _free_disk(folder))} ({error.strerror})") from error
        return torch.from_file(file.name, shared=True, size=size // DTYPES[dtype].itemsize, dtype=DTYPES[dtype])


def _no_room(where: str, size: int, free: int) -> str:
    return f"{where}: keeping tokens needs {size / GIB:.1f} GiB, {free / GIB:.1f} are free"


def _free_disk(folder: Path) -> int:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
