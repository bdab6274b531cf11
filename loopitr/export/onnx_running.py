"""Runs an ONNX export with onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .onnx_files import onnx_module

IMAGE, TEXT, FUSION = "image_tower", "text_tower", "fusion_head"
CONFIG = "onnx_config.json"


def graph_file(name: str, precision: str = "fp32") -> str:
    """The file name of a graph, such as `image_tower.onnx` or `image_tower_int8.onnx`."""
    return f"{name}.onnx" if precision == "fp32" else f"{name}_{precision}.onnx"


def onnx_session(graph: str | bytes, threads: int | None = None) -> Any:
    """An onnxruntime session on the CPU, of a file or a graph's bytes; `threads` None: one per core."""
    runtime = onnx_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # only errors
    options.intra_op_num_threads = threads or 0
    return runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class OnnxModel:
    """The graphs of an export in one precision, on the CPU."""

    def __init__(
        self, folder: str | Path, *, names: Sequence[str], precision: str = "fp32", threads: int | None = None
    ) -> None:
        """
        Args:
            threads: the number of threads; None: onnxruntime's default, one per core.

        Raises:
            OSError: the folder has no such graph.
            ModuleNotFoundError: onnxruntime is not installed.
        """
        self.sessions: dict[str, Any] = {}
        for name in names:
            path = Path(folder, graph_file(name, precision))
            if not path.is_file():
                raise FileNotFoundError(f"no ONNX graph {path}")
            self.sessions[name] = onnx_session(str(path), threads)

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of a graph, in order."""
        return self.sessions[name].run(None, dict(inputs))

    def encode_images(self, pixel_values: np.ndarray) -> list[np.ndarray]:
        """`[B, 3, S, S]` -> embeds `[B, E]` and, with a fusion head, tokens `[B, N, Dv]`."""
        return self.run(IMAGE, {"pixel_values": pixel_values})

    def encode_texts(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> list[np.ndarray]:
        """`[T, L]` -> embeds `[T, E]` and, with a fusion head, tokens `[T, L, D]`."""
        return self.run(TEXT, {"input_ids": input_ids, "attention_mask": attention_mask})

    def match(self, image_tokens: np.ndarray, text_tokens: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """Match scores `[I, T]` of all images with all texts."""
        inputs = {"image_tokens": image_tokens, "text_tokens": text_tokens, "attention_mask": attention_mask}
        return self.run(FUSION, inputs)[0]
