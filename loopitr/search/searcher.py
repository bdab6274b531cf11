"""`Searcher`: the best images of an index for a text or an image, in two stages."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from loopitr.checks import check_at_least
from loopitr.data import UnreadableImage, decode_image
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.scoring import reranking_score

from .contents import Contents
from .inputs import is_text
from .lance import Found
from .manifest import Manifest, check_model, read_manifest, read_skipped
from .match_scores import match_scores
from .retriever import Retriever
from .stores import ImageStore, open_images


@dataclass(frozen=True, kw_only=True)
class Hit:
    """An image that was found.

    path: of its file; of an image from a `datasets` source, its name there.
    similarity: dot product of its embed with the query's.
    match: match score of image and text; None where the fusion head was not asked.
    score: what hits are ordered by: the reranking score, and the similarity where there is no match score.
    columns: size in bytes, mtime, width, height in pixels, and what else was indexed, such as the caption.
    """

    path: str
    similarity: float
    match: float | None
    score: float
    columns: dict[str, Any]


class Searcher:
    """Searches an index that `build_index` or `loopitr search index` has made.

    The dual head finds candidates by their vectors; of a text, the fusion head scores them again. Kept image tokens
    make that possible without opening an image. What is added or removed meanwhile is seen by the next
    search.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from loopitr import Retriever, Searcher, build_index, build_model
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> folder = tempfile.TemporaryDirectory()
        >>> photos, index, run = (Path(folder.name) / name for name in ("photos", "index", "run"))
        >>> photos.mkdir()
        >>> for colour in ("red", "blue", "green"):
        ...     Image.new("RGB", (40, 30), colour).save(photos / f"{colour}.jpg")
        >>> for part in build_model(options, vocabulary=["a", "dog", "red", "card"]):  # in the place of training
        ...     _ = part.save_pretrained(run)
        >>> build_index(photos, run, index, device="cpu", num_workers=0, show_progress=False).added
        3
        >>> searcher = Searcher.open(index, device="cpu")
        >>> hits = searcher.search("a red card", top=2, where="width >= 40")
        >>> len(hits), hits[0].columns["height"], hits[0].score >= hits[1].score
        (2, 30, True)
        >>> Path(searcher.search(photos / "blue.jpg")[0].path).name
        'blue.jpg'
    """

    def __init__(
        self, retriever: Retriever, images: ImageStore, contents: Contents, folder: Path, manifest: Manifest
    ) -> None:
        self.retriever, self.folder, self.manifest = retriever, folder, manifest
        self._images, self._contents = images, contents

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        model: str | Path | Retriever | None = None,
    ) -> Searcher:
        """An index and the model that it was made with.

        Args:
            device: None: a GPU if there is one, else the CPU.
            model: a run folder, hub id or loaded model to search with; None: the one that the index names.

        Raises:
            FileNotFoundError: no index there.
            OSError: the model cannot be loaded.
            ValueError: a damaged index or one of another version, a model that it was not made with, a store that does
                not answer.
            ModuleNotFoundError: the store's package is not installed.
        """
        manifest = read_manifest(folder)
        images = open_images(folder, manifest)
        contents = Contents.open(folder, manifest)
        if not manifest.complete:
            count = len(images)
            warnings.warn(
                f"{folder} is not complete: it has {count} images so far; `loopitr search index` goes on", stacklevel=2
            )
        if not isinstance(model, Retriever):
            model = Retriever.from_pretrained(model or manifest.model, device=device)
        check_model(folder, manifest, model)
        return cls(model, images, contents, Path(folder), manifest)

    def __len__(self) -> int:
        return len(self._images)

    def search(
        self,
        query: str | Path | Image.Image,
        *,
        top: int = 10,
        rerank: int = 100,
        where: str | None = None,
        similarity_weight: float | None = None,
        as_text: bool = False,
    ) -> list[Hit]:
        """The `top` best images, best first; fewer where there are no more.

        Args:
            query: a text, or an image: a path or a PIL image. A str is an image's path where its ending says so (.jpg,
                .png, ...) or where it names a file in a folder.
            rerank: so many candidates of a text are scored by the fusion head; hits that were not follow after those
                that were. 0: by similarity alone, as an image's neighbours always are.
            where: an SQL condition on the columns, such as `"width > 800 AND caption LIKE '%dog%'"`; over Qdrant one of
                those in `loopitr/search/conditions.py`.
            similarity_weight: of the similarity in the reranking score; None: the model's own.
            as_text: a str is a text, whatever it looks like: what strangers type must not open a file.

        Raises:
            ValueError: an empty query, an image that cannot be opened, a number out of range, a condition that is no
                SQL or on a column that is not there.
        """
        check_at_least(1, top=top)
        check_at_least(0, rerank=rerank, similarity_weight=similarity_weight)
        if where is not None and not where.strip():
            raise ValueError("where is empty: give a condition such as 'width > 800', or none")
        vector, text = self._embed(query, as_text=as_text)
        model = self.retriever.model
        reranks = text is not None and rerank > 0 and isinstance(model, LoopITRModel)
        found = self._images.search(vector, max(top, rerank if reranks else 0), where)
        if not reranks or not found:
            return [_hit(image) for image in found[:top]]
        assert text is not None and isinstance(model, LoopITRModel)
        candidates, rest = found[:rerank], found[rerank:]
        match = match_scores(self.retriever, text, candidates, self._contents)
        weight = model.config.similarity_weight if similarity_weight is None else similarity_weight
        scored, unscored = [], [*rest]
        for image, score in zip(candidates, match):
            if score is None:
                unscored.append(image)
                continue
            similarity = torch.tensor(image.similarity, dtype=torch.float64) * model.dual.scale.detach().double().cpu()
            combined = reranking_score(torch.tensor(score, dtype=torch.float64), similarity, weight)
            scored.append(_hit(image, score, float(combined)))
        scored.sort(key=lambda hit: -hit.score)
        unscored.sort(key=lambda image: -image.similarity)
        return [*scored, *map(_hit, unscored)][:top]

    def picture(self, hit: Hit, *, shortest: int | None = None) -> Image.Image:
        """The image of a hit, upright and RGB; with `shortest` as `decode_image` has it.

        Raises:
            UnreadableImage: its file is gone, or cannot be opened any more.
        """
        (found,) = self._images.listed(f"path = '{hit.path.replace(chr(39), chr(39) * 2)}'")[:1] or (None,)
        if found is None:
            raise UnreadableImage(hit.path, "not in the index")
        if found.file:
            import os

            return decode_image(os.fsdecode(found.file), found.path, shortest=shortest)
        kept = self._contents.get([found.id], encoded=True)
        encoded = (kept[found.id].encoded if found.id in kept else None) or b""
        return decode_image(encoded, found.path, shortest=shortest)

    def info(self) -> dict[str, Any]:
        """What the index holds: images, columns, model, tokens, store, and how many images were left out."""
        return index_info(self.folder, self.manifest, self._images)

    def _embed(self, query: Any, *, as_text: bool) -> tuple[Any, str | None]:
        """The vector `[E]` of a query, and the query itself if it is a text."""
        if isinstance(query, str) and not query.strip():
            raise ValueError("the query is empty: give a text, or the path of an image")
        if as_text or is_text(query):
            return self.retriever.encode_texts(query, show_progress=False), query
        return self.retriever.encode_images(query, show_progress=False), None


def index_info(folder: str | Path, manifest: Manifest, images: ImageStore) -> dict[str, Any]:
    """See `Searcher.info`; no model is needed for it."""
    return {
        "images": len(images),
        "complete": manifest.complete,
        "skipped": len(read_skipped(folder)),
        "columns": images.columns(),
        "vector_index": images.vector_index(),
        "model": manifest.model,
        "model_hash": manifest.model_hash,
        "embed_dim": manifest.embed_dim,
        "tokens": manifest.tokens,
        "store": manifest.store or "lance",
        "format": manifest.format,
    }


def _hit(image: Found, match: float | None = None, score: float | None = None) -> Hit:
    return Hit(
        path=image.path,
        similarity=image.similarity,
        match=match,
        score=image.similarity if score is None else score,
        columns=image.columns,
    )
