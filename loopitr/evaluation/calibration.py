"""Fits the similarity weight of the reranking score on held-out candidates, and measures the gain of reranking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loopitr.models.scoring import DUAL_ALONE

from .ranking import Ranking
from .reranking import ScoredCandidates

WEIGHTS = (0.0, *torch.logspace(-3, 3, 121, dtype=torch.float64).tolist(), DUAL_ALONE)
"""The similarity weights to try: 0, 20 to each factor of ten, and the dual head alone."""
DRAWS = 1000  # resamples of the bootstrap


def fit_similarity_weight(candidates: ScoredCandidates) -> float:
    """The weight in `WEIGHTS` with the highest mean R@1 of both directions on these candidates.

    Ties are decided by `log_likelihood`. Since `DUAL_ALONE` is one of the weights, the reranked R@1 on these candidates
    is never below the dual head's.
    """

    def quality(weight: float) -> tuple[float, float]:
        scores = candidates.reranking(weight)
        return candidates.ranking(scores).metrics()["mean_r1"], log_likelihood(candidates, weight)

    return max(WEIGHTS, key=quality)


def log_likelihood(candidates: ScoredCandidates, weight: float) -> float:
    """Mean log-probability of a query's right answers under the softmax of its candidates' reranking scores.

    Queries without a right answer among their candidates are left out. Both directions weigh half; a direction without
    any query counts as 0.
    """
    scores = candidates.reranking(weight)
    sides = ((scores.captions, candidates.right.captions), (scores.images, candidates.right.images))
    means = []
    for values, right in sides:
        answered = right.any(1)
        values, right = values[answered], right[answered]  # [q, k]
        own = values.masked_fill(~right, -torch.inf).logsumexp(1)  # [q]
        means.append(float((own - values.logsumexp(1)).mean()) if len(values) else 0.0)
    return sum(means) / 2


@dataclass(frozen=True)
class Gain:
    """The gain of reranking over the dual head in points of mean R@1, with a 95% interval of +- `margin`."""

    points: float
    margin: float
    num_images: int

    def line(self) -> str:
        """One line that says whether reranking pays and, if not, what to try."""
        figures = f"{self.points:+.1f} +- {self.margin:.1f} points of R@1"
        source = f"95%, bootstrap over {self.num_images} images with their captions"
        if self.points > self.margin:
            return f"reranking pays: {figures} ({source})"
        advice = (
            "train longer (with word prediction, objective.mlm 1, if the fusion head has layers), or start from a "
            "trained fusion head (model.init)"
        )
        if self.points < -self.margin:
            return f"reranking does not pay: {figures} ({source}); {advice}, and fit the weight (recipes/calibrate.py)"
        more = "evaluate on more images, " if self.points > 0 else ""
        return f"reranking makes no significant difference: {figures} ({source}); {more}{advice}"


def reranking_gain(dual: Ranking, reranked: Ranking, caption_rows: Tensor) -> Gain:
    """The gain of `reranked` over `dual` on the same queries.

    The margin is 1.96 standard deviations of the gain over `DRAWS` bootstrap resamples, drawn with a fixed seed.
    Images are drawn with all their captions, because results of captions of one image are correlated.

    Args:
        caption_rows: the image of each caption, `[T]` int64.
    """
    gains = [(after <= 1).double() - (before <= 1).double() for before, after in zip(_sides(dual), _sides(reranked))]
    image_gain, caption_gain = gains  # [I], [T]
    images = len(image_gain)
    own_gain = torch.zeros_like(image_gain).index_add_(0, caption_rows, caption_gain)  # [I]
    own_count = torch.zeros_like(image_gain).index_add_(0, caption_rows, torch.ones_like(caption_gain))  # [I]
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(DRAWS):
        drawn = torch.randint(images, (images,), generator=generator)
        values.append(image_gain[drawn].mean() + own_gain[drawn].sum() / own_count[drawn].sum())
    points = float(image_gain.mean() + caption_gain.mean()) / 2
    margin = 1.96 * float(torch.stack(values).std()) / 2
    return Gain(points=100 * points, margin=100 * margin, num_images=images)


def _sides(ranking: Ranking) -> tuple[Tensor, Tensor]:
    return ranking.i2t, ranking.t2i
