"""Exports a model to ONNX: image tower, text tower and fusion head as separate graphs."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopitr.building.card import write_export_card
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor
from loopitr.reading import user_path

from .graphs import FusionGraph, ImageGraph, TextGraph
from .onnx_card import onnx_card
from .onnx_files import OPSET, check_installed, write_fp16, write_graph
from .onnx_int8 import write_int8
from .onnx_running import CONFIG, FUSION, IMAGE, TEXT, OnnxModel, graph_file
from .reading import save_image_processor
from .source import Source, new_folder, read_source

PRECISIONS = ("fp16", "int8")
TOLERANCE = 1e-4
# The sizes of the examples for tracing and comparing a graph; all differ, and none is 1, so that no size is fixed.
IMAGES, TEXTS, LENGTH = 2, 3, 7
EXAMPLE_TEXTS = 128


@dataclass(frozen=True)
class OnnxExport:
    """An export: its `folder`, the names of its `graphs`, and the `parity` of each fp32 output with torch.

    Parity is the largest absolute difference; for tokens, it is divided by their largest absolute value.
    """

    folder: Path
    graphs: list[str]
    parity: dict[str, float]


def export_onnx(
    model: LoopITRModel | DualEncoder | str | Path,
    output: str | Path,
    *,
    tower: str | None = None,
    precisions: Sequence[str] = (),
    processor: LoopITRProcessor | None = None,
) -> OnnxExport:
    """Write a model as ONNX graphs (opset 20), with its preprocessing, so that it runs without this package.

    The folder has `image_tower.onnx` (pixels -> embeds and tokens), `text_tower.onnx` (token ids -> embeds and tokens),
    `fusion_head.onnx` if the model has one (tokens -> match scores of all images with all texts),
    `preprocessor_config.json`, `tokenizer.json` with padding and truncation set, `onnx_config.json`, and a README.md
    with an example. Batch size and text length are dynamic.

    Args:
        model: a run folder, an exported dual encoder, a hub id, or a model in memory.
        tower: `image` or `text`, to export only that tower.
        precisions: further precisions to write: `fp16`, `int8` (dynamic; matrix products and word embeddings).
        processor: needed if `model` is not a path.

    Raises:
        ValueError: the tower or a precision is unknown, the folder is not empty, the model is of another kind, or the
            graphs do not give the same outputs as torch.
        OSError: there is no such model, or `output` cannot be written.
        ModuleNotFoundError: the extra `onnx` is not installed.

    Example:
        >>> import tempfile
        >>> from loopitr import build_model, export_onnx
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> model, processor = build_model(options, vocabulary=["a", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export_onnx(model, folder, processor=processor, tower="text")
        >>> exported.graphs, max(exported.parity.values()) < 1e-4
        (['text_tower'], True)
    """
    unknown = [name for name in precisions if name not in PRECISIONS]
    if unknown:
        raise ValueError(f"precisions must be of {', '.join(PRECISIONS)}, got {unknown[0]!r}")
    check_installed()
    with new_folder(output) as folder:
        source = read_source(model, processor=processor, tower=tower, dtype=torch.float32)
        plain = _plain(source)
        graphs = _graphs(plain, source)
        for name, graph in graphs.items():
            write_graph(graph.module, graph.inputs, graph.outputs, graph.axes, folder / graph_file(name))
        for precision in precisions:
            for name in graphs:
                files = folder / graph_file(name), folder / graph_file(name, precision)
                if precision == "int8":
                    write_int8(*files, examples=_example_texts(source.processor) if name == TEXT else ())
                else:
                    write_fp16(*files)
        _write_preprocessing(source, folder)
        parity = _parity(plain, graphs, folder)
        worst = max(parity, key=lambda name: parity[name])
        if not parity[worst] <= TOLERANCE:
            raise ValueError(
                f"{source.name}: ONNX and torch differ in {worst} by {parity[worst]:.1e}, more than {TOLERANCE}"
            )
        _write_config(plain, folder, list(graphs), list(precisions))
        write_export_card(
            folder,
            onnx_card(source, list(precisions), parity),
            title=user_path(output).resolve().name,
            source=source.name,
            rankings=source.rankings,
            tags=["onnx"],
            library="onnx",
        )
    return OnnxExport(folder=user_path(output), graphs=list(graphs), parity=parity)


@dataclass(frozen=True)
class _Graph:
    """A module, examples of its `inputs` by name, the names of its `outputs`, and the inputs' dynamic `axes`."""

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: list[str]
    axes: dict[str, dict[int, str]]


def _plain(source: Source) -> Any:
    """The model in float32 on the CPU; the caller's model is not changed."""
    parameter = next(source.model.parameters())
    in_use = any(module.training for module in source.model.modules())
    if parameter.device.type == "cpu" and parameter.dtype == torch.float32 and not in_use:
        return source.model
    return copy.deepcopy(source.model).float().cpu().eval()


@torch.no_grad()
def _graphs(model: Any, source: Source) -> dict[str, _Graph]:
    graphs = {}
    fused = isinstance(model, LoopITRModel)
    generator = torch.Generator().manual_seed(0)
    if source.has_images:
        size = model.config.vision["image_size"]
        pixels = torch.randn(IMAGES, 3, size, size, generator=generator)
        outputs = ["image_embeds", "image_tokens"] if fused else ["image_embeds"]
        graphs[IMAGE] = _Graph(ImageGraph(model), {"pixel_values": pixels}, outputs, {"pixel_values": {0: "images"}})
    if source.has_texts:
        if source.processor.tokenizer.padding_side != "right":
            raise ValueError(f"{source.name}: its tokenizer pads on the left; ONNX texts are padded on the right")
        length = min(LENGTH, source.processor.tokenizer.model_max_length)
        ids = torch.randint(0, len(source.processor.tokenizer), (TEXTS, length), generator=generator)
        mask = (torch.arange(length) < torch.tensor([length, length - 1, 2])[:, None]).long()
        texts = {0: "texts", 1: "length"}
        outputs = ["text_embeds", "text_tokens"] if fused else ["text_embeds"]
        inputs = {"input_ids": ids, "attention_mask": mask}
        graphs[TEXT] = _Graph(TextGraph(model), inputs, outputs, dict.fromkeys(inputs, texts))
    if fused:
        inputs = {
            # SigLIP's tokens are a view of longer texts, with strides that no ONNX graph can have.
            "image_tokens": model.encode_images(pixels).tokens.contiguous(),
            "text_tokens": model.encode_texts(ids, mask).tokens.contiguous(),
            "attention_mask": mask,
        }
        axes = {"image_tokens": {0: "images"}, "text_tokens": texts, "attention_mask": texts}
        graphs[FUSION] = _Graph(FusionGraph(model), inputs, ["match_scores"], axes)
    return graphs


@torch.no_grad()
def _parity(model: Any, graphs: dict[str, _Graph], folder: Path) -> dict[str, float]:
    """The largest difference of each output from the model's own, for all examples and for the first alone."""
    onnx, parity = OnnxModel(folder, names=list(graphs)), dict[str, float]()

    def compare(name: str, output: np.ndarray, expected: Tensor) -> None:
        scale = float(expected.abs().max()) if name.endswith("tokens") else 1.0
        difference = np.abs(output - expected.numpy()).max() / max(scale, 1.0)
        parity[name] = max(parity.get(name, 0.0), float(difference))

    for count in (max(IMAGES, TEXTS), 1):
        given = {name: {key: x[:count] for key, x in graph.inputs.items()} for name, graph in graphs.items()}
        outputs = {
            name: onnx.run(name, {key: x.numpy() for key, x in inputs.items()}) for name, inputs in given.items()
        }
        images = texts = None
        if IMAGE in graphs:
            pixels = given[IMAGE]["pixel_values"]
            images = model.encode_images(pixels) if FUSION in graphs else model.get_image_features(pixels)
            compare("image_embeds", outputs[IMAGE][0], images.embeds if FUSION in graphs else images)
        if TEXT in graphs:
            inputs = given[TEXT].values()
            texts = model.encode_texts(*inputs) if FUSION in graphs else model.get_text_features(*inputs)
            compare("text_embeds", outputs[TEXT][0], texts.embeds if FUSION in graphs else texts)
        if images is not None and texts is not None and FUSION in graphs:
            compare("image_tokens", outputs[IMAGE][1], images.tokens)
            real = given[TEXT]["attention_mask"].bool()
            compare("text_tokens", outputs[TEXT][1][real.numpy()], texts.tokens[real])
            pairs = torch.cartesian_prod(torch.arange(len(images.tokens)), torch.arange(len(real)))
            expected = model.score_pairs(images, texts, pairs).score.view(-1, len(real))
            compare("match_scores", outputs[FUSION][0], expected)
    return parity


def _example_texts(processor: LoopITRProcessor) -> list[dict[str, np.ndarray]]:
    """A batch of padded texts of 3 to 29 random words; which channels are large depends little on the words."""
    rng, tokenizer = np.random.default_rng(0), processor.tokenizer
    ids = [rng.integers(len(tokenizer), size=rng.integers(3, 30)).tolist() for _ in range(EXAMPLE_TEXTS)]
    texts = [tokenizer.decode(own, skip_special_tokens=True) for own in ids]
    inputs = processor(text=texts, return_tensors="np")
    return [{name: np.asarray(inputs[name]) for name in ("input_ids", "attention_mask")}]


def _write_preprocessing(source: Source, folder: Path) -> None:
    if source.has_images:
        save_image_processor(source, folder)
    if not source.has_texts:
        return
    backend = getattr(source.processor.tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(source.processor.tokenizer).__name__
        raise ValueError(f"{source.name}: a {kind} has no tokenizer.json, which ONNX texts are read with")
    own = type(backend).from_str(backend.to_str())
    tokenizer = source.processor.tokenizer
    own.enable_truncation(tokenizer.model_max_length, direction=tokenizer.truncation_side)
    own.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    own.save(str(folder / "tokenizer.json"))


def _write_config(model: Any, folder: Path, graphs: list[str], precisions: list[str]) -> None:
    config: dict[str, Any] = {
        "opset": OPSET,
        "graphs": graphs,
        "precisions": ["fp32", *precisions],
        "embed_dim": model.config.embed_dim,
    }
    if isinstance(model, LoopITRModel):
        # reranking score = match score + similarity_weight * scale * similarity
        config["scale"] = float(model.dual.scale.detach())
        config["similarity_weight"] = model.config.similarity_weight
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
