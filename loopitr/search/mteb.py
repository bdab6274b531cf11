"""Evaluates a model on mteb's benchmarks: the dual encoder alone, or with its best candidates reranked.

import mteb

from loopitr import Retriever
from loopitr.search.mteb import MtebEncoder, MtebTwoStage

retriever = Retriever.from_pretrained("runs/mine")
tasks = mteb.get_tasks(["Flickr30kT2IRetrieval"])
mteb.evaluate(MtebEncoder(retriever), tasks)
mteb.evaluate(MtebTwoStage(retriever, rerank=100), tasks)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loopitr.building.keys import dual_key
from loopitr.building.towers import DUAL
from loopitr.checks import check_at_least
from loopitr.data import Record
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor
from loopitr.reading import user_path

from .encoding import Batching, dual_of, score_pairs
from .inputs import GivenImages, given_texts

if TYPE_CHECKING:
    from .retriever import Retriever

QUERY_BLOCK = 256  # the number of queries whose similarities with the whole corpus are in memory at a time
INSTALL = 'mteb is not installed: pip install "loopitr[mteb]"'


class MtebEncoder:
    """The dual encoder as an `EncoderProtocol` of mteb, for texts, images, or both, whose vectors are added.

    mteb stores results under the model's name and a hash of its weights, so that they are not used for another model.
    """

    stage = ""

    def __init__(self, retriever: Retriever, *, truncate_dim: int | None = None) -> None:
        """
        Args:
            truncate_dim: the length to which vectors are cut; None: they are not cut.

        Raises:
            ModuleNotFoundError: mteb is not installed.
        """
        if importlib.util.find_spec("mteb") is None:
            raise ModuleNotFoundError(INSTALL)
        check_at_least(1, truncate_dim=truncate_dim)
        self.retriever, self.truncate_dim = retriever, truncate_dim

    @cached_property
    def mteb_model_meta(self) -> Any:
        """The description of the model that mteb stores with the results."""
        from mteb.models import ModelMeta

        model, width = self.retriever.model, self.retriever.model.config.embed_dim
        fields = {
            "name": f"{_hub_name(self.retriever.source)}{self.stage}",
            "revision": _fingerprint(model, self.retriever.processor),
            "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "max_tokens": float(self.retriever.processor.tokenizer.model_max_length),
            "embed_dim": self.truncate_dim or width,
            "similarity_fn_name": "cosine",
            "framework": ["PyTorch"],
            "modalities": ["image", "text"],
            "use_instructions": False,
        }
        if self.truncate_dim is not None:
            fields["name"] += f"-{self.truncate_dim}-dimensions"
        return ModelMeta.create_empty(fields)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str | None = None,
        hf_subset: str | None = None,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Unit vectors `[n, E]` (CPU, float32) of batches of `text`, `image` or both.

        Raises:
            ValueError: a text is blank, an image cannot be opened, a batch has neither texts nor images, or `precision`
                is not float32.
        """
        if kwargs.get("precision") not in (None, "float32"):
            raise ValueError(f"precision must be float32 in mteb's tasks, got {kwargs['precision']!r}")
        width = self.retriever.model.config.embed_dim if self.truncate_dim is None else self.truncate_dim
        return torch.cat([torch.empty(0, width), *(self._embeds(batch) for batch in inputs)])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Dot products `[n, m]`."""
        return self.retriever.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Dot products `[n]` of the rows of two matrices."""
        return (torch.as_tensor(embeddings1).float() * torch.as_tensor(embeddings2).float()).sum(-1)

    def _embeds(self, batch: Mapping[str, Any]) -> Tensor:
        form: dict[str, Any] = {"show_progress": False, "convert_to_tensor": True, "truncate_dim": self.truncate_dim}
        parts: list[Any] = []
        if "text" in batch:
            parts.append(self.retriever.encode_texts(list(batch["text"]), **form))
        if "image" in batch:
            parts.append(self.retriever.encode_images(list(batch["image"]), **form))
        if not parts:
            raise ValueError(f"mteb gave a batch without text and image, of {', '.join(batch)}")
        return F.normalize(torch.stack(parts).sum(0), dim=-1) if len(parts) > 1 else torch.as_tensor(parts[0])


class MtebTwoStage(MtebEncoder):
    """The dual encoder with its `rerank` best candidates reranked, as a `SearchProtocol` of mteb.

    Text queries over images and image queries over texts are reranked. Other pairs have no match score and keep the
    dual encoder's order. In a reranking task (`task.convert_to_reranking`) the candidates are those of the task. An
    image is decoded and encoded once for all its pairs, unlike in mteb's cross encoders, which get single pairs.
    """

    def __init__(self, retriever: Retriever, *, rerank: int = 100) -> None:
        """
        Raises:
            ValueError: the model is only a dual encoder, or `rerank` is below 1.
            ModuleNotFoundError: mteb is not installed.
        """
        super().__init__(retriever)
        if not isinstance(retriever.model, LoopITRModel):
            raise ValueError(f"a {type(retriever.model).__name__} has no fusion head to rerank with: use MtebEncoder")
        check_at_least(1, rerank=rerank)
        self.rerank = rerank
        self.stage = f"-reranked-{rerank}"
        self.corpus: Any = None

    def index(self, corpus: Any, **kwargs: Any) -> None:
        """Store the corpus, which is encoded when it is searched."""
        self.corpus = corpus

    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        num_proc: int | None = None,
        **kwargs: Any,
    ) -> dict[str, dict[str, float]]:
        """The scores of the `top_k` best documents, or of all in `top_ranked`, as query id -> document id -> score."""
        from mteb._create_dataloaders import create_dataloader
        from mteb.types import PromptType

        loading = {"batch_size": 32, **encode_kwargs}
        query_loader, document_loader = (
            create_dataloader(data, task_metadata=task_metadata, prompt_type=kind, num_proc=num_proc, **loading)
            for data, kind in ((queries, PromptType.query), (self.corpus, PromptType.document))
        )
        query_ids, document_ids = list(queries["id"]), list(self.corpus["id"])
        self.corpus = None
        query_embeds, document_embeds = (self.encode(x, **encode_kwargs) for x in (query_loader, document_loader))
        if top_ranked is None:
            nearest = _nearest(query_embeds, document_embeds, max(top_k, self.rerank))
            reranked, returned = self.rerank, top_k
        else:
            row = {name: number for number, name in enumerate(document_ids)}
            chosen = [[row[name] for name in top_ranked.get(query, ())] for query in query_ids]
            nearest = [_ordered(embeds @ document_embeds[rows].T, rows) for embeds, rows in zip(query_embeds, chosen)]
            reranked = returned = max(map(len, chosen), default=0)
        scores = self._rescored(nearest, query_loader.dataset, document_loader.dataset, reranked, loading["batch_size"])
        results = {}
        for query, candidates, values in zip(query_ids, nearest, scores, strict=True):
            best = sorted(zip(values, candidates.rows, strict=True), key=lambda pair: -pair[0])[:returned]
            results[query] = {document_ids[row]: value for value, row in best}
        return results

    def _rescored(
        self, nearest: list[_Candidates], queries: Any, documents: Any, count: int, batch_size: int
    ) -> list[list[float]]:
        """Scores of all candidates: the first `count` by the reranking score, and below them the rest by similarity."""
        kinds = [[kind for kind in ("text", "image") if kind in data.column_names] for data in (queries, documents)]
        if sorted(kinds) != [["image"], ["text"]]:
            return [candidates.similarity for candidates in nearest]
        pairs = torch.tensor([(q, row) for q, candidates in enumerate(nearest) for row in candidates.rows[:count]])
        if not len(pairs):
            return [[] for _ in nearest]
        if kinds[0] == ["text"]:
            pairs = pairs.flip(1)  # (image, text)
        used, places = pairs[:, 0].unique(return_inverse=True)
        images = _Rows(queries if kinds[0] == ["image"] else documents, used.tolist())
        texts, _ = given_texts(list((documents if kinds[0] == ["image"] else queries)["text"]))
        model: Any = self.retriever.model
        batching = Batching(batch_size=batch_size, progress=False)
        pairs = torch.stack([places, pairs[:, 1]], 1)
        scores = iter(score_pairs(model, self.retriever.processor, images, texts, pairs, batching).tolist())
        result = []
        for candidates in nearest:
            first = [next(scores) for _ in candidates.rows[:count]]
            rest = candidates.similarity[count:]
            result.append(first + [min(first) - 1 - (rest[0] - similarity) for similarity in rest])
        return result


class _Candidates(NamedTuple):
    """A query's candidates, best first: rows of the corpus, and their similarities."""

    rows: list[int]
    similarity: list[float]


class _Rows(GivenImages):
    """Images of a data set's rows, each decoded when it is read."""

    def __init__(self, data: Any, rows: list[int]) -> None:
        super().__init__([b""] * len(rows), rows)
        self.data = data

    def read(self, index: int) -> Record:
        image = self.data[self.positions[index]]["image"]
        return Record(image=image, captions=(), identity=index, name=self.name(index))

    @property
    def are_files(self) -> bool:
        return False


def _nearest(queries: Tensor, documents: Tensor, k: int) -> list[_Candidates]:
    """The `k` most similar documents of each query."""
    nearest = []
    for start in range(0, len(queries), QUERY_BLOCK):
        top = (queries[start : start + QUERY_BLOCK] @ documents.T).topk(min(k, len(documents)), dim=1)
        nearest += [_Candidates(*rows) for rows in zip(top.indices.tolist(), top.values.tolist(), strict=True)]
    return nearest


def _ordered(similarity: Tensor, rows: list[int]) -> _Candidates:
    ordered = similarity.sort(descending=True, stable=True)
    return _Candidates([rows[place] for place in ordered.indices.tolist()], ordered.values.tolist())


def _hub_name(source: str | Path | None) -> str:
    """The model's name as `OWNER/NAME`, which mteb needs; that of a folder is its own name."""
    if source is None:
        return "loopitr/model"
    folder = user_path(source)
    return f"loopitr/{folder.resolve().name}" if folder.exists() else str(source)


def _fingerprint(model: LoopITRModel | DualEncoder, processor: LoopITRProcessor) -> str:
    """A digest, of 12 hex digits, of everything that scores depend on: weights, config and preprocessing."""
    own = [getattr(model.config, name, None) for name in ("similarity_weight", "fusion")]
    digest = hashlib.sha256(json.dumps([*own, dual_key(dual_of(model), processor)], sort_keys=True).encode())
    others = {} if isinstance(model, DualEncoder) else model.state_dict()
    for name, value in sorted(others.items()):
        if name.startswith(DUAL):  # These weights are in the key.
            continue
        digest.update(name.encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
