"""Writes ONNX files with `torch.onnx.export`, and converts them to fp16 and int8 with onnxruntime's tools."""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

INSTALL = 'pip install "loopitr[onnx]"'
OPSET = 20
TESTED_TORCH = "2.14"  # With 2.6 and 2.8 some graphs cannot be exported.
# Convolutions are not quantised, since onnxruntime's dynamic int8 convolutions are slower on a CPU.
INT8_OPERATIONS = ["MatMul", "Gather"]


def onnx_module(name: str) -> Any:
    """A module of the extra `onnx`.

    Raises:
        ModuleNotFoundError: it is not installed; the error says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"ONNX needs {error.name or name}: {INSTALL}", name=error.name) from error


def check_installed() -> None:
    """Check that the packages of the extra `onnx` are installed.

    Raises:
        ModuleNotFoundError: a package that writes or runs ONNX is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        onnx_module(name)


def write_graph(
    graph: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    axes: Mapping[str, Mapping[int, str]],
    path: Path,
) -> None:
    """Write a module whose inputs and outputs are tensors.

    Args:
        inputs: examples by name, in the order of the module's arguments; dynamic axes must have a size of at least 2.
        outputs: the names of the outputs.
        axes: the names of the dynamic axes of each input.

    Raises:
        ValueError: this version of torch cannot export the module.
    """
    with _quiet(), _naming_old_torch(), torch.no_grad():
        program: Any = torch.onnx.export(
            graph.eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=tuple(axes[name] for name in inputs),
            verbose=False,
        )
        program.save(str(path))


def write_fp16(source: Path, target: Path) -> None:
    """Convert a graph to float16 weights and arithmetic; inputs and outputs stay float32."""
    float16 = onnx_module("onnxruntime.transformers.float16")
    onnx, ir = onnx_module("onnx"), onnx_module("onnx_ir")
    with _quiet():
        converted = ir.from_proto(float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True))
        converted.graph.sort()  # The conversion appends its casts at the end, out of order.
        ir.save(converted, str(target))


def write_int8(source: Path, target: Path) -> None:
    """Convert a graph to int8 weights in matrix products and word embeddings, with one scale per output channel.

    Activations are quantised when the graph runs (dynamic quantisation), so nothing has to be calibrated. The second
    products of feed-forward layers stay in fp32 (`_narrowing`).

    Raises:
        ValueError: this version of torch has exported a graph that cannot be converted.
    """
    quantization = onnx_module("onnxruntime.quantization")
    with _quiet(), _naming_old_torch():
        quantization.quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=INT8_OPERATIONS,
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_narrowing(source),
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


@contextmanager
def _naming_old_torch() -> Iterator[None]:
    """Say of any error that an old version of torch may be its reason."""
    try:
        yield
    except Exception as error:
        if torch.__version__ >= TESTED_TORCH:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"the export to ONNX is tested with torch {TESTED_TORCH}, and failed with {torch.__version__}: {reason}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without the exporters' log messages and warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
