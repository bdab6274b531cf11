"""A cache of caption tokens of a frozen text backbone, computed once, and memory-mapped in half precision."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .cache_folder import build_once, check_key, check_space, damaged, expect_intact, read_meta
from .records import DataError, Record, captions_of, stable_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EncodeTexts = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # ids, mask [B, L] -> pooled [B, D'], tokens [B, L, D]
FP16_MAX = float(torch.finfo(torch.float16).max)
ARRAYS = ("tokens", "pooled", "ends", "keys")
CAPTIONS_PER_CALL = 4096  # of the tokenizer


@dataclass(frozen=True, kw_only=True)
class CachedTexts:
    """`pooled [B, D']` and `tokens [B, L, D]` in float16; tokens are zero at padding."""

    pooled: Tensor
    tokens: Tensor


class TextTokenCache:
    """The output of a text backbone for all captions of some records, looked up by the text of a caption."""

    def __init__(self, folder: str | Path) -> None:
        """Open a finished cache. Each process maps the files on first use, so it can be passed to DataLoader workers.

        Raises:
            DataError: the folder is not a cache of text tokens, or is damaged.
        """
        self.folder = Path(folder)
        with expect_intact(self.folder, "not a cache of text tokens"):
            meta = read_meta(self.folder)
            self.key: str = meta["key"]
            self.captions_digest: str = meta["captions_digest"]
            self.shapes: dict[str, list[int]] = {name: list(meta["shapes"][name]) for name in ARRAYS}
        self._arrays: dict[str, np.ndarray] | None = None
        for name, array in self._mapped().items():
            if list(array.shape) != self.shapes[name]:
                raise damaged(self.folder, f"{name}.npy is {array.shape}, not {self.shapes[name]} as in meta.json")

    @classmethod
    def open_or_build(
        cls,
        folder: str | Path,
        *,
        key: str,
        records: Sequence[Record],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        encode: EncodeTexts,
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> TextTokenCache:
        """Open `folder/text-<key[:16]>-<captions digest[:8]>`, building it first if it is not there.

        `key` is the caller's digest of everything but the captions that decides the tokens: backbone weights, tokenizer
        and length. Changed captions make another cache. `build_once` says what happens to interrupted and concurrent
        builds.
        """
        check_key(key)
        captions = list(dict.fromkeys(c for i in range(len(records)) for c in captions_of(records, i)))
        digest = _captions_digest(captions)
        target = Path(folder) / f"text-{key[:16]}-{digest[:8]}"

        def build(temporary: Path) -> dict[str, Any]:
            ids = _tokenized(tokenizer, captions, max_length)
            padding = tokenizer.pad_token_id or 0
            shapes = _build(temporary, captions, ids, encode, padding, batch_size, device, progress)
            return {"key": key, "captions_digest": digest, "shapes": shapes}

        build_once(target, build)
        cache = cls(target)
        if cache.key != key or cache.captions_digest != digest:
            raise DataError(f"{target}: made for another backbone, tokenizer or set of captions; delete it")
        return cache

    def __len__(self) -> int:
        """The number of captions."""
        return self.shapes["keys"][0]

    def read(self, captions: Sequence[str], lengths: Sequence[int]) -> CachedTexts:
        """The backbone's output for `captions`; `lengths` are their numbers of tokens.

        Raises:
            DataError: a caption is not in the cache, or has another length there.
        """
        arrays = self._mapped()
        wanted = np.array([stable_hash(caption) for caption in captions], dtype=np.int64)
        rows = np.searchsorted(arrays["keys"], wanted).clip(max=len(self) - 1)  # [B]
        absent = np.flatnonzero(arrays["keys"][rows] != wanted)
        if len(absent):
            raise DataError(f"{self.folder}: caption {captions[int(absent[0])]!r} is not in this cache")
        tokens = torch.zeros(len(captions), max(lengths), self.shapes["tokens"][1], dtype=torch.float16)  # [B, L, D]
        for number, (row, length) in enumerate(zip(rows.tolist(), lengths)):
            start, end = int(arrays["ends"][row - 1]) if row else 0, int(arrays["ends"][row])
            if end - start != length:
                raise DataError(f"{self.folder}: {captions[number]!r} has {end - start} tokens here, not {length}")
            tokens[number, :length] = torch.from_numpy(np.array(arrays["tokens"][start:end]))
        return CachedTexts(pooled=torch.from_numpy(np.array(arrays["pooled"][rows])), tokens=tokens)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}

    def _mapped(self) -> dict[str, np.ndarray]:
        if self._arrays is None:
            with expect_intact(self.folder, "cannot map its arrays"):
                self._arrays = {
                    name: np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS
                }
        return self._arrays


def _captions_digest(captions: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for caption in captions:
        digest.update(caption.encode() + b"\0")
    return digest.hexdigest()


def _tokenized(tokenizer: PreTrainedTokenizerBase, captions: list[str], max_length: int) -> list[list[int]]:
    """Ids of each caption, cut to `max_length`."""
    ids: list[list[int]] = []
    for start in range(0, len(captions), CAPTIONS_PER_CALL):
        part = captions[start : start + CAPTIONS_PER_CALL]
        ids += tokenizer(part, truncation=True, max_length=max_length)["input_ids"]
    return ids


def _build(
    folder: Path,
    captions: list[str],
    ids: list[list[int]],
    encode: EncodeTexts,
    padding: int,
    batch_size: int,
    device: str | torch.device,
    progress: bool,
) -> dict[str, list[int]]:
    """Write the arrays, with captions in the order of their keys; returns the arrays' shapes.

    The arrays are `tokens [sum(lengths), D]`, `pooled [T, D']`, `keys [T]`, and `ends [T]`, the end of each caption's
    rows in `tokens`.
    """
    keys = np.array([stable_hash(caption) for caption in captions], dtype=np.int64)
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    if not len(keys):
        raise DataError("there is no caption whose tokens could be cached")
    if (np.diff(keys) == 0).any():  # For half a million captions, the probability is about 10^-8.
        raise DataError("two captions have the same hash; the text tokens of this data cannot be cached")
    lengths = np.array([len(ids[i]) for i in order])
    ends = lengths.cumsum()
    arrays: dict[str, np.ndarray] = {}
    by_length = np.argsort(lengths, kind="stable")  # Batches of similar lengths need little padding.
    batches = [by_length[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in tqdm(batches, desc="text tokens", disable=not progress):
        rows = [torch.tensor(ids[order[place]]) for place in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)  # [B, L]
        mask = torch.arange(input_ids.shape[1]) < torch.from_numpy(lengths[batch])[:, None]
        with torch.inference_mode():
            pooled, tokens = (x.float().cpu() for x in encode(input_ids.to(device), mask.long().to(device)))
        if tokens.ndim != 3 or tokens.shape[:2] != input_ids.shape or pooled.ndim != 2 or len(pooled) != len(batch):
            shapes = f"{list(pooled.shape)} and {list(tokens.shape)}"
            raise ValueError(f"encode must return [{len(batch)}, D'] and [{len(batch)}, L, D], got {shapes}")
        tokens = tokens * mask[:, :, None]
        fits = (tokens.abs() <= FP16_MAX).flatten(1).all(1) & (pooled.abs() <= FP16_MAX).all(1)  # [B]
        if not fits.all():
            caption = captions[order[batch[int((~fits).nonzero()[0])]]]
            raise DataError(f"{caption!r}: its tokens hold NaN or values beyond float16; they cannot be cached")
        if not arrays:
            sizes = {"tokens": (int(ends[-1]), tokens.shape[2]), "pooled": (len(order), pooled.shape[1])}
            arrays = _allocate(folder, sizes)
        arrays["pooled"][batch] = pooled.half().numpy()
        for place, row in zip(batch, tokens.half().numpy()):
            arrays["tokens"][ends[place] - lengths[place] : ends[place]] = row[: lengths[place]]
    for array in arrays.values():
        assert isinstance(array, np.memmap)
        array.flush()
    np.save(folder / "ends.npy", ends.astype(np.int64), allow_pickle=False)
    np.save(folder / "keys.npy", keys, allow_pickle=False)
    return {"ends": [len(ends)], "keys": [len(keys)]} | {name: list(array.shape) for name, array in arrays.items()}


def _allocate(folder: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    # Without this check, a write to the map would kill the process silently when the disk is full.
    check_space(folder, sum(2 * int(np.prod(shape)) for shape in shapes.values()), "caching text tokens")
    return {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape)
        for name, shape in shapes.items()
    }
