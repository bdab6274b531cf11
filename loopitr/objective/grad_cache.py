"""GradCache (arXiv 2101.06983): the gradient of a large batch in the memory of a chunk of it.

The contrastive loss needs every embed of the batch, but not every activation. So the batch is encoded in chunks
without keeping activations; the losses and their gradients with respect to the encoded batch are computed; then each
chunk is encoded again, with gradient, and backpropagates its part. This costs one more forward pass of the backbones.

It works for mining, matching and distillation too: the tokens are kept like the embeds, and an objective with a
`pair_block` scores pairs in blocks whose activations are recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loopitr.memory import trim_memory
from loopitr.objective.loop_objective import LoopObjective
from loopitr.objective.parts import Encoded, StepOutput

# Arguments of `LoopObjective.encode`.
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_tokens", "text_tokens", "text_pooled")


def cached_backward(
    objective: LoopObjective,
    batch: dict[str, Tensor],
    *,
    chunk_size: int,
    backward: Callable[[StepOutput], None] = lambda output: output.loss.backward(),
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    distillation_scale: float = 1.0,
    with_pairs: bool = True,
) -> StepOutput:
    """A forward and backward pass: parameters get the gradients of `objective(**batch).loss`.

    The gradients are this rank's: the caller averages them over ranks (`distributed.average_gradients`). Dropout is
    the same in both passes over a chunk.

    Args:
        batch: the tensors `[B, ...]` among the arguments of `LoopObjective.forward`.
        chunk_size: the number of pairs encoded at a time.
        backward: starts the backward pass from the loss.
        autocast: makes a context for each forward pass.
        distillation_scale, with_pairs: as in `LoopObjective.forward`.

    Raises:
        ValueError: `chunk_size` is below 1, or batch norm is in training mode.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    check_batch_statistics(objective.model)
    keeps_tokens = (objective.uses_pairs and with_pairs) or objective.predicts_words or objective.compares_tokens
    teaches = with_pairs and distillation_scale > 0
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    starts = range(0, len(batch["input_ids"]), chunk_size)
    chunks = [{name: value[start : start + chunk_size] for name, value in inputs.items()} for start in starts]
    device = batch["input_ids"].device
    states: list[tuple[Tensor, Tensor | None]] = []
    parts: list[Encoded] = []
    for chunk in chunks:
        states.append(_random_state(device))
        # Only the first chunk has gradient: it shows which tensors require one (`_detached` keeps that).
        with torch.set_grad_enabled(not parts), autocast():
            encoded = objective.encode(**chunk, with_teacher=teaches)
        parts.append(_map(_detached, encoded if keeps_tokens else _without_tokens(encoded)))
        del encoded  # The graph is freed with it.
    leaves: Encoded = _map(_joined, *parts)
    with autocast():
        output = objective.compare(
            leaves,
            batch["identities"],
            batch["caption_ids"],
            distillation_scale=distillation_scale,
            with_pairs=with_pairs,
        )
    backward(output)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for start, chunk, state in zip(starts, chunks, states, strict=True):
            _set_random_state(device, state)
            with autocast():
                encoded = objective.encode(**chunk, with_teacher=False)
            _backward_from(encoded, leaves, slice(start, start + chunk_size))
            del encoded
            if device.type == "cpu":
                trim_memory()  # Without this, the fragmented heap grows with each chunk.
    return output


def check_batch_statistics(model: nn.Module) -> None:
    """Check that no module would take the statistics of a chunk for those of the batch.

    Raises:
        ValueError: batch norm is in training mode.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"a batch in chunks needs batch statistics that stay, but {name} takes those of the batch: set "
                "model.hold_batch_statistics, or leave train.chunk_size unset"
            )


def _backward_from(encoded: Encoded, leaves: Encoded, rows: slice) -> None:
    tensors, gradients = [], []

    def collect(x: Tensor, leaf: Tensor) -> None:
        if leaf.grad is not None:  # Tensors that no loss used have no gradient.
            tensors.append(x)
            gradients.append(leaf.grad[rows])

    _map(collect, encoded, leaves)
    if tensors:
        torch.autograd.backward(tensors, gradients)


def _map(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply `function` to every tensor of nested dataclasses, together with the same tensor of each of `others`."""
    if first is None:
        return None
    if isinstance(first, Tensor):
        return function(first, *others)
    names = [field.name for field in fields(first)]
    parts = {name: _map(function, getattr(first, name), *(getattr(o, name) for o in others)) for name in names}
    return replace(first, **parts)


def _detached(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat([part.detach() for part in parts]).requires_grad_(parts[0].requires_grad)


def _without_tokens(encoded: Encoded) -> Encoded:
    def cut(state: Any) -> Any:
        return replace(state, tokens=state.tokens.new_empty(len(state.tokens), 0, state.tokens.shape[-1]))

    return replace(encoded, images=cut(encoded.images), texts=cut(encoded.texts))


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
