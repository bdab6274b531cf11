"""Writes to an index: images are encoded in batches and written in larger blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopitr.evaluation.gallery import evaluation_transform
from loopitr.memory import keep_memory
from loopitr.models.packing import send

from .contents import Contents
from .encoding import dual_of
from .lance import Row
from .manifest import Manifest, read_skipped, write_manifest, write_skipped
from .opening import Opened, opened
from .retriever import Retriever
from .sources import Source
from .stores import open_images

COMMIT_IMAGES, COMMIT_BYTES = 1024, 2**26  # The size of a block; a killed process loses at most one or two.


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """The number of images `added`, `updated` (because they had changed) and `unchanged`, and the `skipped`: path ->
    reason."""

    added: int
    updated: int
    unchanged: int
    skipped: dict[str, str]
    seconds: float

    def summary(self) -> str:
        """The report in one line."""
        done = self.added + self.updated
        rate = f", {done / self.seconds:.1f} images/s" if done else ""
        parts = f"{self.added} added, {self.updated} updated, {self.unchanged} unchanged, {len(self.skipped)} skipped"
        return f"{parts} in {self.seconds:.0f} s{rate}"


class Writer:
    """Encodes images and writes them to an index; only one may do so at a time (`manifest.writing`)."""

    def __init__(self, folder: Path, manifest: Manifest, retriever: Retriever) -> None:
        self.folder, self.manifest, self.retriever = folder, manifest, retriever
        self.images = open_images(folder, manifest, create=True)
        self.contents = Contents.open(folder, manifest, create=True)
        self.known = self.images.stamps()
        self.contents.delete([*{*self.contents.ids()} - self.known.keys()])  # A killed process may have left some.

    def index(self, source: Source, batch_size: int, num_workers: int | None, progress: bool) -> IndexReport:
        started = time.perf_counter()
        todo: dict[int, int] = {}  # id -> position, so that an image that occurs twice is indexed once
        ids = [source.id(position) for position in range(len(source))]
        for position, own in enumerate(ids):
            if self.known.get(own) != source.stamp(position):
                todo.setdefault(own, position)
        self.contents.check_room(len(todo))
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
            unchanged=len({*ids}) - len(todo),
            skipped=skipped,
            seconds=time.perf_counter() - started,
        )

    @torch.inference_mode()
    def _encode(
        self, source: Source, positions: list[int], batch_size: int, num_workers: int | None, progress: bool
    ) -> Iterator[tuple[str, str]]:
        """Index the images at these positions; yields (path, reason) of those that are unreadable."""
        if self.retriever.device.type == "cpu":
            keep_memory()
        transform = evaluation_transform(self.retriever.processor)
        batches = opened(source, positions, transform, batch_size=batch_size, num_workers=num_workers)
        waiting: list[tuple[list[Row], Tensor | None, list[bytes | None]]] = []
        size = 0
        writer: Future[None] | None = None
        with (
            ThreadPoolExecutor(1) as pool,
            tqdm(total=len(positions), desc="index", unit=" images", disable=not progress, smoothing=0.05) as bar,
        ):
            for batch in batches:
                yield from ((source.name(position), reason) for position, reason in batch.failed)
                if batch.positions:
                    rows, tokens, encoded = self._encoded(source, batch)
                    waiting.append((rows, tokens, encoded))
                    size += (0 if tokens is None else tokens.nbytes) + sum(map(len, filter(None, encoded)))
                bar.update(len(batch.positions) + len(batch.failed))
                if size > COMMIT_BYTES or sum(len(rows) for rows, _, _ in waiting) >= COMMIT_IMAGES:
                    if writer is not None:
                        writer.result()  # A block is written while the next one is computed.
                    writer, waiting, size = pool.submit(self._write, waiting), [], 0
            if writer is not None:
                writer.result()
            self._write(waiting)

    def _encoded(self, source: Source, batch: Opened) -> tuple[list[Row], Tensor | None, list[bytes | None]]:
        dual = dual_of(self.retriever.model)
        (pixels,) = send([batch.pixels], self.retriever.device)
        tokens = dual.vision(pixels.to(next(dual.parameters()).dtype))  # [b, N, D]
        embeds = dual.embed_image_tokens(tokens).float().cpu()  # [b, E]
        if not embeds.isfinite().all():
            raise ValueError("the model gives NaN or infinite values: it cannot be used")
        rows = [
            Row(
                id=source.id(position),
                file=source.file(position),
                path=source.name(position),
                stamp=source.stamp(position),
                width=width,
                height=height,
                columns=source.columns(position),
                embed=embed.numpy(),
            )
            for position, (width, height), embed in zip(batch.positions, batch.sizes, embeds)
        ]
        encoded = [None if row.file else _bytes(source.image(p)) for row, p in zip(rows, batch.positions)]
        return rows, self._kept(tokens, rows), encoded

    def _kept(self, tokens: Tensor, rows: Sequence[Row]) -> Tensor | None:
        """The tokens in the type in which they are stored, on the CPU; None: they are not stored."""
        if self.contents.dtype is None:
            return None
        kept = tokens.to(self.contents.dtype)
        finite = kept.isfinite().flatten(1).all(1)
        if not finite.all():
            bad = rows[int((~finite).nonzero()[0])].path
            raise ValueError(f"{bad}: its tokens hold values beyond {self.manifest.tokens}; keep them in bf16 or none")
        return kept.cpu()

    def _write(self, waiting: list[tuple[list[Row], Tensor | None, list[bytes | None]]]) -> None:
        """Write contents first, so that every image that a search finds has its contents."""
        if not waiting:
            return
        rows = [row for own, _, _ in waiting for row in own]
        kept = [tokens for _, tokens, _ in waiting if tokens is not None]
        encoded = [one for _, _, own in waiting for one in own]
        replaced = [row.id for row in rows if row.id in self.known]
        self.contents.put([row.id for row in rows], torch.cat(kept) if kept else None, encoded, replaced)
        self.images.put(rows, replaced)


def _bytes(image: str | bytes) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()
