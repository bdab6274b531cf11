"""Writes ONNX files with `torch.onnx.export`, and converts them to fp16 with onnxruntime's tools."""

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
    with quiet(), naming_old_torch(), torch.no_grad():
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
    with quiet():
        converted = ir.from_proto(float16.convert_float_to_float16(onnx.load(str(source)), keep_io_types=True))
        converted.graph.sort()  # The conversion appends its casts at the end, out of order.
        ir.save(converted, str(target))


@contextmanager
def naming_old_torch() -> Iterator[None]:
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
def quiet() -> Iterator[None]:
    """A context without the exporters' log messages and warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
