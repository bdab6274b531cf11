"""Token agreement: a cheap second path of the fusion head that compares words with the image regions they attend to.

Words and image tokens are projected to one space of width `A`, and each word attends to the image tokens, the regions.
The squared differences of a word and its attended region are projected to width `S`, which gives the word a score and
a gate. The mean score of the words, weighted by their gates, is one logit per pair.

This follows the similarity attention filtration (SAF) of SGRAF (arXiv 2101.01368) and the word-region similarities of
FILIP (arXiv 2111.07783). A LayerNorm replaces SGRAF's batch norms, whose statistics would make a pair's score depend on
the rest of the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loopitr.models.heads import limit_log_scale, limited_scale, outside_autocast
from loopitr.models.packing import PairLayout, Segments, pack_texts

DIFFERENCE_WIDTH = 64  # S
INITIAL_SCALE, MAX_SCALE = 10.0, 100.0  # Factors on the cosines before the softmax over regions.
# Elements of `[images, rows, A]` that are compared at a time: few enough for a CPU's cache, enough to fill a GPU.
BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS = 2**20, 2**26


class TokenAgreement(nn.Module):
    """One logit per pair from the words of a text and the tokens of an image.

    Example:
        >>> import torch
        >>> from loopitr.models.agreement import TokenAgreement
        >>> agreement = TokenAgreement(text_width=32, image_width=48, width=16)
        >>> regions = agreement.project_regions(torch.randn(3, 9, 48))
        >>> mask = torch.tensor([[True, True, True], [True, True, False]])
        >>> agreement.all_pairs(regions, torch.randn(2, 3, 32), mask).shape
        torch.Size([3, 2])
    """

    def __init__(self, *, text_width: int, image_width: int, width: int, dropout: float = 0.0) -> None:
        """
        Args:
            width: A, the width of the shared space.
            dropout: on the tokens of both sides, since tokens of frozen backbones are quickly overfitted.
        """
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.word = nn.Linear(text_width, width)
        self.region = nn.Linear(image_width, width)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_SCALE).log())
        self.difference = nn.Linear(width, DIFFERENCE_WIDTH)
        # Squared differences of unit vectors are about 1 / A: a larger epsilon would drown them.
        self.norm = nn.LayerNorm(DIFFERENCE_WIDTH, eps=1e-12)
        self.gate = nn.Linear(DIFFERENCE_WIDTH, 1)
        self.score = nn.Linear(DIFFERENCE_WIDTH, 1)

    def project_regions(self, tokens: Tensor) -> Tensor:
        """Image tokens `[B, N, Dv]` -> unit vectors `[B, N, A]`, computed once per image."""
        return F.normalize(self.region(self.dropout(tokens)), dim=-1)

    def project_words(self, tokens: Tensor) -> Tensor:
        """Text tokens `[R, D]` -> unit vectors `[R, A]`, computed once per text."""
        return F.normalize(self.word(self.dropout(tokens)), dim=-1)

    def limit_scale(self) -> None:
        """Keep the trained scale of the cosines within its limit; call this after every optimiser step."""
        limit_log_scale(self.logit_scale, MAX_SCALE)

    def forward(self, packed: Tensor, regions: Tensor, layout: PairLayout) -> Tensor:
        """The logits `[P]` of the pairs of a layout; arguments as of `FusionEncoder.forward`.

        Args:
            packed: `[sum(lengths), D]` text tokens, texts end to end, no padding.
            regions: `[I, N, A]`, one row for each image of the layout.
        """
        words = self.project_words(packed).index_select(0, layout.source)  # [R, A]
        compared = []
        for bucket in layout.images.buckets:
            cut = layout.images.cut(words, bucket)  # [n, M, A]
            compared.append(self.gates_and_scores(cut, layout.images.pick(regions, bucket)))  # [n, M, 2]
        return self._weighted_mean(layout.images.scatter(compared), layout.texts)  # [P]

    def all_pairs(self, regions: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """The logits `[B, T]` of every image with every text, a block of images at a time.

        With gradient, blocks are recomputed in the backward pass, so that memory does not grow with `B x T`.

        Args:
            regions: `[B, N, A]`.
            tokens: `[T, L, D]`; `mask [T, L]` says which of them are real.

        Raises:
            ValueError: a text without a token.
        """
        texts = pack_texts(mask.cpu()).to(tokens.device)
        words = self.project_words(tokens.flatten(0, 1).index_select(0, texts.tokens))  # [R, A]
        room = BLOCK_ELEMENTS if regions.device.type == "cpu" else GPU_BLOCK_ELEMENTS
        blocks = regions.split(max(1, room // max(1, words.numel())))
        if len(blocks) == 1 or not torch.is_grad_enabled():
            compared = [self.gates_and_scores(words, block) for block in blocks]
        else:
            compared = [
                checkpoint(self.gates_and_scores, words, block, use_reentrant=False, preserve_rng_state=False)
                for block in blocks
            ]
        return self._weighted_mean(torch.cat(compared).transpose(0, 1), texts.segments).T  # [B, T]

    def activation_elements(self, rows: int, images: int, num_tokens: int, *, projected: bool) -> int:
        """About how many elements `forward` holds at once without gradient, for `rows` words of pairs.

        Args:
            projected: whether the images come with regions.
        """
        width = self.word.weight.shape[0]
        return rows * (5 * width + 2 * num_tokens) + (1 if projected else 2) * images * num_tokens * width

    def gates_and_scores(self, words: Tensor, regions: Tensor) -> Tensor:
        """The gate (a logit) and score `[n, M, 2]` of each word with its image.

        Args:
            words: `[n, M, A]`, or `[M, A]`: the same words for all images.
            regions: `[n, N, A]`.
        """
        scale = limited_scale(self.logit_scale, MAX_SCALE)
        weights = (scale * words @ regions.transpose(1, 2)).softmax(-1)  # [n, M, N]
        attended = weights.to(regions.dtype) @ regions  # [n, M, A]
        differences = self.norm(self.difference((words - attended).square()))  # [n, M, S]
        return torch.cat([outside_autocast(head, differences) for head in (self.gate, self.score)], -1)  # [n, M, 2]

    def _weighted_mean(self, compared: Tensor, texts: Segments) -> Tensor:
        """The mean score of each text's words, weighted by their gates: `[rows, ..., 2]` -> `[P, ...]`."""
        gates, scores = compared.float().unbind(-1) if compared.itemsize < 4 else compared.unbind(-1)
        gates = gates.sigmoid()
        sums = []
        for bucket in texts.buckets:
            parts = torch.stack([texts.cut(gates, bucket), texts.cut(gates * scores, bucket)])  # [2, n, M, ...]
            if bucket.mask is not None:
                mask = bucket.mask.view(*bucket.mask.shape, *[1] * (parts.ndim - 3))
                parts = torch.where(mask, parts, 0.0)
            sums.append(parts.sum(2).transpose(0, 1))  # [n, 2, ...]
        total, weighted = texts.unpick(sums).unbind(1)  # [P, ...]
        return weighted / total.clamp(min=torch.finfo(total.dtype).tiny)
