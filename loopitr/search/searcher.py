"""`Searcher`: the best images of an index for a text or an image, in two stages."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from loopitr.checks import check_at_least, check_whole
from loopitr.data import UnreadableImage, decode_image
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.scoring import reranking_score
from loopitr.reading import user_path

from .conditions import check_condition
from .contents import Contents
from .inputs import is_one, is_text
from .lance import Found
from .manifest import Manifest, check_model, model_of, read_manifest, read_skipped
from .match_scores import match_scores
from .retriever import Retriever
from .stores import ImageStore, open_images


@dataclass(frozen=True, kw_only=True)
class Hit:
    """An image that a search has found.

    Attributes:
        path: the path of its file; for an image stored in a `datasets` source, its name there.
        similarity: the dot product of its embed and the query's.
        match: the match score of image and text; None: the fusion head did not score it.
        score: the score that hits are ordered by: the reranking score, or the similarity if there is no match score.
        columns: size in bytes, mtime, width and height in pixels, and other indexed columns such as the caption.
    """

    path: str
    similarity: float
    match: float | None
    score: float
    columns: dict[str, Any]


class Searcher:
    """Searches an index made by `build_index` or `loopitr search index`.

    The dual head finds candidates by their vectors, and for a text the fusion head reranks them, from stored image
    tokens or by opening the images. A search sees all images that were added or removed before it.

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
        >>> for part in build_model(options, vocabulary=["a", "dog", "red", "card"]):  # an untrained model
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
        """Open an index and load its model.

        Args:
            device: None: a GPU if there is one, else the CPU.
            model: a run folder, hub id or loaded model to search with; None: the one that the manifest names.

        Raises:
            FileNotFoundError: there is no such index.
            OSError: the model cannot be loaded.
            ValueError: the index is damaged or of another version, it was made with another model, or its store does
                not answer.
            ModuleNotFoundError: the package of its store is not installed.
        """
        folder = user_path(folder)
        manifest = read_manifest(folder)
        images = open_images(folder, manifest)
        contents = Contents.open(folder, manifest)
        if not manifest.complete:
            count = len(images)
            warnings.warn(
                f"{folder} is not complete: it has {count} images so far; continue with `loopitr search index`",
                stacklevel=2,
            )
        if model is None:
            model = model_of(folder, manifest, device)
        elif not isinstance(model, Retriever):
            model = Retriever.from_pretrained(model, device=device)
        check_model(folder, manifest, model)
        return cls(model, images, contents, folder, manifest)

    def __len__(self) -> int:
        return len(self._images)

    @property
    def version(self) -> int:
        """A number that is another one after images were added, changed or removed."""
        return self._images.version()

    @property
    def reranks(self) -> bool:
        """Whether the model has a fusion head."""
        return isinstance(self.retriever.model, LoopITRModel)

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
        """The `top` best images, best first; fewer if there are not as many.

        Args:
            query: a text, or an image as a path or a PIL image. A str is the path of an image if it has the suffix of
                an image file (.jpg, .png, ...) or is the path of an existing file in a folder.
            rerank: the number of candidates for a text that the fusion head scores; other hits come after these. 0:
                rank by similarity alone, as is always done for an image.
            where: an SQL condition on the columns, such as `"width > 800 AND caption LIKE '%dog%'"`; for an index on
                Qdrant, see `loopitr/search/conditions.py`.
            similarity_weight: the weight in the reranking score; None: the model's own.
            as_text: take a str for a text even if it looks like a path, so that strangers cannot open files.

        Raises:
            ValueError: the query is empty or an image that cannot be opened, a number is out of range, or the condition
                is not valid.
        """
        check_whole(1, top=top)
        check_whole(0, rerank=rerank)
        check_at_least(0, similarity_weight=similarity_weight)
        if where is not None:
            check_condition(where)
        vector, text = self._embed(query, as_text=as_text)
        model = self.retriever.model
        reranks = text is not None and rerank > 0 and isinstance(model, LoopITRModel)
        nearest = self._images.search(vector, max(top, rerank if reranks else 0), where)
        if not reranks or not nearest:
            return [_hit(image) for image in nearest[:top]]
        assert text is not None and isinstance(model, LoopITRModel)
        candidates, rest = nearest[:rerank], nearest[rerank:]
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
        """The image of a hit, upright and RGB; `shortest` as in `decode_image`.

        Raises:
            UnreadableImage: its file no longer exists, or cannot be opened.
        """
        found = self._images.listed(f"path = '{hit.path.replace(chr(39), chr(39) * 2)}'")
        # Two files have one path as text if the name of one is the escaped name of the other.
        image = next((image for image in found if image.columns == hit.columns), found[0] if found else None)
        if image is None:
            raise UnreadableImage(hit.path, "not in the index")
        if image.file:
            return decode_image(os.fsdecode(image.file), image.path, shortest=shortest)
        contents = self._contents.get([image.id], encoded=True)
        encoded = (contents[image.id].encoded if image.id in contents else None) or b""
        return decode_image(encoded, image.path, shortest=shortest)

    def info(self) -> dict[str, Any]:
        """Facts on the index: images, columns, model, tokens, store, and the number of skipped images."""
        return index_info(self.folder, self.manifest, self._images)

    def _embed(self, query: Any, *, as_text: bool) -> tuple[Any, str | None]:
        """The vector `[E]` of a query, and the query itself if it is a text."""
        if isinstance(query, str) and not query.strip():
            raise ValueError("the query is empty: give a text, or the path of an image")
        if not is_one(query):
            raise ValueError(f"the query must be one text or one image, got {type(query).__name__}")
        if as_text or is_text(query):
            return self.retriever.encode_texts(query, show_progress=False), query
        return self.retriever.encode_images(query, show_progress=False), None


def index_info(folder: str | Path, manifest: Manifest, images: ImageStore) -> dict[str, Any]:
    """See `Searcher.info`; this needs no model."""
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
        "contents": manifest.contents,
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
