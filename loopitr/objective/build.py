"""Builds the objects of a step from its options: terms, teacher, miner, objective."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from loopitr.objective import losses
from loopitr.objective.contrastive_terms import Contrastive, SigmoidContrastive
from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.losses.distillation import WHOLE_LIST_LOSSES
from loopitr.objective.mining import Miner, Sample, Stratified, TopK
from loopitr.objective.options import ObjectiveOptions
from loopitr.objective.structure_terms import FrozenContrast, StructureTransfer
from loopitr.objective.teachers import Frozen, Match, MatchPlusSimilarity, Momentum, Teacher
from loopitr.objective.terms import (
    Agreement,
    Distillation,
    Matching,
    Ranking,
    Term,
    WordPrediction,
)
from loopitr.objective.word_masking import TokenMasking, common_tokens, token_masking

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loopitr.models.loop_model import LoopITRModel


def build_objective(
    model: LoopITRModel,
    options: ObjectiveOptions | None = None,
    *,
    masking: TokenMasking | None = None,
    pair_block: int | None = None,
    teacher: Teacher | None = None,
) -> LoopObjective:
    """The objective that the options describe.

    Args:
        masking: the word masking for `options.mlm` (`build_masking`).
        pair_block: the number of pairs scored at a time; None: all.
        teacher: None: the one that `options.teacher` names.

    Raises:
        ValueError: the model lacks a head that a term needs.

    Example (`model` and `batch` as in the example of `LoopObjective`):
        >>> from loopitr import build_objective
        >>> from loopitr.objective.options import ObjectiveOptions
        >>> objective = build_objective(model, ObjectiveOptions(distillation_loss="kl", num_negatives=1))
        >>> list(objective(**batch).terms)
        ['itc', 'itm', 'distillation']
    """
    options = options or ObjectiveOptions()
    return LoopObjective(
        model,
        build_terms(options, masking, teacher or build_teacher(options, model)),
        miner=build_miner(options),
        mine_across_ranks=options.mine_across_ranks,
        pair_block=pair_block,
        sum_dropout=options.sum_dropout if options.train_on_sum else None,
    )


def build_masking(
    tokenizer: PreTrainedTokenizerBase, options: ObjectiveOptions, captions: Iterable[str] | None
) -> TokenMasking | None:
    """The word masking for `options.mlm`; None if the tokenizer has no mask token.

    Args:
        captions: those of the training data, read only for `mlm_words: content`; None: the data are a stream.

    Raises:
        ValueError: `mlm_words: content` with a stream.
    """
    common: tuple[int, ...] = ()
    if options.mlm and options.mlm_words == "content":
        if captions is None:
            raise ValueError("objective.mlm_words 'content' counts words in all captions, which a stream does not show")
        common = common_tokens(tokenizer, captions, options.mlm_common)
    return token_masking(tokenizer, options.mlm_probability, common_ids=common)


def build_teacher(
    options: ObjectiveOptions, model: LoopITRModel, *, load: Callable[[str], LoopITRModel] | None = None
) -> Teacher | None:
    """The teacher that `options.teacher` names; None without distillation.

    Args:
        model: the student.
        load: reads the model of `options.teacher_model`.

    Raises:
        ValueError: a frozen teacher does not fit the model, or there is no `load` to read it.
    """
    if not options.distillation_weight:
        return None
    if options.teacher == "momentum":
        return Momentum(model, decay=options.momentum)
    if options.teacher == "frozen":
        path = str(options.teacher_model)
        if load is None:
            raise ValueError(f"objective.teacher 'frozen' needs the model in {path}: pass it as Frozen(model)")
        return Frozen(load(path), student=model, source=f"objective.teacher_model {path}")
    return Match() if options.teacher == "match" else MatchPlusSimilarity()


def build_terms(
    options: ObjectiveOptions, masking: TokenMasking | None = None, teacher: Teacher | None = None
) -> list[Term]:
    """The terms whose weight is above 0."""
    contrastive = Contrastive if options.itc_loss == "softmax" else SigmoidContrastive
    terms: list[Term] = [
        contrastive(options.itc, tuple(options.matryoshka_dims)),
        Matching(options.itm, balanced=options.balance_itm, negatives=options.itm_negatives),
        Ranking(options.lce, negatives=options.itm_negatives),
        Distillation(
            distillation_loss(options), options.distillation_weight, teacher=teacher, margin=options.teacher_margin
        ),
        StructureTransfer(options.cmd, source=options.structure_source),
        FrozenContrast(options.cmc, source=options.structure_source),
        WordPrediction(masking, options.mlm or 0.0),
        Agreement(options.agreement or 0.0),
    ]
    return [term for term in terms if term.weight]


def build_miner(options: ObjectiveOptions) -> Miner:
    """The miner that `options.mining` names."""
    miners: dict[str, Miner] = {
        "topk": TopK(options.num_negatives),
        "sample": Sample(options.num_negatives),
        "stratified": Stratified(options.num_negatives, options.mining_pool),
    }
    return miners[options.mining]


def distillation_loss(
    options: ObjectiveOptions,
) -> losses.DistillationLoss | Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The loss that `options.distillation_loss` names."""
    hard_rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "threshold": partial(losses.hard_above_threshold, probability=options.hard_threshold),
        "mean": losses.hard_above_mean,
        "top": partial(losses.hard_top, m=options.hard_top),
    }
    with_options: dict[str, losses.DistillationLoss | Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "kl": partial(losses.kl, teacher_temperature=options.teacher_temperature),
        "cprd": losses.PartialRanking(hard_rules[options.hard_rule]),
    }
    name = options.distillation_loss
    return with_options.get(name) or WHOLE_LIST_LOSSES[name]
