"""A backbone that is made faster for use: convolutions take over what the batch norms behind them do."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loopitr.models.image_backbone import VisionBackbone

TOLERANCE = 1e-5  # of tokens, as a part of the largest of them
WORTHWHILE = 64  # images: copying takes as long as encoding a few


class _Normed(nn.Module):
    """What is left of a timm batch norm that a convolution has taken over: its activation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.act = getattr(norm, "act", None) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


@torch.inference_mode(False)
@torch.no_grad()
def folded(vision: VisionBackbone, count: int) -> VisionBackbone:
    """What encodes `count` images fastest: `vision` itself, or a copy with the same tokens in eval mode.

    A convolutional network in float32 on a CPU is a seventh faster without its batch norms. Which of them follows which
    convolution is read off a run, and the copy is compared with the original: if its tokens differ by more than
    `TOLERANCE`, it is not used.
    """
    weight = next(vision.parameters())
    other = weight.device.type != "cpu" or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    norms = any(isinstance(module, _BatchNorm) for module in vision.modules())
    if count < WORTHWHILE or other or vision.training or not norms:
        return vision
    size = vision.image_size
    noise = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    copied = copy.deepcopy(vision)
    _fold(copied, noise)
    copied.to(memory_format=vision.memory_format)
    wanted = vision(noise)
    difference = (copied(noise) - wanted).abs().max()
    return copied if difference <= TOLERANCE * wanted.abs().max() else vision


def _fold(vision: VisionBackbone, pixels: Tensor) -> None:
    """Fold each batch norm that is called once, on what a convolution that is called once has just given."""
    made: dict[int, tuple[nn.Conv2d, Tensor]] = {}  # by the identity of its output, which is kept so that it is unique
    pairs: list[tuple[nn.Conv2d, _BatchNorm]] = []
    calls: list[nn.Module] = []

    def watch(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            made[id(output)] = module, output
        elif isinstance(module, _BatchNorm) and id(given[0]) in made:
            pairs.append((made[id(given[0])][0], module))
        else:
            return
        calls.append(module)

    hooks = [module.register_forward_hook(watch) for module in vision.modules()]
    vision(pixels)
    for hook in hooks:
        hook.remove()
    names = {module: name for name, module in vision.named_modules()}
    for convolution, norm in pairs:
        if calls.count(convolution) == calls.count(norm) == 1 and norm.running_var is not None:
            _merge(convolution, norm)
            parent, _, own = names[norm].rpartition(".")
            setattr(vision.get_submodule(parent), own, _Normed(norm))


def _merge(convolution: nn.Conv2d, norm: _BatchNorm) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.double(), shift * norm.weight.double() + norm.bias.double()
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * scale
    weight = convolution.weight.double() * scale[:, None, None, None]
    convolution.weight = nn.Parameter(weight.to(convolution.weight.dtype), requires_grad=False)
    convolution.bias = nn.Parameter(shift.to(convolution.weight.dtype), requires_grad=False)
