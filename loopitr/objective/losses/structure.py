"""Cross-modality contrastive distillation (arXiv 2405.03355): a target modality learns from a source modality.

Row i of `source` and row i of `target` are a pair. Both are L2-normalised, and the caller detaches the source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contrastive import soft_cross_entropy
from .means import at_least_float32, check_positive, lowest


def cmd_loss(
    source: Tensor, target: Tensor, *, source_temperature: float = 0.07, target_temperature: float = 0.07
) -> Tensor:
    """CMD: mean over i of KL(softmax_j(a_i . a_j / t_a) || softmax_j(b_i . b_j / t_b)), with a source, b target.

    source `[B, D]`, target `[B, E]`; the widths may differ. The target learns which items of the batch are similar.
    """
    _check_paired(source, target)
    check_positive("source_temperature", source_temperature)
    check_positive("target_temperature", target_temperature)
    log_p = (_products(source, source) / source_temperature).log_softmax(dim=-1)  # [B, B]
    log_q = (_products(target, target) / target_temperature).log_softmax(dim=-1)  # [B, B]
    return (log_p.exp() * (log_p - log_q)).sum() / max(len(source), 1)


def cmc_loss(source: Tensor, target: Tensor, *, temperature: float = 0.07, valid: Tensor | None = None) -> Tensor:
    """CMC: InfoNCE of each target against all sources of the batch.

    -mean_i log( exp(b_i . a_i / t) / sum_j exp(b_i . a_j / t) ), source a and target b `[B, E]`. Only rows in
    `valid [B]` (bool) are used, both as i and as j; None: all.
    """
    _check_paired(source, target)
    if source.shape != target.shape:
        raise ValueError(f"expected source and target of one width, got {source.shape[1]} and {target.shape[1]}")
    check_positive("temperature", temperature)
    logits = _products(target, source) / temperature  # [B, B]
    own = torch.eye(len(source), dtype=logits.dtype, device=logits.device)  # [B, B]
    if valid is not None:  # Selecting rows instead of masking them would make the host wait for a GPU.
        if valid.shape != source.shape[:1] or valid.dtype != torch.bool:
            raise ValueError(
                f"expected valid to be a bool mask [{len(source)}], got {valid.dtype} {tuple(valid.shape)}"
            )
        logits, own = logits.masked_fill(~valid, lowest(logits)), own * valid
    return soft_cross_entropy(logits, own)


def _products(first: Tensor, second: Tensor) -> Tensor:
    """The dot products `[B, B]` of all rows, in at least float32 whatever autocast says."""
    with torch.autocast(first.device.type, enabled=False):
        return at_least_float32(first) @ at_least_float32(second).T


def _check_paired(source: Tensor, target: Tensor) -> None:
    if source.dim() != 2 or target.dim() != 2 or len(source) != len(target):
        raise ValueError(f"expected source [B, D] and target [B, E], got {tuple(source.shape)}, {tuple(target.shape)}")
