"""Metrics computed from scores: Karpathy recalls in both directions, graded relevance, paraphrase stability.

Ties count against the model: a wrong candidate that scores as high as a right one is ranked before it. So a model that
gives all pairs the same score has R@1 = 0, and no result depends on how a sort orders ties. NaN scores raise a
ValueError. Recalls are in percent, ranks start at 1, and all other metrics are fractions from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KS = (1, 5, 10)
BLOCK_ELEMENTS = 2**24  # scores processed at a time, which bounds the memory of masks and sorts


@dataclass(frozen=True)
class Ranking:
    """The rank of the right answer to each query, from which all recalls are computed.

    Attributes:
        i2t: the rank of the best caption of each image that has one; float64, inf if it was not a candidate.
        t2i: `[T]`, the rank of each caption's image; likewise.
    """

    i2t: Tensor
    t2i: Tensor

    @classmethod
    def from_scores(cls, similarity: Tensor, caption_to_image: Tensor) -> Ranking:
        """Ranks all images and captions by similarity `[I, T]`; caption_to_image `[T]` int is each caption's image.

        An image without a caption is a distractor: captions are compared with it, but it is not a query.
        """
        if similarity.dim() != 2 or caption_to_image.shape != similarity.shape[1:]:
            shapes = tuple(similarity.shape), tuple(caption_to_image.shape)
            raise ValueError(f"expected similarity [I, T] and caption_to_image [T], got {shapes[0]} and {shapes[1]}")
        if similarity.numel() == 0:
            raise ValueError(f"expected at least one image and one caption, got similarity {tuple(similarity.shape)}")
        num_images, num_captions = similarity.shape
        _refuse_nan(similarity)
        owner = _checked_owner(caption_to_image, num_images).to(similarity.device)  # [T]
        row = torch.arange(num_images, device=owner.device)[:, None]  # [I, 1]
        ranks = BlockRanks(num_captions, like=similarity)
        for rows in _row_blocks(similarity):
            ranks.first_pass(similarity[rows], owner == row[rows])
        for rows in _row_blocks(similarity):
            ranks.second_pass(similarity[rows], owner == row[rows])
        return cls(i2t=ranks.of_images()[owner.unique()], t2i=ranks.of_texts())

    @classmethod
    def from_candidates(
        cls,
        *,
        captions: Tensor,
        caption_scores: Tensor,
        images: Tensor,
        image_scores: Tensor,
        caption_to_image: Tensor,
    ) -> Ranking:
        """Ranks lists of candidates, such as reranked ones; a right answer that is not in its list is a miss.

        Args:
            captions, caption_scores: `[I, k]`, caption indices per image and their scores, in any order; -1 is padding.
            images, image_scores: `[T, k]`, image indices per caption and their scores, likewise.
            caption_to_image: `[T]` int, the row of each caption's image.
        """
        num_images, num_captions = len(captions), len(caption_to_image)
        if len(images) != num_captions:
            raise ValueError(f"expected a list of images for each of {num_captions} captions, got {len(images)}")
        if num_captions == 0:
            raise ValueError("expected at least one caption, got none")
        owner = _checked_owner(caption_to_image, num_images).to(captions.device)  # [T]
        _check_indices("captions", captions, num_captions)
        _check_indices("images", images, num_images)
        own_row = torch.arange(num_images, device=captions.device)[:, None]  # [I, 1]
        image_ranks = candidate_ranks(caption_scores, owner[captions.clamp(min=0)] == own_row, captions >= 0)  # [I]
        own_image = owner.to(images.device)[:, None]  # [T, 1]
        return cls(i2t=image_ranks[owner.unique()], t2i=candidate_ranks(image_scores, images == own_image, images >= 0))

    def metrics(self, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Any]:
        """`{"i2t": {"r1", "r5", "r10"}, "t2i": {...}, "mean_r1"}`, in percent."""
        image_r1, text_r1 = recall_at_k(self.i2t, (1,))["r1"], recall_at_k(self.t2i, (1,))["r1"]
        return {
            "i2t": recall_at_k(self.i2t, ks),
            "t2i": recall_at_k(self.t2i, ks),
            "mean_r1": (image_r1 + text_r1) / 2,
        }

    def mean_recall(self, ks: Sequence[int] = (1, 5, 10)) -> float:
        """Mean over both directions and all `ks`, in percent."""
        recalls = [*recall_at_k(self.i2t, ks).values(), *recall_at_k(self.t2i, ks).values()]
        return sum(recalls) / len(recalls)

    def median_rank(self) -> dict[str, float]:
        """`{"i2t", "t2i"}`; inf if less than half of the right answers are among the candidates."""
        return {"i2t": _median(self.i2t), "t2i": _median(self.t2i)}

    def ceiling(self) -> dict[str, float]:
        """`{"i2t", "t2i"}`: the percentage of queries with a right answer among the candidates."""
        return {"i2t": _percent(self.i2t.isfinite()), "t2i": _percent(self.t2i.isfinite())}


class BlockRanks:
    """Computes the ranks of `Ranking` in two passes over blocks `[b, T]` of rows of the similarities.

    A rank is 1 plus the number of wrong candidates that score at least as high as the best right answer, so nothing
    needs to be sorted. A caption's best image is known only after the first pass, so the second counts for captions.
    """

    def __init__(self, num_texts: int, *, like: Tensor) -> None:
        """`like` has the type and the device of the similarities."""
        self._best_image = like.new_full((num_texts,), -torch.inf)  # [T] similarity of each caption's best right image
        self._images: list[Tensor] = []
        self._texts = torch.ones(num_texts, dtype=torch.int64, device=like.device)  # [T]

    def first_pass(self, similarity: Tensor, right: Tensor) -> None:
        """Take the next block: `similarity` and `right` (bool), both `[b, T]`, of consecutive images."""
        self._best_image = torch.maximum(self._best_image, _best_right(similarity, right, dim=0))
        best_text = _best_right(similarity, right, dim=1)[:, None]  # [b, 1]
        self._images.append(1 + _count_ahead(similarity, right, best_text, dim=1))  # [b]

    def second_pass(self, similarity: Tensor, right: Tensor) -> None:
        """Take the same block again."""
        self._texts += _count_ahead(similarity, right, self._best_image, dim=0)

    def of_images(self) -> Tensor:
        """`[I]` float64: the rank of each image's best right caption."""
        return torch.cat(self._images).double()

    def of_texts(self) -> Tensor:
        """`[T]` float64: the rank of each caption's best right image."""
        return self._texts.double()


def candidate_ranks(scores: Tensor, relevant: Tensor, valid: Tensor) -> Tensor:
    """The rank of the best relevant candidate of each list, inf without any. All `[Q, k]` -> `[Q]` float64."""
    _check_rows(scores=scores, relevant=relevant, valid=valid)
    scores = scores.masked_fill(~valid, -torch.inf)
    _refuse_nan(scores)
    relevant = relevant & valid
    best = _best_right(scores, relevant, dim=1)[:, None]  # [Q, 1]
    ranks = 1.0 + _count_ahead(scores, relevant | ~valid, best, dim=1).double()  # [Q]
    return ranks.masked_fill(~relevant.any(-1), torch.inf)


def _best_right(scores: Tensor, right: Tensor, *, dim: int) -> Tensor:
    """The highest score of a right answer along `dim`; -inf without any."""
    return scores.masked_fill(~right, -torch.inf).amax(dim)


def _count_ahead(scores: Tensor, right: Tensor, best: Tensor, *, dim: int) -> Tensor:
    """The number of wrong candidates that score at least as high as `best`: ties count against the model."""
    return ((scores >= best) & ~right).sum(dim)


def recall_at_k(ranks: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """`{"r1": ...}`: the percentage of queries whose rank `[Q]` (from 1, inf for a miss) is at most k."""
    return {f"r{k}": _percent(ranks <= k) for k in ks}


def ndcg(scores: Tensor, relevance: Tensor, k: int | None = None) -> float:
    """nDCG@k (Jarvelin & Kekalainen, 2002) with linear gains: sum_r rel_r / log2(r + 1), relative to the ideal order.

    scores and graded relevance (>= 0) `[Q, C]`; k None is C. Queries without a relevant candidate are left out.
    """
    _check_rows(scores=scores, relevance=relevance)
    if (relevance < 0).any():
        raise ValueError(f"expected relevance >= 0, got {relevance.min().item()}")
    depth = _checked_depth(k, scores.shape[1])
    discount = (torch.arange(depth, device=scores.device, dtype=torch.float64) + 2).log2()  # [k]
    values = []
    for rows in _row_blocks(scores):
        gains = relevance[rows].double()
        ideal = (gains.topk(depth, dim=-1).values / discount).sum(-1)  # [rows]
        gain = (_ranked(scores[rows], gains)[:, :depth] / discount).sum(-1)  # [rows]
        values.append((gain / ideal)[ideal > 0])
    return _mean(values)


def mean_average_precision_at_r(scores: Tensor, relevant: Tensor) -> float:
    """mAP@R (arXiv 2003.08505, as in ECCV Caption, arXiv 2204.03359): mean over queries of 1/R sum_{r<=R} P@r rel_r.

    scores `[Q, C]`, relevant `[Q, C]` bool; R is a query's number of relevant candidates. Queries with R = 0 are left
    out.
    """
    _check_rows(scores=scores, relevant=relevant)
    position = torch.arange(1, scores.shape[1] + 1, device=scores.device)  # [C]
    values = []
    for rows in _row_blocks(scores):
        hits = _ranked(scores[rows], relevant[rows].double())  # [rows, C]
        total = hits.sum(-1, keepdim=True)  # [rows, 1]
        precision = hits.cumsum(-1) / position  # [rows, C]
        average = (precision * hits * (position <= total)).sum(-1, keepdim=True) / total  # [rows, 1]
        values.append(average[total > 0])
    return _mean(values)


def overlap_at_k(first: Tensor, second: Tensor, k: int) -> float:
    """Average overlap (Webber et al., 2010) of the top k of two rankings: mean over d <= k of |first_d & second_d| / d.

    first, second `[Q, >= k]`: candidate indices, best first, of a query and its paraphrase. The mean over Q.
    """
    matches = _matches(first, second, k)
    shared = matches.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)  # [Q, k] the size of the overlap at each depth
    depth = torch.arange(1, k + 1, device=first.device)  # [k]
    return (shared / depth).double().mean().item()


def jaccard_at_k(first: Tensor, second: Tensor, k: int) -> float:
    """Jaccard index of the top k of two rankings, |intersection| / |union|, averaged over Q; see `overlap_at_k`."""
    shared = _matches(first, second, k).sum((1, 2)).double()  # [Q]
    return (shared / (2 * k - shared)).mean().item()


def _matches(first: Tensor, second: Tensor, k: int) -> Tensor:
    if first.dim() != 2 or second.dim() != 2 or len(first) != len(second) or len(first) == 0:
        raise ValueError(f"expected two rankings [Q, >= {k}], got {tuple(first.shape)} and {tuple(second.shape)}")
    if not 1 <= k <= min(first.shape[1], second.shape[1]):
        raise ValueError(f"expected 1 <= k <= {min(first.shape[1], second.shape[1])} ranked candidates, got k {k}")
    return first[:, :k, None] == second[:, None, :k]  # [Q, k, k]


def _ranked(scores: Tensor, gains: Tensor) -> Tensor:
    """Gains `[Q, C]` in the order of the scores; on ties, the lowest gain first."""
    by_gain = gains.argsort(dim=-1, stable=True)
    by_score = scores.gather(-1, by_gain).argsort(dim=-1, descending=True, stable=True)
    return gains.gather(-1, by_gain.gather(-1, by_score))


def _row_blocks(scores: Tensor) -> Iterator[slice]:
    step = max(1, BLOCK_ELEMENTS // max(1, scores.shape[1]))
    return (slice(start, start + step) for start in range(0, len(scores), step))


def _refuse_nan(scores: Tensor) -> None:
    count = sum(int(scores[rows].isnan().sum()) for rows in _row_blocks(scores))
    if count:
        total = scores.numel()
        raise ValueError(f"{count} of {total} scores are NaN: the model has diverged, or its weights are damaged")


def _checked_owner(caption_to_image: Tensor, num_images: int) -> Tensor:
    owner = caption_to_image.long()
    wrong = owner[(owner < 0) | (owner >= num_images)]
    if len(wrong):
        raise ValueError(f"expected caption_to_image from 0 to {num_images - 1}, got {wrong[0].item()}")
    return owner


def _check_indices(name: str, indices: Tensor, size: int) -> None:
    if ((indices < -1) | (indices >= size)).any():
        low, high = indices.min().item(), indices.max().item()
        raise ValueError(f"expected {name} from 0 to {size - 1}, or -1 for padding, got {low} to {high}")


def _check_rows(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) != 1 or any(len(shape) != 2 or 0 in shape for shape in shapes.values()):
        raise ValueError(f"expected non-empty tensors of one shape [Q, C], got {shapes}")
    if "valid" not in tensors:  # Slots outside `valid` may hold NaN; the caller checks the scores after masking them.
        _refuse_nan(tensors["scores"])


def _checked_depth(k: int | None, size: int) -> int:
    if k is not None and k < 1:
        raise ValueError(f"expected k >= 1, got {k}")
    return size if k is None else min(k, size)


def _percent(hits: Tensor) -> float:
    if hits.numel() == 0:
        raise ValueError("expected at least one query, got none")
    return 100.0 * hits.sum().item() / hits.numel()  # exact for whole percentages, unlike 100 times the mean


def _median(ranks: Tensor) -> float:
    # `Tensor.median` does not average the two middle ranks, and `quantile` would compute inf - inf.
    ordered = ranks.sort().values
    low, high = ordered[(len(ranks) - 1) // 2].item(), ordered[len(ranks) // 2].item()
    return (low + high) / 2


def _mean(values: list[Tensor]) -> float:
    joined = torch.cat(values)
    if len(joined) == 0:
        raise ValueError("expected at least one query with a relevant candidate, got none")
    return joined.mean().item()
