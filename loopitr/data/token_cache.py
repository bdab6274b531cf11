"""Image tokens of a frozen backbone, computed once and memory-mapped in half precision."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .images import UnreadableImage, decode_image
from .records import DataError, LazyRecords, Record, name_of

Encode = Callable[[Tensor], Tensor]  # [B, 3, H, W] -> [B, N, D]
FP16_MAX = float(torch.finfo(torch.float16).max)


class TokenCache:
    """`cache[i]` is the float16 tokens [N, D] of record i; `unreadable` holds the records that have none."""

    def __init__(self, folder: str | Path) -> None:
        """Open a finished cache. Each process maps the array on first use, so DataLoader workers may hold it."""
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "meta.json").read_text())
            self.key: str = meta["key"]
            self.names_digest: str = meta["names_digest"]
            self.shape: tuple[int, int, int] = tuple(meta["shape"])
            self.unreadable: frozenset[int] = frozenset(meta["unreadable"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.folder}: not a token cache ({error}); delete it to have it built again") from error
        self._array: np.ndarray | None = None
        if self._tokens().shape != self.shape or self._tokens().dtype != np.float16:
            raise DataError(f"{self.folder}: tokens.npy is {self._tokens().dtype} {self._tokens().shape}, not float16 "
                            f"{self.shape} as in meta.json; delete it to have it built again")

    @classmethod
    def open_or_build(cls, folder: str | Path, *, key: str, records: Sequence[Record],
                      transform: Callable[[Image.Image], Tensor], encode: Encode, batch_size: int = 64,
                      num_workers: int = 0, device: str | torch.device = "cpu", progress: bool = True) -> TokenCache:
        """Open `folder/<key[:16]>-<names digest[:8]>`, building it first if it is not there.

        `key` is the caller's digest of everything that decides the tokens but the images: backbone weights, transform.
        Images are told apart by name and path, not by pixels: delete the folder after editing images in place.
        A build happens in a folder of its own that is renamed when complete; a killed one leaves nothing that is taken
        for a cache, and of two concurrent builders the first to finish wins.
        """
        if not re.fullmatch(r"[\w-]{8,}", key):
            raise ValueError(f"key must be a digest of at least 8 letters, digits, '-' or '_', got {key!r}")
        digest = names_digest(records)
        target = Path(folder) / f"{key[:16]}-{digest[:8]}"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(target)
            temporary = target.parent / f"{_prefix(target)}{os.getpid()}-{uuid.uuid4().hex[:8]}"
            temporary.mkdir()
            try:
                shape, unreadable = _build(temporary, records, transform, encode, batch_size, num_workers, device,
                                           progress)
                meta = {"key": key, "names_digest": digest, "shape": shape, "unreadable": unreadable}
                (temporary / "meta.json").write_text(json.dumps(meta))
                try:
                    temporary.rename(target)
                except OSError:
                    if not target.exists():  # else another process finished first, with the same tokens
                        raise
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        cache = cls(target)
        if cache.key != key or cache.names_digest != digest:
            raise DataError(f"{target}: made for another backbone, transform or set of images; delete it")
        return cache

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self._tokens()[index]))  # [N, D], a copy: the map is read-only

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    def _tokens(self) -> np.ndarray:
        if self._array is None:
            try:
                self._array = np.load(self.folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{self.folder}: cannot map tokens.npy ({error}); delete it to have it built "
                                "again") from error
        return self._array


def names_digest(records: Sequence[Record]) -> str:
    """Digest of which images a sequence holds, in order, without reading any."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(getattr(records, "fingerprint", "").encode())
    for index in range(len(records)):
        digest.update(b"\0" + name_of(records, index).encode())
        if not isinstance(records, LazyRecords) and isinstance(records[index].image, (str, Path)):
            digest.update(b"\1" + str(records[index].image).encode())
    return digest.hexdigest()


class _Images(Dataset[tuple[int, Tensor | None]]):
    def __init__(self, records: Sequence[Record], transform: Callable[[Image.Image], Tensor]) -> None:
        self.records, self.transform = records, transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None]:
        record = self.records[index]
        try:
            return index, self.transform(decode_image(record.image, record.name))
        except UnreadableImage:
            return index, None


def _build(folder: Path, records: Sequence[Record], transform: Callable[[Image.Image], Tensor], encode: Encode,
           batch_size: int, num_workers: int, device: str | torch.device,
           progress: bool) -> tuple[tuple[int, int, int], list[int]]:
    loader = DataLoader(
        _Images(records, transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=list,
        generator=torch.Generator(),  # the global one stays where it is: a run must not depend on a cold cache
    )
    array: np.ndarray | None = None
    unreadable = []
    for batch in tqdm(loader, desc="image tokens", disable=not progress):
        good = [(index, pixels) for index, pixels in batch if pixels is not None]
        unreadable += [index for index, pixels in batch if pixels is None]
        if not good:
            continue
        indices = [index for index, _ in good]
        with torch.inference_mode():
            tokens = encode(torch.stack([pixels for _, pixels in good]).to(device)).float().cpu()  # [B, N, D]
        if tokens.ndim != 3 or len(tokens) != len(good):
            raise ValueError(f"encode must return [{len(good)}, N, D], got {list(tokens.shape)}")
        fits = (tokens.abs() <= FP16_MAX).flatten(1).all(dim=1)  # [B], false for NaN too
        if not fits.all():
            name = name_of(records, indices[int((~fits).nonzero()[0])])
            raise DataError(f"{name}: its tokens hold NaN or values beyond float16; this backbone cannot be cached")
        if array is None:
            array = _allocate(folder, (len(records), tokens.shape[1], tokens.shape[2]))
        array[indices] = tokens.half().numpy()
    if array is None:
        raise DataError(f"none of {len(records)} images is readable, the first is {name_of(records, 0)}")
    assert isinstance(array, np.memmap)
    array.flush()
    return (array.shape[0], array.shape[1], array.shape[2]), unreadable


def _allocate(folder: Path, shape: tuple[int, int, int]) -> np.ndarray:
    size, free = 2 * int(np.prod(shape)), shutil.disk_usage(folder).free
    if size > free:  # writing a map beyond the disk's end kills the process without a word
        raise DataError(f"{folder.parent}: caching tokens needs {size / 2**30:.1f} GiB, {free / 2**30:.1f} are free")
    return np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=np.float16, shape=shape)


def _prefix(target: Path) -> str:
    return f".{target.name}.building-{socket.gethostname()}-"


def _remove_abandoned(target: Path) -> None:
    """Delete what killed builders on this host left behind; they may be gigabytes."""
    for folder in target.parent.glob(f"{_prefix(target)}*"):
        pid = int(folder.name[len(_prefix(target)):].split("-")[0])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:
            pass  # alive, and someone else's
