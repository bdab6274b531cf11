"""LoRA (arXiv 2106.09685) on the backbones: their weights are frozen, and small matrices next to them are trained.

peft replaces layers in place, so the network keeps its classes. `config.lora` holds the full names of the adapted
layers, from which a saved folder is rebuilt (this needs the extra `lora`). `merge_lora` makes a plain model again.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from loopitr.models.dry_run import dry_run

if TYPE_CHECKING:
    from loopitr.models.dual_encoder import DualEncoder
    from loopitr.models.loop_model import LoopITRModel

INSTALL = 'pip install "loopitr[lora]"'
BASE = ".base_layer."

Model = TypeVar("Model", bound=PreTrainedModel)


def add_lora(
    model: LoopITRModel,
    *,
    vision_rank: int = 0,
    text_rank: int = 0,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
) -> None:
    """Add new adapters to a model's backbones; until the first training step its outputs do not change.

    Args:
        vision_rank, text_rank: the ranks of the updates; 0 leaves that backbone as it is.
        alpha: updates are scaled by alpha / rank; None: twice the rank.
        dropout: on the inputs of the adapters.
        targets: names of linear layers or convolutions, or the ends of such names (`query`; `attn.proj`, since `proj`
            alone matches the patch embedding too); None: every linear layer that the backbone runs.

    Raises:
        ValueError: the model has adapters already, a backbone is frozen, or a target cannot be adapted.
        ModuleNotFoundError: peft is not installed.
    """
    ranks = {part: rank for part, rank in (("vision", vision_rank), ("text", text_rank)) if rank}
    if model.config.lora:
        raise ValueError("the model has LoRA adapters already: train those, or merge them first (merge_lora)")
    for part in ranks:
        if part in model.frozen:
            raise ValueError(f"{part} is frozen, so it cannot learn adapters: model.freeze must not name it")
    layers = {part: _layers_that_run(part, getattr(model.dual, part)) for part in ranks}
    for target in targets or ():
        if not any(_is_called(name, target) for names in layers.values() for name in names):
            endings = sorted({name.rpartition(".")[2] for names in layers.values() for name in names})
            raise ValueError(f"model.lora.targets: no layer is called {target!r}; layers end in {', '.join(endings)}")
    described = {
        part: {
            "rank": rank,
            "alpha": float(2 * rank if alpha is None else alpha),
            "dropout": dropout,
            "modules": _chosen(part, layers[part], targets),
        }
        for part, rank in ranks.items()
    }
    inject_lora(model.dual, described)
    model.config.lora, model.dual.config.lora = described, copy.deepcopy(described)
    model.train(model.training)


def inject_lora(dual: Any, described: dict[str, dict[str, Any]]) -> None:
    """Replace the layers of a dual encoder, or of one of its towers, that `config.lora` describes."""
    try:
        peft = importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"LoRA adapters need peft: {INSTALL}", name="peft") from error
    for part, lora in described.items():
        backbone = getattr(dual, part)
        config = peft.LoraConfig(
            r=lora["rank"],
            lora_alpha=lora["alpha"],
            lora_dropout=lora["dropout"],
            # A pattern is needed because a list would match the ends of names too.
            target_modules="|".join(map(re.escape, lora["modules"])),
        )
        peft.inject_adapter_in_model(config, backbone.model)
        module: Any
        for name, module in backbone.named_modules():
            if is_adapter(name):
                module._is_hf_initialized = True  # transformers' initialisation would make the update nonzero.
    if "vision" in described:
        dual.vision.hold_statistics = True  # Batch statistics are part of the frozen backbone.


def freeze_adapted(dual: DualEncoder) -> None:
    """Freeze everything but the adapters in the backbones that have them."""
    for part in dual.config.lora or ():
        for name, parameter in getattr(dual, part).named_parameters():
            parameter.requires_grad_(is_adapter(name))


def is_adapter(name: str) -> bool:
    """Whether a parameter or module of this name is part of an adapter."""
    return ".lora_" in name


def merge_lora(model: Model) -> Model:
    """A copy with the adapters merged into the weights, on the same device: equal outputs, without peft."""
    config = copy.deepcopy(model.config)
    config.lora = None
    with torch.random.fork_rng(devices=[]):  # The random initial weights are replaced below.
        plain: Any = type(model)(config)
    plain.to(device=model.device, dtype=model.dtype)
    plain.load_state_dict(_merged_weights(model))
    return plain.train(model.training)


@torch.no_grad()
def _merged_weights(model: nn.Module) -> dict[str, Tensor]:
    weights = {
        name.replace(BASE, "."): value.detach() for name, value in model.state_dict().items() if not is_adapter(name)
    }
    module: Any
    for name, module in model.named_modules():
        if hasattr(module, "base_layer"):
            weight = module.base_layer.weight
            delta = module.get_delta_weight(module.active_adapters[0])
            weights[f"{name}.weight"] = (weight.float() + delta.float()).to(weight.dtype)
    return weights


def _layers_that_run(part: str, backbone: Any) -> dict[str, nn.Module]:
    """The linear layers and convolutions of a backbone that a dry run calls, by name.

    Adapters of other layers would get no gradient: a pooling head may be unused, and some timm models use
    `layer.weight` without calling the layer.
    """
    weight = next(backbone.parameters())
    with dry_run(backbone) as called:
        if part == "vision":
            blank = torch.zeros(1, 3, backbone.image_size, backbone.image_size)
            backbone.pool(backbone(blank.to(weight)))
        else:
            ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
            backbone.pool(backbone(ids, torch.ones_like(ids)), torch.ones_like(ids))
    modules = backbone.model.named_modules()
    return {name: m for name, m in modules if m in called and isinstance(m, (nn.Linear, nn.Conv2d))}


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _chosen(part: str, layers: dict[str, nn.Module], targets: Sequence[str] | None) -> list[str]:
    if targets is None:
        chosen = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        if not chosen:
            raise ValueError(f"model.lora.{part}_rank: no linear layer there; name convolutions in model.lora.targets")
        return chosen
    chosen = [name for name in layers if any(_is_called(name, target) for target in targets)]
    if not chosen:
        raise ValueError(f"model.lora.{part}_rank: no layer there is called {', '.join(targets)} (model.lora.targets)")
    for name in chosen:
        layer: Any = layers[name]
        if isinstance(layer, nn.Conv2d) and (layer.groups > 1 or type(layer).forward is not nn.Conv2d.forward):
            kind = f"{type(layer).__name__} of {layer.groups} groups"
            raise ValueError(f"model.lora.targets: {name} cannot be adapted: a {kind}, wanted a Linear or plain Conv2d")
    return chosen
