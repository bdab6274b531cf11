"""A cache of image tokens of a frozen backbone, computed once, and memory-mapped in half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .cache_folder import (
    build_once,
    check_key,
    check_space,
    damaged,
    expect_intact,
    images_digest,
    none_readable,
    read_images,
    read_meta,
    stored_digest,
)
from .records import DataError, Record, name_of

Encode = Callable[[Tensor], Tensor]  # [B, 3, H, W] -> [B, N, D]
FP16_MAX = float(torch.finfo(torch.float16).max)


class TokenCache:
    """`cache[i]` is the float16 tokens `[N, D]` of record i; `unreadable` has the indices of records without any."""

    def __init__(self, folder: str | Path) -> None:
        """Open a finished cache. Each process maps the file on first use, so it can be passed to DataLoader workers.

        Raises:
            DataError: the folder is not a token cache, or is damaged.
        """
        self.folder = Path(folder)
        with expect_intact(self.folder, "not a token cache"):
            meta = read_meta(self.folder)
            self.key: str = meta["key"]
            self.images_digest = stored_digest(meta)
            self.shape: tuple[int, int, int] = tuple(meta["shape"])
            self.unreadable: frozenset[int] = frozenset(meta["unreadable"])
        self._array: np.ndarray | None = None
        tokens = self._tokens()
        if tokens.shape != self.shape or tokens.dtype != np.float16:
            problem = f"tokens.npy is {tokens.dtype} {tokens.shape}, not float16 {self.shape} as in meta.json"
            raise damaged(self.folder, problem)

    @classmethod
    def open_or_build(
        cls,
        folder: str | Path,
        *,
        key: str,
        records: Sequence[Record],
        transform: Callable[[Image.Image], Tensor],
        encode: Encode,
        batch_size: int = 64,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        progress: bool = True,
        seed: int | None = None,
        shortest: int | None = None,
    ) -> TokenCache:
        """Open `folder/<key[:16]>-<images digest[:8]>`, building it first if it is not there.

        `key` is the caller's digest of everything but the images that decides the tokens: backbone weights, transform.
        Images are identified by name, path and size of the file in bytes, or by the pixels of a PIL image, so a
        replaced image makes another cache. `build_once` says what happens to interrupted and concurrent builds. A
        random `transform` needs a `seed`; `shortest` is passed to `decode_image`.
        """
        check_key(key)
        digest = images_digest(records)
        target = Path(folder) / f"{key[:16]}-{digest[:8]}"

        def build(temporary: Path) -> dict[str, Any]:
            images = read_images(
                records, transform, batch_size=batch_size, num_workers=num_workers, shortest=shortest, seed=seed
            )
            shape, unreadable = _build(temporary, records, images, encode, device, progress)
            return {"key": key, "images_digest": digest, "shape": shape, "unreadable": unreadable}

        build_once(target, build)
        cache = cls(target)
        if cache.key != key or cache.images_digest != digest:
            raise DataError(f"{target}: made for another backbone, transform or set of images; delete it")
        return cache

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(np.array(self._tokens()[index]))  # [N, D], a copy, since the map is read-only

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    def _tokens(self) -> np.ndarray:
        if self._array is None:
            with expect_intact(self.folder, "cannot map tokens.npy"):
                self._array = np.load(self.folder / "tokens.npy", mmap_mode="r", allow_pickle=False)
        return self._array


def _build(
    folder: Path,
    records: Sequence[Record],
    images: Iterable[list[tuple[int, Tensor | str]]],
    encode: Encode,
    device: str | torch.device,
    progress: bool,
) -> tuple[tuple[int, int, int], list[int]]:
    """Write the tokens; returns their shape `[R, N, D]` and the indices of unreadable records."""
    array: np.ndarray | None = None
    unreadable = []
    for batch in tqdm(images, desc="image tokens", disable=not progress):
        good = [(index, pixels) for index, pixels in batch if isinstance(pixels, Tensor)]
        unreadable += [index for index, pixels in batch if not isinstance(pixels, Tensor)]
        if not good:
            continue
        indices = [index for index, _ in good]
        with torch.inference_mode():
            tokens = encode(torch.stack([pixels for _, pixels in good]).to(device)).float().cpu()  # [B, N, D]
        if tokens.ndim != 3 or len(tokens) != len(good):
            raise ValueError(f"encode must return [{len(good)}, N, D], got {list(tokens.shape)}")
        fits = (tokens.abs() <= FP16_MAX).flatten(1).all(dim=1)  # [B], false also for NaN
        if not fits.all():
            name = name_of(records, indices[int((~fits).nonzero()[0])])
            raise DataError(f"{name}: its tokens hold NaN or values beyond float16; this backbone cannot be cached")
        if array is None:
            array = _allocate(folder, (len(records), tokens.shape[1], tokens.shape[2]))
        array[indices] = tokens.half().numpy()
    if array is None:
        raise none_readable(records)
    assert isinstance(array, np.memmap)
    array.flush()
    return (array.shape[0], array.shape[1], array.shape[2]), unreadable


def _allocate(folder: Path, shape: tuple[int, int, int]) -> np.ndarray:
    # Without this check, a write to the map would kill the process silently when the disk is full.
    check_space(folder, 2 * int(np.prod(shape)), "caching tokens")
    return np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=np.float16, shape=shape)
