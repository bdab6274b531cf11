"""Training under FSDP 2: each rank holds a shard of the weights, gradients and optimiser state.

`accelerate launch --use_fsdp --fsdp_version 2` starts it, and accelerate shards the objective. This module does the
rest: torch cannot shard a scalar, a validation needs the whole model, and batch statistics differ between ranks.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, is_torch_version, parse_flag_from_env
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from loopitr.models.loop_model import LoopITRModel
from loopitr.objective.loop_objective import LoopObjective

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
# Older versions do not find the tensors in the dataclass that an objective returns, and would not reduce its gradients.
MIN_TORCH = "2.14"


def prepare_environment() -> None:
    """Set FSDP's environment variables before accelerate and transformers read them.

    Every rank builds or loads the whole model, and checkpoints hold whole tensors, which torch reads without
    unpickling.

    Raises:
        ValueError: FSDP 1, or a version of torch that is too old.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP 1 is not supported: launch with --fsdp_version 2 (fsdp_config.fsdp_version: 2), or DDP")
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


def ready_for_ranks(objective: LoopObjective, accelerator: Accelerator) -> None:
    """Change the objective for several ranks; call this before accelerate prepares it.

    On GPUs, batch statistics become those of all ranks. For FSDP, every rank gets rank 0's weights, as under DDP, and
    scalar parameters become vectors of length 1.
    """
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        convert_sync_batchnorm(objective.model)  # torch's own would drop timm's fused activations
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    for tensor in (*objective.parameters(), *objective.buffers()):
        dist.broadcast(tensor.data, src=0)
    for module in objective.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


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
        """The model with its current weights, on the device. All ranks call this together."""
        if not self.is_copy:
            yield self.model
            return
        self._gather()
        try:
            yield self.model.to(self.device)
        finally:
            self.model.to("cpu")

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
