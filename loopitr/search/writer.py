"""Writes to an index: images are encoded in batches and written in larger blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopitr.evaluation.gallery import evaluation_transform
from loopitr.evaluation.side_by_side import Shares
from loopitr.memory import keep_memory
from loopitr.models.folding import folded
from loopitr.models.image_backbone import VisionBackbone
from loopitr.models.packing import send

from .contents import Contents
from .encoding import dual_of
from .lance import Row
from .manifest import Manifest, read_skipped, write_manifest, write_skipped
from .opening import Opened, opened_and_encoded
from .retriever import Retriever
from .sources import RESERVED, Source
from .stores import open_images

COMMIT_IMAGES, COMMIT_BYTES = 1024, 2**26  # The size of a block; a killed process loses at most one or two.


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """The number of images `added`, `updated` (because they had changed), `described` (only their columns had changed)
    and `unchanged`, and the `skipped`: path -> reason."""

    added: int
    updated: int
    unchanged: int
    skipped: dict[str, str]
    seconds: float
    described: int = 0

    def summary(self) -> str:
        """The report in one line."""
        done = self.added + self.updated
        rate = f", {done / self.seconds:.1f} images/s" if done else ""
        described = f"{self.described} with other columns, " if self.described else ""
        parts = f"{self.added} added, {self.updated} updated, {described}{self.unchanged} unchanged"
        return f"{parts}, {len(self.skipped)} skipped in {self.seconds:.0f} s{rate}"


@dataclass(frozen=True)
class _Written:
    """What is to be written of a few images: `rows`, `tokens [b, N, D]`, and the bytes of images that are no files."""

    rows: list[Row]
    tokens: Tensor | None
    encoded: list[bytes | None]

    @property
    def nbytes(self) -> int:
        return (0 if self.tokens is None else self.tokens.nbytes) + sum(map(len, filter(None, self.encoded)))


class Writer:
    """Encodes images and writes them to an index; only one may do so at a time (`manifest.writing`)."""

    def __init__(self, folder: Path, manifest: Manifest, retriever: Retriever) -> None:
        self.folder, self.manifest, self.retriever = folder, manifest, retriever
        self.images = open_images(folder, manifest, create=True)
        self.contents = Contents.open(folder, manifest, create=True)
        self.known = self.images.stamps()
        self.old_columns: dict[int, dict[str, Any]] = {}
        held = {*self.contents.ids()}
        self.contents.delete([*held - self.known.keys()])  # A killed process may have left some.
        self.bare = {*self.known} - held if self.contents.dtype is not None else set[int]()

    def index(self, source: Source, batch_size: int, num_workers: int | None, progress: bool) -> IndexReport:
        started = time.perf_counter()
        todo: dict[int, int] = {}  # id -> position, so that an image that occurs twice is indexed once
        ids = [source.id(position) for position in range(len(source))]
        for position, own in enumerate(ids):
            if self.known.get(own) != source.stamp(position) or own in self.bare:
                todo.setdefault(own, position)
        self.old_columns = self._old_columns(source, todo)
        described = self._described(source, ids, todo)
        self.images.check(chain((self._columns(source, position) for position in todo.values()), described.values()))
        self.contents.check_room(len(todo))
        self.manifest = replace(self.manifest, complete=False)
        write_manifest(self.folder, self.manifest)
        self.images.describe(described)
        skipped = dict(source.skipped)
        for path, reason in self._encode(source, [*todo.values()], batch_size, num_workers, progress):
            skipped[path] = reason
        self.images.finish()
        self.contents.finish()
        done = [own for own, position in todo.items() if source.name(position) not in skipped]
        indexed = {source.name(position) for position in range(len(source))} - skipped.keys()
        earlier = {path: why for path, why in read_skipped(self.folder).items() if path not in indexed}
        write_skipped(self.folder, {**earlier, **skipped})
        write_manifest(self.folder, replace(self.manifest, complete=True))
        updated = sum(own in self.known for own in done)
        return IndexReport(
            added=len(done) - updated,
            updated=updated,
            unchanged=len({*ids}) - len(todo) - len(described),
            described=len(described),
            skipped=skipped,
            seconds=time.perf_counter() - started,
        )

    def _old_columns(self, source: Source, todo: Mapping[int, int]) -> dict[int, dict[str, Any]]:
        """What the index has in the columns of a source, by id; empty if no image can have it already."""
        if not self.known or not (source.columns(0) or self.known.keys() & todo.keys()):
            return {}
        return {
            found.id: {name: value for name, value in found.columns.items() if name not in RESERVED}
            for found in self.images.listed()
        }

    def _described(self, source: Source, ids: Sequence[int], todo: Mapping[int, int]) -> dict[int, dict[str, Any]]:
        """The columns of images whose files have not changed, but whose columns have: id -> columns."""
        described: dict[int, dict[str, Any]] = {}
        for position, own in enumerate(ids):
            if own in todo or own in described:
                continue
            old = self.old_columns.get(own, {})
            columns = self._columns(source, position)
            if any(value != old.get(name) and str(value) != old.get(name) for name, value in columns.items()):
                described[own] = columns
        return described

    def _columns(self, source: Source, position: int) -> dict[str, Any]:
        """The columns of an image; what is not a number becomes None, since it would count as larger than any."""
        given = source.columns(position)
        return {name: None if isinstance(value, float) and value != value else value for name, value in given.items()}

    @torch.inference_mode()
    def _encode(
        self, source: Source, positions: list[int], batch_size: int, num_workers: int | None, progress: bool
    ) -> Iterator[tuple[str, str]]:
        """Index the images at these positions; yields (path, reason) of those that are unreadable."""
        if self.retriever.device.type == "cpu":
            keep_memory()
        transform = evaluation_transform(self.retriever.processor)
        vision = folded(dual_of(self.retriever.model).vision, len(positions))
        encode = partial(self._encoded, source, vision)
        shares = Shares.of(len(positions), batch_size, vision.image_size, self.retriever.device)
        encoded = opened_and_encoded(source, positions, transform, encode, shares=shares, num_workers=num_workers)
        waiting: list[_Written] = []
        size = 0
        writer: Future[None] | None = None
        with (
            ThreadPoolExecutor(1) as pool,
            tqdm(total=len(positions), desc="index", unit=" images", disable=not progress, smoothing=0.05) as bar,
        ):
            for opened, embeds, tokens in encoded:
                yield from ((source.name(position), reason) for position, reason in opened.failed)
                if opened.positions:
                    waiting.append(self._written(source, opened, embeds, tokens))
                    size += waiting[-1].nbytes
                bar.update(len(opened.positions) + len(opened.failed))
                if size > COMMIT_BYTES or sum(len(own.rows) for own in waiting) >= COMMIT_IMAGES:
                    if writer is not None:
                        writer.result()  # A block is written while the next one is computed.
                    writer, waiting, size = pool.submit(self._write, waiting), [], 0
            if writer is not None:
                writer.result()
            self._write(waiting)

    def _encoded(self, source: Source, vision: VisionBackbone, opened: Opened) -> tuple[Opened, Tensor, Tensor | None]:
        """The opened images without their pixels, their embeds `[b, E]`, and their tokens `[b, N, D]` to store."""
        described = replace(opened, pixels=torch.empty(0))
        if not opened.positions:
            return described, torch.empty(0), None
        dual = dual_of(self.retriever.model)
        (pixels,) = send([opened.pixels], self.retriever.device)
        tokens = vision(pixels.to(next(dual.parameters()).dtype))  # [b, N, D]
        embeds = dual.embed_image_tokens(tokens).float().cpu()  # [b, E]
        if not embeds.isfinite().all():
            raise ValueError("the model gives NaN or infinite values: it cannot be used")
        return described, embeds, self._kept(tokens, [source.name(position) for position in opened.positions])

    def _written(self, source: Source, opened: Opened, embeds: Tensor, tokens: Tensor | None) -> _Written:
        rows = [
            Row(
                id=source.id(position),
                file=source.file(position),
                path=source.name(position),
                stamp=source.stamp(position),
                width=width,
                height=height,
                # A source without captions, such as a folder, does not take away those of an earlier one.
                columns={**self.old_columns.get(source.id(position), {}), **self._columns(source, position)},
                embed=embed.numpy(),
            )
            for position, (width, height), embed in zip(opened.positions, opened.sizes, embeds)
        ]
        encoded = [None if row.file else _bytes(source.image(p)) for row, p in zip(rows, opened.positions)]
        return _Written(rows, tokens, encoded)

    def _kept(self, tokens: Tensor, names: Sequence[str]) -> Tensor | None:
        """The tokens in the type in which they are stored, on the CPU; None: they are not stored."""
        if self.contents.dtype is None:
            return None
        kept = tokens.to(self.contents.dtype)
        finite = kept.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = names[int((~finite).nonzero()[0])]
            raise ValueError(f"{bad}: its tokens hold values beyond {self.manifest.tokens}; keep them in bf16 or none")
        return kept.cpu()

    def _write(self, waiting: list[_Written]) -> None:
        """Write contents first, so that every image that a search finds has its contents."""
        if not waiting:
            return
        rows = [row for own in waiting for row in own.rows]
        kept = [own.tokens for own in waiting if own.tokens is not None]
        encoded = [one for own in waiting for one in own.encoded]
        replaced = [row.id for row in rows if row.id in self.known]
        self.contents.put([row.id for row in rows], torch.cat(kept) if kept else None, encoded, replaced)
        self.images.put(rows, replaced)


def _bytes(image: str | bytes) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()
