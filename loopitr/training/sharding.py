"""Training under FSDP 2: each rank holds a shard of the weights, gradients and optimiser state.

`accelerate launch --use_fsdp --fsdp_version 2` starts it, and accelerate shards the objective. This module does the
rest: torch cannot shard a scalar, a validation needs the whole model, and batch statistics differ between ranks.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.checkpointing import save_accelerator_state
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    is_torch_version,
    parse_flag_from_env,
    save_fsdp_model,
    save_fsdp_optimizer,
)
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from loopitr.data import stable_hash
from loopitr.distributed import world_size
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.text_backbone import bert_layers
from loopitr.objective.loop_objective import LoopObjective

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
# Older versions do not find the tensors in the dataclass that an objective returns, and would not reduce its gradients.
MIN_TORCH = "2.14"


def prepare_environment() -> None:
    """Set FSDP's environment variables before accelerate and transformers read them.

    Every rank builds or loads the whole model, and checkpoints hold whole tensors, which torch reads without
    unpickling.

    Raises:
        ValueError: FSDP 1, offloading to the CPU, wrapping by size, or a version of torch that is too old.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP 1 is not supported: launch with --fsdp_version 2 (fsdp_config.fsdp_version: 2), or DDP")
    if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("FSDP's offloading of weights to the CPU is not supported: launch without it")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise ValueError(
            "FSDP can wrap layers, not parts by size: use --fsdp_auto_wrap_policy NO_WRAP or TRANSFORMER_BASED_WRAP"
        )
    if not is_torch_version(">=", MIN_TORCH):
        raise ValueError(f"FSDP needs torch {MIN_TORCH} or newer, this is {torch.__version__}: launch with DDP")
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def configure_fsdp(accelerator: Accelerator) -> None:
    """Enable FSDP on CPUs, where accelerate ignores it, and keep weights in float32 as under DDP.

    Raises:
        ValueError: FSDP for one process, or activation checkpointing by accelerate.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    state: Any = accelerator.state
    if accelerator.num_processes == 1:
        raise ValueError(
            "FSDP shards over processes, and this is the only one: launch with --num_processes or without it"
        )
    if state.distributed_type == DistributedType.MULTI_CPU:  # to test a setup without GPUs
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # accelerate copies the state from `PartialState` again and again, so both are set.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    if state.fsdp_plugin.activation_checkpointing:
        raise ValueError("FSDP's activation checkpointing is not supported: use train.gradient_checkpointing")
    # Autocast lowers the precision only where that is safe; the policy would lower it for temperature and losses too.
    state.fsdp_plugin.mixed_precision_policy = None


def check_sharding(objective: LoopObjective, accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: the teacher has its own model, and weights are sharded.
    """
    kind = accelerator.distributed_type
    if objective.own_teacher is not None and kind in SHARDED:
        name = objective.own_teacher.name
        raise ValueError(f"objective.teacher {name!r} works with DDP, not with {kind.value}")


def ready_for_ranks(objective: LoopObjective, accelerator: Accelerator, *, seed: int) -> None:
    """Change the objective for several ranks; call this before accelerate prepares it.

    From here on, every rank draws its own dropout, hidden words and random negatives. On GPUs, batch statistics become
    those of all ranks. For FSDP, every rank gets rank 0's weights, as under DDP, and scalar parameters become vectors
    of length 1.

    Raises:
        ValueError: FSDP is asked to wrap layers whose `forward` is not called.
    """
    if accelerator.process_index > 0:  # Rank 0 goes on as a process alone.
        torch.manual_seed(stable_hash(f"{seed}/rank {accelerator.process_index}"))
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        convert_sync_batchnorm(objective.model)  # torch's own would drop timm's fused activations
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    objective.to(accelerator.device)  # NCCL takes nothing from a CPU
    for tensor in (*objective.parameters(), *objective.buffers()):
        dist.broadcast(tensor.data, src=0)
    vectors_for_scalars(objective)
    layers = whole_layers(objective.model)
    objective._no_split_modules = layers  # type: ignore[assignment]  # where accelerate looks
    for name in accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap or ():
        if name not in layers:
            raise ValueError(f"FSDP can wrap layers of {' and '.join(layers) or 'no class'}, not {name!r}")


def vectors_for_scalars(module: nn.Module) -> None:
    """Make each scalar parameter a vector of length 1, which can be sharded."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.ndim == 0:
                setattr(part, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


def whole_layers(model: LoopITRModel) -> list[str]:
    """The classes of the layers whose `forward` is called, which FSDP needs to gather their weights.

    A `shared` fusion head calls parts of the text backbone's layers.
    """
    layers = [*getattr(model.dual.vision.model, "blocks", ())]
    if model.config.fusion["style"] != "shared":
        layers += bert_layers(model.dual.text.model) or []
    return sorted({type(layer).__name__ for layer in layers})


def parts_of_state(accelerator: Accelerator, folder: Path) -> list[Callable[[], object]]:
    """Functions that together write the state of all that accelerate has prepared to `folder`; call them in order.

    After each, the ranks can tell each other whether it succeeded. `accelerator.save_state` would hang: it gathers the
    optimiser's shards even from a rank that could not write the weights.
    """
    if not getattr(accelerator, "is_fsdp2", False):
        return [partial(accelerator.save_state, str(folder))]
    plugin, path = accelerator.state.fsdp_plugin, str(folder)
    model, optimizer = accelerator._models[0], accelerator._optimizers[0]
    rest = [accelerator.process_index, accelerator.step, accelerator.scaler]
    return [
        partial(save_fsdp_model, plugin, accelerator, model, path),
        partial(save_fsdp_optimizer, plugin, accelerator, optimizer, model, path),
        partial(save_accelerator_state, path, [], [], [], [], *rest),
    ]


class WholeModel:
    """The unsharded model, to validate and save: under FSDP a copy that is kept on the CPU, otherwise the model itself.

    A copy shares the config of its model.
    """

    def __init__(self, objective: LoopObjective, accelerator: Accelerator) -> None:
        """Call this before accelerate prepares the objective.

        Raises:
            ValueError: the teacher has its own model, and weights are sharded.
        """
        check_sharding(objective, accelerator)
        model = objective.model
        self.source, self.model, self.device = model, model, accelerator.device
        self.is_copy = accelerator.distributed_type == DistributedType.FSDP
        if self.is_copy:
            shared = {id(config): config for config in (model.config, model.dual.config)}
            self.model = copy.deepcopy(model, shared)

    @contextmanager
    def at_hand(self) -> Iterator[LoopITRModel]:
        """The model with its current weights and rank 0's batch statistics, on the device. All ranks call this."""
        if not self.is_copy:
            for buffer in self.model.buffers() if world_size() > 1 else ():
                dist.broadcast(buffer, src=0)
            yield self.model
            return
        self._gather()
        try:
            yield self.model.to(self.device)
        finally:
            self.model.to("cpu")  # type: ignore[arg-type]

    @torch.no_grad()
    def _gather(self) -> None:
        own = self.model.state_dict()
        for name, tensor in self.source.state_dict().items():
            own[name].copy_(whole(tensor).reshape(own[name].shape))


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard, or all of a tensor that is not sharded."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, or rank 0's copy of an unsharded one (batch statistics). All ranks call this."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()  # type: ignore[no-any-return]
    dist.broadcast(tensor.data, src=0)
    return tensor
