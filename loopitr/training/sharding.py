"""A run under FSDP 2: weights, gradients and optimiser state in shards, one on each rank.

`accelerate launch --use_fsdp --fsdp_version 2` asks for it, and accelerate shards the objective. What is left to do is
here: torch cannot shard a scalar, a validation needs the model in one piece, and batch statistics differ between ranks.
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
# Older ones do not look for tensors in what an objective returns, and would leave its gradients alone.
NEWEST_TRIED = "2.14"


def prepare_environment() -> None:
    """What FSDP has to be told before accelerate and transformers look at their variables.

    Every rank builds or loads the whole model. Checkpoints hold whole tensors, which torch reads without unpickling.

    Raises:
        ValueError: FSDP 1, or a torch that is too old.
    """
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("FSDP 1 is not supported: launch with --fsdp_version 2 (fsdp_config.fsdp_version: 2), or DDP")
    if not is_torch_version(">=", NEWEST_TRIED):
        raise ValueError(f"FSDP needs torch {NEWEST_TRIED} or newer, this is {torch.__version__}: launch with DDP")
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


def settle(accelerator: Accelerator) -> None:
    """Take FSDP up where accelerate leaves it out (on CPUs), and keep weights in float32 as under DDP.

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
    if state.distributed_type == DistributedType.MULTI_CPU:  # for a rehearsal without GPUs
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # The later of the two is made of the earlier one again and again.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    if state.fsdp_plugin.activation_checkpointing:
        raise ValueError("FSDP's activation checkpointing is not supported: use train.gradient_checkpointing")
    # Autocast halves what may be halved; the policy would halve temperature and losses too.
    state.fsdp_plugin.mixed_precision_policy = None


def check_sharding(objective: LoopObjective, accelerator: Accelerator) -> None:
    """
    Raises:
        ValueError: a teacher with a model of its own where weights are sharded.
    """
    kind = accelerator.distributed_type
    if objective.own_teacher is not None and kind in SHARDED:
        name = objective.own_teacher.name
        raise ValueError(f"objective.teacher {name!r} works with DDP, not with {kind.value}")


def ready_for_ranks(objective: LoopObjective, accelerator: Accelerator) -> None:
    """Call this before accelerate has the objective: what one process does without.

    On GPUs, batch statistics become those of all ranks. Where FSDP is to shard it, every rank gets rank 0's weights, as
    under DDP, and scalars become vectors of one.
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
    """The model in one piece, to validate and save: itself, or of a sharded one a copy that waits on the CPU."""

    def __init__(self, objective: LoopObjective, accelerator: Accelerator) -> None:
        """Call this before accelerate has the objective. The copy shares its model's config.

        Raises:
            ValueError: a teacher with a model of its own where weights are sharded.
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
        """The model as it is now, on the device; all ranks together."""
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
    """All of a sharded tensor, or rank 0's of one that is not sharded (batch statistics); all ranks together."""
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor()  # type: ignore[no-any-return]
    dist.broadcast(tensor.data, src=0)
    return tensor
