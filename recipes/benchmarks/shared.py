"""Shared by the benchmarks: checks, timing, FLOPs, memory, random models and batches, and the baseline for pairs."""

from __future__ import annotations

import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

import loopitr  # whose names are imported when they are used: --help does not wait for transformers
from loopitr.checks import usable_device
from loopitr.cli import check_output_file

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def check_options(options: Any) -> None:
    """Check the options that all benchmarks have, before anything is timed.

    Raises:
        ValueError: a whole number below 1 (`num_workers`: below 0), a device or an output that cannot be used.
    """
    for name, value in vars(options).items():
        least = 0 if name == "num_workers" else 1
        if type(value) is int and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    usable_device(options.device)
    if options.output:
        check_output_file(options.output)


@dataclass(frozen=True)
class Timing:
    """`seconds` of each round, the `flops` of one call in its own thread, and the `cpu_seconds` of each round, of all
    threads and of child processes that ended."""

    seconds: list[float]
    flops: int
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def ratio(self, other: Timing) -> float:
        """The median over rounds of these seconds divided by those of `other`."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def cpu_ratio(self, other: Timing) -> float:
        """`ratio` of CPU seconds: what is left of it where other programs run on the same cores."""
        return statistics.median(a / b for a, b in zip(self.cpu_seconds, other.cpu_seconds, strict=True))


class _NoModules(ModuleTracker):
    """Counts FLOPs in total, not by module: torch 2.15 fails to track a module called on a view made in no_grad."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def interleaved(calls: Mapping[str, Callable[[], Any]], *, rounds: int, device: str) -> dict[str, Timing]:
    """Time every call once per round, in turn, so that other load affects all of them; counting FLOPs warms up."""
    flops = {}
    for name, call in calls.items():
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _NoModules()
        with counter:
            call()
        flops[name] = counter.get_total_flops()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            before = _cpu_seconds()
            seconds[name].append(seconds_of(calls[name], device))
            cpu[name].append(_cpu_seconds() - before)
        order.reverse()  # so that the order of the calls does not matter
    return {name: Timing(seconds[name], flops[name], cpu[name]) for name in calls}


def seconds_of(call: Callable[[], Any], device: str) -> float:
    """The seconds of a call, until the device has finished it."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def matmul_speed(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the most that this machine reaches at this moment."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: a @ b, device) for _ in range(5))


def peak_memory(device: str) -> int:
    """The peak memory in bytes: what torch allocated on a GPU, or the resident size of this process.

    On Linux, `ru_maxrss` includes the peak of the parent process, so `VmHWM` is read instead.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.M)):
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class ModelSizes(Protocol):
    """The options of a benchmark that `random_model` reads."""

    vision: str
    image_size: int
    hidden_size: int
    text_layers: int
    fusion_layers: int
    device: str


def random_model(options: ModelSizes, *, head_width: int = 32, agreement: int | None = None) -> loopitr.LoopITRModel:
    """A model with random weights and a BERT-like text backbone, in training mode.

    `agreement` is the width of its token agreement, None for a model without it.
    """
    width, heads = options.hidden_size, max(1, options.hidden_size // head_width)
    text = {
        "model_type": "bert",
        "hidden_size": width,
        "num_hidden_layers": options.text_layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "attention_probs_dropout_prob": 0.0,
    }
    config = loopitr.LoopITRConfig(
        vision={"name": options.vision, "image_size": options.image_size},
        text=text,
        vision_pooling="first",
        fusion={"style": "late", "num_layers": options.fusion_layers, "num_heads": heads, "agreement": agreement},
    )
    torch.manual_seed(0)
    model = loopitr.LoopITRModel(config).train()
    model.to(torch.device(options.device))  # type: ignore[arg-type]
    return model


def random_batch(size: int, *, image_size: int, device: str) -> dict[str, Tensor]:
    """The arguments of `LoopObjective.forward`; captions have 14 tokens on average, padded to the longest."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 21, (size,), generator=generator)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    batch = {
        "pixel_values": torch.randn(size, 3, image_size, image_size, generator=generator),
        "input_ids": torch.randint(1000, 30000, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "identities": torch.arange(size),
        "caption_ids": torch.arange(size),
    }
    return {name: value.to(device) for name, value in batch.items()}


class PlainPairs:
    """A baseline for `score_pairs` of a model in style `late`, as published code computes it.

    Pairs form a padded batch, in which each has its own copy of the image tokens, projects its own keys and values, and
    computes every row of every layer.
    """

    def __init__(self, model: loopitr.LoopITRModel) -> None:
        if model.fusion.text is None:
            raise ValueError("the baseline is written for fusion.style 'late'")
        self.model = model

    def __call__(
        self, images: loopitr.ImageState, texts: loopitr.TextState, pairs: Tensor, *, block_size: int | None = None
    ) -> loopitr.PairScores:
        image, text = pairs.to(images.tokens.device).unbind(1)
        logits = self.logits(images.tokens[image], texts.tokens[text], texts.mask[text]).float()
        return loopitr.PairScores(logits=logits, score=logits[:, 1] - logits[:, 0])

    def logits(self, image_tokens: Tensor, text_tokens: Tensor, mask: Tensor) -> Tensor:
        """`image_tokens [P, N, Dv]`, `text_tokens [P, L, D]`, `mask [P, L]` -> `[P, 2]`."""
        fusion, itm_head = self.model.fusion, self.model.itm_head
        assert fusion.text is not None and itm_head is not None
        image_tokens, hidden = fusion.place(image_tokens), text_tokens
        layer: Any
        cross: Any
        for layer, cross in zip(fusion.text, fusion.cross, strict=True):
            parts = layer.parts()
            read = parts.key(hidden), parts.value(hidden)
            attended = _attend(parts.query(hidden), *read, parts.num_heads, mask[:, None, None])
            hidden = parts.attention_norm(parts.dropout(parts.attention_output(attended)) + hidden)
            read = cross.key(image_tokens), cross.value(image_tokens)
            attended = _attend(cross.query(hidden), *read, cross.num_heads, None)
            hidden = cross.norm(cross.dropout(cross.output(attended)) + hidden)
            inner = parts.activation(parts.feed_forward_in(hidden))
            hidden = parts.feed_forward_norm(parts.dropout(parts.feed_forward_out(inner)) + hidden)
        return itm_head(hidden[:, 0])


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, where: Tensor | None) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=where).transpose(1, 2).flatten(2)
