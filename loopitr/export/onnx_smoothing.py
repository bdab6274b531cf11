"""Moves large inputs of matrix products into their weights, before both become int8.

In a text encoder a few channels of the inputs, always the same ones, are up to twenty times as large as the others.
With one scale for the whole input, most channels are then left with a few of the 256 steps. Dividing each channel by a
factor, and multiplying the rows of the weights by it, gives the same products from numbers that are more equal
(SmoothQuant, arXiv 2211.10438).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .onnx_files import onnx_module
from .onnx_running import onnx_session

STRENGTH = 0.6  # the part of an input's range that its weights take over; 0.5 to 0.7 are as good on Flickr8k
LARGEST = 2**30  # bytes of a file; larger graphs are stored in two files, and are left as they are


def smoothed(source: Path, examples: Sequence[Mapping[str, np.ndarray]], kept: Collection[str]) -> Any:
    """The graph in `source`, with the same outputs and with inputs of matrix products whose channels are more equal.

    It is a model, or the path if the graph is left as it is.

    Args:
        examples: inputs of the graph by name, from which the largest value of each channel is taken.
        kept: the names of matrix products that are not quantised, and stay as they are.
    """
    onnx = onnx_module("onnx")
    model = onnx.load(str(source), load_external_data=False)
    if source.stat().st_size > LARGEST or any(one.external_data for one in model.graph.initializer):
        return str(source)
    weights = {one.name: one for one in model.graph.initializer}
    products = _products(model.graph, weights, kept)
    if not products:
        return model
    for name, largest in _largest(model, [*products], examples).items():
        _smooth(model.graph, name, products[name], weights, largest)
    return model


def _products(graph: Any, weights: Mapping[str, Any], kept: Collection[str]) -> dict[str, list[Any]]:
    """The matrix products of each layer norm's output with weights that only they use."""
    norms = {node.output[0] for node in graph.node if node.op_type == "LayerNormalization"}
    uses = Counter(name for node in graph.node for name in node.input)
    products: dict[str, list[Any]] = {}
    for node in graph.node:
        quantised = node.op_type == "MatMul" and node.name not in kept
        if quantised and node.input[0] in norms and node.input[1] in weights:
            products.setdefault(node.input[0], []).append(node)
    return {
        name: nodes
        for name, nodes in products.items()
        if all(uses[node.input[1]] == 1 and len(weights[node.input[1]].dims) == 2 for node in nodes)
    }


def _largest(model: Any, names: list[str], examples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The largest absolute value of each channel of the tensors `names`: `[D]` of each."""
    onnx = onnx_module("onnx")
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    outputs = {one.name for one in probe.graph.output}
    for name in names:
        if name not in outputs:
            probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnx_session(probe.SerializeToString())
    largest: dict[str, np.ndarray] = {}
    for example in examples:
        for name, value in zip(names, session.run(names, dict(example)), strict=True):
            own = np.abs(value).reshape(-1, value.shape[-1]).max(0)
            largest[name] = np.maximum(largest.get(name, own), own)
    return largest


def _smooth(graph: Any, name: str, products: list[Any], weights: Mapping[str, Any], largest: np.ndarray) -> None:
    """Divide the tensor `name` by a factor for each channel, and multiply the weights of its products by it."""
    onnx = onnx_module("onnx")
    values = [onnx.numpy_helper.to_array(weights[node.input[1]]) for node in products]  # each [D, O]
    rows = np.max([np.abs(value).max(1) for value in values], axis=0)  # [D]
    logarithm = STRENGTH * np.log(np.maximum(largest, 1e-5)) - (1 - STRENGTH) * np.log(np.maximum(rows, 1e-5))
    factor = np.exp(logarithm - logarithm.mean()).astype(np.float32)
    for node, value in zip(products, values):
        weights[node.input[1]].CopyFrom(onnx.numpy_helper.from_array(value * factor[:, None], node.input[1]))
        node.input[0] = f"{name}_smoothed"
    graph.initializer.append(onnx.numpy_helper.from_array(1 / factor, f"{name}_factor"))
    product = onnx.helper.make_node("Mul", [name, f"{name}_factor"], [f"{name}_smoothed"], name=f"{name}_smoothing")
    place = next(index for index, node in enumerate(graph.node) if name in node.output)
    graph.node.insert(place + 1, product)
