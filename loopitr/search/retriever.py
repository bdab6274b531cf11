"""`Retriever`: a trained model with the calls that people know from sentence-transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopitr.building.folders import load
from loopitr.building.publishing import push_to_hub, save_with_card
from loopitr.checks import check_at_least
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor

from .cross_encoding import ReportedMetrics, shows_progress
from .encoding import Portions, dual_of, encode_images, encode_texts, score_all, score_pairs
from .inputs import floating_type, given_images, given_pairs, given_texts, is_one, is_text, kind_of, listed, vector_rows
from .quantisation import VectorForm


class Retriever:
    """Encodes, compares, scores and ranks images and texts with a model of this package.

    An image is a path, the bytes of a file, a PIL image or an array, opened as in training: upright, 8-bit RGB,
    transparency on white. Texts are cut at the model's own length, and a warning counts those that were. Images are
    opened and encoded a batch at a time, so give paths where there are many. Results come in the order of what was
    given and do not depend on the batch size.

    The score of `predict` and `rank` is the reranking score, match score + w x similarity / temperature, with the
    weight w in the model's config that `loopitr calibrate` fits. A `DualEncoder` alone has no match score: it encodes,
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
        >>> with tempfile.TemporaryDirectory() as folder:  # in the place of a run
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
        """`model` stays on its device and goes into eval mode; `source` is where it comes from, for its card."""
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
            dtype: of the weights, such as `torch.bfloat16` or its name; None: as saved.

        Raises:
            OSError: nothing there, or damaged weights; the hub cannot be reached or does not know the id.
            ValueError: a model of another kind, or a device or type that cannot be used.
        """
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
        model, processor = load(path, device=where, dtype=floating_type(dtype))
        return cls(model, processor, source=path)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model, processor and card, as `from_pretrained` reads them; a README.md that somebody wrote stays.

        Raises:
            OSError: the folder cannot be written to.
        """
        save_with_card(self.model, self.processor, folder, source=self.source)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, revision: str | None = None
    ) -> str:
        """Send model, processor and card, and nothing else of a run, to the hub; returns the commit's address.

        Args:
            repo_id: `NAME` or `OWNER/NAME`; made if it is not there, as `private` says (None: the owner's default).
            token: None: as logged in.
            revision: a branch that is there; None: main.

        Raises:
            ValueError: `repo_id` is no name of a repository.
            OSError: the hub cannot be reached or refuses.
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
        """Unit vectors `[n, E]` of a list of images, `[E]` of one image.

        Args:
            images: a list, or one image.
            batch_size: images whose pixels and tokens are held at a time.
            show_progress: a bar, where there is more than one batch.
            num_workers: processes that open images, given as paths or bytes; 0: this one does, on a CPU with all cores.
            convert_to_tensor: a tensor on the CPU in the place of an array.
            truncate_dim: the first so many dimensions, of unit length again (`objective.matryoshka_dims` trains them).
            precision: float32; int8, 256 steps between the least and the greatest value of each dimension; binary, one
                bit per dimension, eight to an int8. They are the numbers of sentence-transformers'
                `quantize_embeddings`; `loopitr/search/quantisation.py` says how.
            ranges: `[2, E]`, the least and the greatest values for int8. Vectors compare only where they were the same;
                None: of the vectors of this call.

        Raises:
            ValueError: something that is no image or cannot be opened, named by its path or position; an option out of
                range.
        """
        portions = Portions(batch_size=batch_size, num_workers=num_workers, progress=show_progress)
        given, alone = given_images(images)
        form = self._form(len(given), truncate_dim, precision, ranges)
        embeds = encode_images(self.model, self.processor, given, portions)
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
        """Unit vectors `[n, E]` of a list of texts, `[E]` of one text.

        The options are those of `encode_images`.

        Raises:
            ValueError: something that is no text, or a blank one, named by its position; an option out of range.
        """
        portions = Portions(batch_size=batch_size, progress=show_progress)
        given, alone = given_texts(texts)
        form = self._form(len(given), truncate_dim, precision, ranges)
        embeds = encode_texts(self.model, self.processor, given, portions)
        return _output(form.of(embeds.numpy()), alone=alone, convert_to_tensor=convert_to_tensor)

    def similarity(self, a: Any, b: Any) -> Tensor:
        """Dot products `[n, m]` of vectors `[n, E]` and `[m, E]`, float32 on the CPU; a vector `[E]` counts as one row.

        Raises:
            ValueError: quantized vectors, or two widths.
        """
        first, second = vector_rows(a), vector_rows(b)
        if first.shape[1] != second.shape[1]:
            raise ValueError(f"vectors must be equally wide, got {first.shape[1]} and {second.shape[1]} dimensions")
        return first @ second.T

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
        """Reranking scores `[P]` (float64) of (text, image) pairs; of one pair, its score.

        An image that occurs in several pairs, as the same object or the same path, is opened and encoded once. The last
        three arguments are those of a `CrossEncoder`, so that sentence-transformers' `CrossEncoderRerankingEvaluator`
        can be called on a `Retriever`.

        Args:
            pairs: a list of (text, image), or one pair; (image, text) too, where the image is not a path in a str.
            batch_size: images whose tokens, keys and values are held at a time.
            show_progress_bar: goes before `show_progress` where it is given.
            convert_to_numpy: False: as `convert_to_tensor`.
            prompt_name: None, since there are no prompts.

        Raises:
            ValueError: the model is a dual encoder alone; what is no pair of a text and an image, named by its
                position; an image that cannot be opened, named by its path or position.
        """
        if not isinstance(self.model, LoopITRModel):
            kind = type(self.model).__name__
            raise ValueError(f"a {kind} has no fusion head to predict with; rank and similarity go by its vectors")
        if prompt_name is not None:
            raise ValueError(f"there are no prompts: prompt_name must be None, got {prompt_name!r}")
        progress = shows_progress(show_progress, show_progress_bar)
        portions = Portions(batch_size=batch_size, num_workers=num_workers, progress=progress)
        given = given_pairs(pairs)
        rows = torch.tensor(given.pairs, dtype=torch.int64).view(-1, 2)  # [P, 2]
        scores = score_pairs(self.model, self.processor, given.images, given.texts, rows, portions)
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

        A text is ranked over images and an image over texts, by the reranking score (a dual encoder alone: by
        similarity); an image over images by similarity. A str is an image's path where its ending says so (.jpg, .png,
        ...) or where it names a file in a folder, and, as a candidate of a text, always; a `Path` always is.

        Args:
            query: one text or one image.
            candidates: a list of images, or of texts.
            top_k: how many are returned; None: all.
            return_documents: put each candidate itself beside its score, as `text` or `image`.
            batch_size: images whose tokens, keys and values are held at a time.
            show_progress_bar: as of `predict`.

        Raises:
            ValueError: a query that is a list, candidates of both kinds, or what `predict` does not take.
        """
        check_at_least(1, top_k=top_k)
        progress = shows_progress(show_progress, show_progress_bar)
        portions = Portions(batch_size=batch_size, num_workers=num_workers, progress=progress)
        parts = (self.model, self.processor)
        if is_text(query):
            images, _ = given_images(candidates)
            documents, kind = list(images.images), "image"
            scores = score_all(*parts, images, given_texts(query)[0], portions)
        else:
            image, alone = given_images(query)
            if not alone:
                raise ValueError(f"the query must be one text or one image, got {type(query).__name__}")
            documents = [candidates] if is_one(candidates) else listed(candidates, "candidates", "texts or images")
            kind = kind_of(documents)
            if kind == "text":
                scores = score_all(*parts, image, given_texts(documents)[0], portions)
            else:
                own, others = (encode_images(*parts, x, portions) for x in (image, given_images(documents)[0]))
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
