"""Pure loss functions on score tensors: no modules, no collectives, no device synchronisation.

Every loss is a scalar computed in at least float32. With no valid entry it is zero, finite and attached to the graph.
"""

from .agreement import kendall_tau
from .contrastive import itc_loss, siglip_loss, soft_cross_entropy
from .distillation import (
    DistillationLoss,
    PartialRanking,
    WholeList,
    adr_mse,
    cprd,
    hard_above_mean,
    hard_above_threshold,
    hard_top,
    kl,
    listmle,
    listnet,
    margin_mse,
    ranknet,
)
from .matching import IGNORE_INDEX, balanced_itm_loss, itm_accuracy, itm_loss, lce_loss, mlm_loss
from .structure import cmc_loss, cmd_loss

__all__ = [
    "IGNORE_INDEX",
    "DistillationLoss",
    "PartialRanking",
    "WholeList",
    "adr_mse",
    "balanced_itm_loss",
    "cmc_loss",
    "cmd_loss",
    "cprd",
    "hard_above_mean",
    "hard_above_threshold",
    "hard_top",
    "itc_loss",
    "itm_accuracy",
    "itm_loss",
    "kendall_tau",
    "kl",
    "lce_loss",
    "listmle",
    "listnet",
    "margin_mse",
    "mlm_loss",
    "ranknet",
    "siglip_loss",
    "soft_cross_entropy",
]
