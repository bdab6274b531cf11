"""`Retriever`: a trained model with an interface like that of sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopitr.building.folders import load
from loopitr.building.publishing import push_to_hub, save_with_card
from loopitr.checks import check_whole
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor

from .cross_encoding import ReportedMetrics, shows_progress
from .encoding import Batching, dual_of, encode_images, encode_texts, score_all, score_pairs
from .inputs import floating_type, given_images, given_pairs, given_texts, is_one, is_text, kind_of, listed, products_of
from .quantisation import VectorForm


class Retriever:
    """Encodes, compares, scores and ranks images and texts.

    An image is a path, the bytes of a file, a PIL image or an array, and is opened as in training: upright, 8-bit RGB,
    transparency on white. Texts are cut to the length that the model takes, and a warning counts those that were
    longer. Images are opened in batches, so pass paths if there are many. Results are in the order of the inputs and do
    not depend on the batch size.

    The score of `predict` and `rank` is the reranking score, match score + w x similarity / temperature, with the
    weight w in the model's config (`loopitr calibrate` fits it). A `DualEncoder` has no match score: it encodes,
    compares, and ranks by similarity.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from loopitr import Retriever, build_model
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:  # This takes the place of a run folder.
        ...     for part in build_model(options, vocabulary=["a", "dog", "red", "card"]):
        ...         _ = part.save_pretrained(folder)
        ...     retriever = Retriever.from_pretrained(folder, device="cpu")
        >>> pictures = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "green")]
        >>> images = retriever.encode_images(pictures)
        >>> texts = retriever.encode_texts(["a red card", "a dog"])
        >>> retriever.similarity(texts, images).shape
        torch.Size([2, 3])
        >>> retriever.predict([("a red card", pictures[0]), ("a dog", pictures[0])]).shape
        (2,)
        >>> ranking = retriever.rank("a red card", pictures, top_k=2)
        >>> len(ranking), sorted(ranking[0])
        (2, ['corpus_id', 'score'])
    """

    def __init__(
        self, model: LoopITRModel | DualEncoder, processor: LoopITRProcessor, *, source: str | Path | None = None
    ) -> None:
        """`model` is set to eval mode; `source` is the folder or hub id that it comes from, for its card."""
        self.model, self.processor, self.source = model.eval(), processor, source
        self.model_card_data = ReportedMetrics()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Retriever:
        """The model of a run folder, an exported dual encoder, or a hub id.

        Args:
            device: None: a GPU if there is one, else the CPU.
            dtype: the type of the weights, such as `torch.bfloat16` or its name; None: as saved.

        Raises:
            OSError: there is no model, a file is damaged, or the hub cannot be reached or does not know the id.
            ValueError: the model is of another kind, or the device or type cannot be used.
        """
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        model, processor = load(path, device=device, dtype=floating_type(dtype))
        return cls(model, processor, source=path)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Save model, processor and card, for `from_pretrained`; a README.md that a user wrote stays.

        Raises:
            OSError: the folder cannot be written to.
        """
        save_with_card(self.model, self.processor, folder, source=self.source)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, revision: str | None = None
    ) -> str:
        """Upload model, processor and card to the hub; returns the URL of the commit.

        Args:
            repo_id: `NAME` or `OWNER/NAME`; created if it does not exist.
            private: whether a new repository is private; None: the owner's default.
            token: None: that of the logged-in user.
            revision: an existing branch; None: main.

        Raises:
            ValueError: `repo_id` is not the name of a repository.
            OSError: the hub cannot be reached, or refuses.
        """
        return push_to_hub(
            *(self.model, self.processor, repo_id), source=self.source, private=private, token=token, revision=revision
        )

    # Vectors

    def encode_images(
        self,
        images: Any,
        batch_size: int = 64,
        *,
        show_progress: bool = True,
        num_workers: int = 0,
        convert_to_tensor: bool = False,
        truncate_dim: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
    ) -> np.ndarray | Tensor:
        """Unit vectors `[n, E]` of a list of images, or `[E]` of one image.

        Args:
            images: a list, or one image.
            batch_size: the number of images whose pixels and tokens are in memory at a time.
            show_progress: show a progress bar if there is more than one batch.
            num_workers: the number of processes that open images given as paths or bytes; 0: threads of this one.
            convert_to_tensor: return a tensor on the CPU instead of an array.
            truncate_dim: cut vectors to this length and normalise them again (`objective.matryoshka_dims` trains this).
            precision: float32, int8 (one byte per dimension) or binary (one bit), with the same values as
                sentence-transformers' `quantize_embeddings`; see `loopitr/search/quantisation.py`.
            ranges: for int8, the least and the greatest value of each dimension, `[2, E]`; None: those of the vectors
                of this call. Only vectors with the same ranges can be compared.

        Raises:
            ValueError: an item is not an image or cannot be opened (the error has its path or position), or an option
                is out of range.
        """
        batching = Batching(batch_size=batch_size, num_workers=num_workers, progress=show_progress)
        given, alone = given_images(images)
        form = self._form(len(given), truncate_dim, precision, ranges)
        embeds = encode_images(self.model, self.processor, given, batching)
        return _output(form.of(embeds.numpy()), alone=alone, convert_to_tensor=convert_to_tensor)

    def encode_texts(
        self,
        texts: Any,
        batch_size: int = 64,
        *,
        show_progress: bool = True,
        convert_to_tensor: bool = False,
        truncate_dim: int | None = None,
        precision: str = "float32",
        ranges: np.ndarray | None = None,
    ) -> np.ndarray | Tensor:
        """Unit vectors `[n, E]` of a list of texts, or `[E]` of one text; options as in `encode_images`.

        Raises:
            ValueError: an item is not a text or is blank (the error has its position), or an option is out of range.
        """
        batching = Batching(batch_size=batch_size, progress=show_progress)
        given, alone = given_texts(texts)
        form = self._form(len(given), truncate_dim, precision, ranges)
        embeds = encode_texts(self.model, self.processor, given, batching)
        return _output(form.of(embeds.numpy()), alone=alone, convert_to_tensor=convert_to_tensor)

    def similarity(self, a: Any, b: Any) -> Tensor:
        """Dot products `[n, m]` of vectors `[n, E]` and `[m, E]`, float32 on the CPU; a vector `[E]` counts as one row.

        Raises:
            ValueError: the vectors are quantised or no numbers, differ in width, or are too many for the memory.
        """
        return products_of(a, b)

    # Scores

    def predict(
        self,
        pairs: Any,
        batch_size: int = 32,
        *,
        show_progress: bool = True,
        num_workers: int = 0,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        prompt_name: str | None = None,
    ) -> np.ndarray | Tensor:
        """Reranking scores `[P]` (float64) of (text, image) pairs, or the score of one pair.

        An image that occurs in several pairs, as the same object or path, is opened and encoded once. The last three
        arguments are those of a `CrossEncoder`, so that sentence-transformers' `CrossEncoderRerankingEvaluator` can be
        called with a `Retriever`.

        Args:
            pairs: a list of (text, image), or one pair; (image, text) is possible too if the image is not a str.
            batch_size: the number of images whose tokens, keys and values are in memory at a time.
            show_progress_bar: takes precedence over `show_progress`.
            convert_to_numpy: False is the same as `convert_to_tensor`.
            prompt_name: must be None, since there are no prompts.

        Raises:
            ValueError: the model is only a dual encoder, an item is not a pair of a text and an image, or an image
                cannot be opened; the error has its path or position.
        """
        if not isinstance(self.model, LoopITRModel):
            kind = type(self.model).__name__
            raise ValueError(f"a {kind} has no fusion head to predict with; rank and similarity use its vectors")
        if prompt_name is not None:
            raise ValueError(f"there are no prompts: prompt_name must be None, got {prompt_name!r}")
        progress = shows_progress(show_progress, show_progress_bar)
        batching = Batching(batch_size=batch_size, num_workers=num_workers, progress=progress)
        given = given_pairs(pairs)
        rows = torch.tensor(given.pairs, dtype=torch.int64).view(-1, 2)  # [P, 2]
        scores = score_pairs(self.model, self.processor, given.images, given.texts, rows, batching)
        tensor = convert_to_tensor or not convert_to_numpy
        return _output(scores.numpy(), alone=given.alone, convert_to_tensor=tensor)

    def rank(
        self,
        query: Any,
        candidates: Any,
        top_k: int | None = 10,
        return_documents: bool = False,
        *,
        batch_size: int = 32,
        show_progress: bool = True,
        num_workers: int = 0,
        show_progress_bar: bool | None = None,
    ) -> list[dict[str, Any]]:
        """The `top_k` best candidates, best first, as `{"corpus_id": position, "score": score}`.

        Images for a text, and texts for an image, are ranked by the reranking score (with a dual encoder: by
        similarity); images for an image are ranked by similarity. A str is the path of an image if it has the suffix of
        an image file (.jpg, .png, ...) or is the path of an existing file in a folder, or if it is a candidate for a
        text; a `Path` always is.

        Args:
            query: one text or one image.
            candidates: a list of images, or of texts.
            top_k: the number of results; None: all.
            return_documents: also return each candidate itself, as `text` or `image`.
            batch_size: the number of images whose tokens, keys and values are in memory at a time.
            show_progress_bar: takes precedence over `show_progress`.

        Raises:
            ValueError: the query is a list, the candidates are both texts and images, or one of them is not valid.
        """
        check_whole(1, unset=True, top_k=top_k)
        progress = shows_progress(show_progress, show_progress_bar)
        batching = Batching(batch_size=batch_size, num_workers=num_workers, progress=progress)
        parts = (self.model, self.processor)
        if is_text(query):
            images, _ = given_images(candidates)
            documents, kind = list(images.images), "image"
            scores = score_all(*parts, images, given_texts(query)[0], batching)
        else:
            image, alone = given_images(query)
            if not alone:
                raise ValueError(f"the query must be one text or one image, got {type(query).__name__}")
            documents = [candidates] if is_one(candidates) else listed(candidates, "candidates", "texts or images")
            kind = kind_of(documents)
            if kind == "text":
                scores = score_all(*parts, image, given_texts(documents)[0], batching)
            else:
                own, others = (encode_images(*parts, x, batching) for x in (image, given_images(documents)[0]))
                scores = (others @ own[0]).double()
        best = torch.argsort(scores, descending=True, stable=True)[:top_k].tolist()
        ranking: list[dict[str, Any]] = [{"corpus_id": place, "score": float(scores[place])} for place in best]
        if return_documents:
            ranking = [{**entry, kind: documents[entry["corpus_id"]]} for entry in ranking]
        return ranking

    def _form(self, count: int, truncate_dim: int | None, precision: str, ranges: np.ndarray | None) -> VectorForm:
        form = VectorForm(truncate_dim=truncate_dim, precision=precision, ranges=ranges)
        form.check(count, dual_of(self.model).config.embed_dim)
        return form


def _output(values: np.ndarray, *, alone: bool, convert_to_tensor: bool) -> Any:
    result = torch.from_numpy(values.copy()) if convert_to_tensor else values
    return result[0] if alone else result
