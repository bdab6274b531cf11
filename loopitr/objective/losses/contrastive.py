"""Image-text contrastive losses on logits (similarity / temperature), with any number of positives per row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .means import at_least_float32, check_same_shape, masked_mean


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy with target distributions: mean over rows of -sum_j targets_ij log softmax(logits_i)_j.

    logits, targets `[Q, C]`; each row of targets sums to 1, or is all zero and is left out of the mean.
    """
    check_same_shape(logits=logits, targets=targets)
    log_probs = at_least_float32(logits).log_softmax(dim=-1)  # [Q, C]
    # A product alone would give NaN for a column masked with -inf, as 0 * -inf.
    losses = -torch.where(targets > 0, targets * log_probs, 0.0).sum(-1)  # [Q]
    return masked_mean(losses, (targets > 0).any(-1))


def itc_loss(
    logits_per_image: Tensor, logits_per_text: Tensor, positives_per_image: Tensor, positives_per_text: Tensor
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020) whose targets are 1/#positives on each positive of a row.

    All `[Q, C]`: Q queries of this rank against the C candidates of all ranks. The positives are bool masks. Rows
    without a positive are left out of the mean. Equals `F.cross_entropy` with the diagonal as targets when only the
    pairs of the batch are positives.
    """
    check_same_shape(logits_per_image=logits_per_image, positives_per_image=positives_per_image)
    check_same_shape(logits_per_text=logits_per_text, positives_per_text=positives_per_text)
    image_loss = soft_cross_entropy(logits_per_image, _uniform_targets(positives_per_image, logits_per_image))
    text_loss = soft_cross_entropy(logits_per_text, _uniform_targets(positives_per_text, logits_per_text))
    return (image_loss + text_loss) / 2


def siglip_loss(logits: Tensor, positives: Tensor) -> Tensor:
    """Pairwise sigmoid loss (SigLIP, arXiv 2303.15343): -1/Q sum_ij log sigmoid(z_ij l_ij), z = +-1 by positive.

    logits (similarity / temperature + bias) and positives `[Q, C]`. The sum is over pairs, so it covers both
    directions.
    """
    check_same_shape(logits=logits, positives=positives)
    logits = at_least_float32(logits)
    losses = -F.logsigmoid(torch.where(positives, logits, -logits))  # [Q, C]
    return losses.sum() / max(len(logits), 1)


def _uniform_targets(positives: Tensor, logits: Tensor) -> Tensor:
    weights = positives.to(at_least_float32(logits).dtype)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1)  # [Q, C]
