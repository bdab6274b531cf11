"""Converts ONNX graphs to int8 with onnxruntime's dynamic quantisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .onnx_files import naming_old_torch, onnx_module, quiet
from .onnx_smoothing import smoothed

# Convolutions are not quantised, since onnxruntime's dynamic int8 convolutions are slower on a CPU.
INT8_OPERATIONS = ["MatMul", "Gather"]


def write_int8(source: Path, target: Path, examples: Sequence[Mapping[str, np.ndarray]] = ()) -> None:
    """Convert a graph to int8 weights in matrix products and word embeddings, with one scale per output channel.

    Activations are quantised when the graph runs (dynamic quantisation), so nothing has to be calibrated. The second
    products of feed-forward layers stay in fp32 (`_narrowing`).

    Args:
        examples: inputs of the graph by name, to make the inputs of its products more equal first (`smoothed`).

    Raises:
        ValueError: this version of torch has exported a graph that cannot be converted.
    """
    quantization = onnx_module("onnxruntime.quantization")
    with quiet(), naming_old_torch():
        kept = _narrowing(source)
        quantization.quantize_dynamic(
            smoothed(source, examples, kept) if examples else str(source),
            str(target),
            op_types_to_quantize=INT8_OPERATIONS,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=kept,
        )


def _narrowing(source: Path) -> list[str]:
    """The matrix products to at most half of their input's width: the second ones of feed-forward layers.

    A few of their inputs are far larger than the others, and one scale for all of them loses the others' digits: on
    Flickr8k this costs half a point of recall (recipes/results/search.md).
    """
    graph = onnx_module("onnx").load(str(source), load_external_data=False).graph
    shapes = {weight.name: list(weight.dims) for weight in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if any(_narrows(shapes.get(name, [])) for name in node.input)]


def _narrows(shape: list[int]) -> bool:
    return len(shape) == 2 and shape[0] >= 2 * shape[1]
