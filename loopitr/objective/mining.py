"""Hard negatives from a similarity matrix: pure functions, without gradient and without device synchronisation.

All functions take `similarity [Q, C]`, `positives [Q, C]` (bool, by identity) and `k`, and return `Mined`. A query
gets `k` distinct negatives. If it has fewer, the remaining slots are masked, never filled with a positive. NaN is
treated as the lowest similarity.

`groups [C]` (int, optional) marks duplicates among the candidates, such as a caption that occurs twice in the batch: a
query gets at most one candidate of a group, and none of a group that contains one of its positives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mined:
    """The negatives of each query: `indices [Q, K]` int64 (0 in masked slots) and `valid [Q, K]` bool."""

    indices: Tensor
    valid: Tensor


@torch.no_grad()
def mine_topk(similarity: Tensor, positives: Tensor, k: int, *, groups: Tensor | None = None) -> Mined:
    """The `k` most similar negatives, hardest first."""
    _check(similarity, positives, k, groups)
    scores, negatives = _rankable(similarity, positives, groups)
    return _take_best(scores, negatives, k)


@torch.no_grad()
def mine_sample(
    similarity: Tensor,
    positives: Tensor,
    k: int,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    groups: Tensor | None = None,
) -> Mined:
    """`k` negatives drawn without replacement from softmax(similarity / temperature) (ALBEF, arXiv 2107.07651).

    Uses Gumbel top-k (arXiv 1903.06059); `torch.multinomial` fails on rows that sum to zero or have too few non-zero
    entries. `generator` must be on similarity's device.
    """
    _check(similarity, positives, k, groups)
    if not temperature > 0:
        raise ValueError(f"expected temperature > 0, got {temperature}")
    scores, negatives = _rankable(similarity / temperature, positives, groups)
    noise = torch.empty_like(scores).exponential_(generator=generator).clamp_(min=torch.finfo(scores.dtype).tiny)
    return _take_best(torch.where(negatives, scores - noise.log(), scores), negatives, k)


@torch.no_grad()
def mine_stratified(
    similarity: Tensor,
    positives: Tensor,
    k: int,
    *,
    pool: int = 32,
    generator: torch.Generator | None = None,
    groups: Tensor | None = None,
) -> Mined:
    """One negative from each of `k` strata of the row's `pool` most similar negatives, hardest stratum first.

    The strata are consecutive parts of the ranking that grow geometrically (63 negatives in 4 strata: ranks 1-2, 3-7,
    8-22, 23-63), so every query gets near misses as well as easy negatives. The choice within a stratum is random. The
    strata of a row with fewer than `pool` negatives divide those that it has. `pool == k` is `mine_topk`.
    """
    _check(similarity, positives, k, groups)
    if pool < k:
        raise ValueError(f"expected pool >= k, got pool {pool} and k {k}")
    ranked = _take_best(*_rankable(similarity, positives, groups), pool)
    size = ranked.valid.sum(-1, keepdim=True)  # [Q, 1]
    strata = size.clamp(max=k)  # [Q, 1]
    edge = torch.arange(k + 1, device=similarity.device)[None]  # [1, K + 1]
    # The small constant keeps a power that is a whole number from being rounded down to the one below.
    growth = size.double() ** (edge / strata.clamp(min=1)) + 1e-6  # [Q, K + 1]
    edges = growth.long().maximum(edge).where(edge > 0, 0)  # [Q, K + 1] every stratum has at least one rank
    start, width = edges[:, :-1], edges.diff(dim=-1)  # [Q, K]
    draw = torch.rand(start.shape, generator=generator, device=start.device)  # [Q, K]
    position = start + (draw * width).long()  # [Q, K]
    valid = edge[:, :-1] < strata  # [Q, K]
    indices = ranked.indices.gather(-1, position.where(valid, 0))  # [Q, K]
    return Mined(indices=indices.where(valid, 0), valid=valid)


def _check(similarity: Tensor, positives: Tensor, k: int, groups: Tensor | None) -> None:
    if similarity.dim() != 2 or similarity.shape != positives.shape:
        shapes = tuple(similarity.shape), tuple(positives.shape)
        raise ValueError(f"expected similarity and positives of one shape [Q, C], got {shapes[0]} and {shapes[1]}")
    if positives.dtype != torch.bool:
        raise ValueError(f"expected positives to be a bool mask, got {positives.dtype}")
    if groups is not None and groups.shape != similarity.shape[1:]:
        raise ValueError(f"expected groups [{similarity.shape[1]}], got {tuple(groups.shape)}")
    if k < 1:
        raise ValueError(f"expected k >= 1, got {k}")


def _rankable(similarity: Tensor, positives: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores `[Q, C]`, finite for the negatives that may be mined and -inf elsewhere, and the mask of the former."""
    if similarity.dtype in (torch.float16, torch.bfloat16):
        similarity = similarity.float()  # In half precision, Gumbel noise would tie candidates.
    # Scores are finite, so that even the worst negative ranks above a positive. Half the range leaves room for noise.
    limit = torch.finfo(similarity.dtype).max / 2
    scores = similarity.nan_to_num(nan=-limit).clamp(-limit, limit)
    negatives = ~positives
    if groups is not None:
        # Positives sort first, so that no negative of their group is kept.
        negatives = negatives & _first_of_group(scores.masked_fill(positives, torch.inf), groups)
    return scores.masked_fill(~negatives, -torch.inf), negatives


def _first_of_group(scores: Tensor, groups: Tensor) -> Tensor:
    """Mask `[Q, C]` of the best-scored candidate of each group in each row; two sorts avoid a `[C, C]` comparison."""
    order = scores.argsort(dim=-1, descending=True, stable=True)  # [Q, C]
    sorted_groups, by_group = groups[order].sort(dim=-1, stable=True)  # [Q, C] each group together, best first
    first = torch.ones_like(sorted_groups, dtype=torch.bool)
    first[:, 1:] = sorted_groups[:, 1:] != sorted_groups[:, :-1]
    return torch.zeros_like(first).scatter(-1, order.gather(-1, by_group), first)


def _take_best(scores: Tensor, negatives: Tensor, k: int) -> Mined:
    indices = scores.topk(min(k, scores.shape[1]), dim=-1).indices  # [Q, min(K, C)]
    valid = negatives.gather(-1, indices)
    missing = (0, k - indices.shape[1])
    return Mined(indices=F.pad(indices.where(valid, 0), missing), valid=F.pad(valid, missing))  # [Q, K]


class Miner(Protocol):
    """Chooses `num_negatives` hard negatives for each query; arguments as of the functions of this module."""

    @property
    def num_negatives(self) -> int: ...

    def __call__(self, similarity: Tensor, positives: Tensor, groups: Tensor | None = None) -> Mined: ...


@dataclass(frozen=True)
class TopK:
    """The hardest negatives: `mine_topk`.

    Example:
        >>> import torch
        >>> from loopitr import TopK
        >>> TopK(1)(torch.tensor([[0.9, 0.2, 0.7]]), torch.tensor([[True, False, False]])).indices
        tensor([[2]])
    """

    num_negatives: int = 4

    def __call__(self, similarity: Tensor, positives: Tensor, groups: Tensor | None = None) -> Mined:
        return mine_topk(similarity, positives, self.num_negatives, groups=groups)


@dataclass(frozen=True)
class Sample:
    """Negatives drawn at random, similar ones more often: `mine_sample`.

    Example:
        >>> import torch
        >>> from loopitr import Sample
        >>> mined = Sample(2)(torch.tensor([[0.9, 0.2, 0.7]]), torch.tensor([[True, False, False]]))
        >>> mined.indices.sort().values
        tensor([[1, 2]])
    """

    num_negatives: int = 4

    def __call__(self, similarity: Tensor, positives: Tensor, groups: Tensor | None = None) -> Mined:
        return mine_sample(similarity, positives, self.num_negatives, groups=groups)


@dataclass(frozen=True)
class Stratified:
    """Negatives from all parts of the first `pool` of the ranking: `mine_stratified`.

    Their order spreads also the first few of them over the pool: `Matching(negatives=...)` trains on these alone.

    Example:
        >>> import torch
        >>> from loopitr import Stratified
        >>> similarity, positives = torch.tensor([[0.9, 0.2, 0.7, 0.1]]), torch.tensor([[True, False, False, False]])
        >>> Stratified(2, pool=3)(similarity, positives).indices[0, 0]  # its first stratum is the hardest one alone
        tensor(2)
    """

    num_negatives: int = 4
    pool: int = 32

    def __call__(self, similarity: Tensor, positives: Tensor, groups: Tensor | None = None) -> Mined:
        pool = max(self.pool, self.num_negatives)
        mined = mine_stratified(similarity, positives, self.num_negatives, pool=pool, groups=groups)
        order = torch.tensor(spread_order(self.num_negatives), device=similarity.device)
        indices, valid = mined.indices[:, order], mined.valid[:, order]
        masked_last = (~valid).int().argsort(dim=1, stable=True)
        return Mined(indices=indices.gather(1, masked_last), valid=valid.gather(1, masked_last))


def spread_order(count: int) -> list[int]:
    """0 to `count` - 1 in an order in which the first few are spread over the whole range (van der Corput sequence).

    Example:
        >>> from loopitr.objective.mining import spread_order
        >>> spread_order(8)
        [0, 4, 2, 6, 1, 5, 3, 7]
    """
    bits = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda number: int(f"{number:0{bits}b}"[::-1], 2))
