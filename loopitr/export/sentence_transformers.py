"""Exports a dual encoder as a `SentenceTransformer` of stock modules, which gives the same embeds.

A `Router` sends texts and images to separate modules: `Transformer` (for timm backbones in transformers' wrapper),
`Pooling`, `Dense`, `Normalize`. It needs neither this package nor `trust_remote_code`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from loopitr.building.card import write_export_card
from loopitr.models.heads import MLPProjection
from loopitr.models.image_backbone import VisionBackbone
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor
from loopitr.models.text_backbone import ALWAYS_FULL, TextBackbone
from loopitr.reading import user_path

from .reading import save_image_processor, save_tokenizer
from .sentence_transformers_card import sentence_transformers_card
from .source import Source, new_folder, read_source

INSTALL = 'pip install "loopitr[sentence-transformers]"'
TOLERANCE = 1e-5
TEXTS = ("a small red circle left of a blue square", "dog", "two people, one with a hat, walk along a beach at sunset")


@dataclass(frozen=True)
class SentenceTransformersExport:
    """An export: its folder, and the largest absolute difference of its vectors from the model's own."""

    folder: Path
    parity: dict[str, float]


def export_sentence_transformers(
    model: LoopITRModel | DualEncoder | str | Path,
    output: str | Path,
    *,
    tower: str | None = None,
    processor: LoopITRProcessor | None = None,
) -> SentenceTransformersExport:
    """Write a folder that `SentenceTransformer(folder)` loads (sentence-transformers 5.4 or later).

    This is possible for timm backbones that are pooled by timm, by the first token or by the mean of all tokens, and
    for text encoders that transformers' `AutoModel` loads, with any projection. The export is loaded and compared with
    the model before the folder gets its name. PIL images with 8 bits per channel give the same vectors in every mode;
    16-bit and float images, and those rotated by an EXIF tag, have to be converted first, and those with transparency
    where transformers is older than 5.21.

    Args:
        model: a run folder, an exported dual encoder, a hub id, or a model in memory.
        tower: `image` or `text`, to export only that tower.
        processor: needed if `model` is not a path.

    Raises:
        ValueError: the tower is unknown, the folder is not empty, the model is of another kind, or a backbone cannot be
            exported this way.
        OSError: there is no such model, or `output` cannot be written.
        ModuleNotFoundError: the extra `sentence-transformers` is not installed.

    Example:
        >>> import tempfile
        >>> from loopitr import build_model, export_sentence_transformers
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> model, processor = build_model(options, vocabulary=["a", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     parity = export_sentence_transformers(model, folder, processor=processor).parity
        >>> sorted(parity), max(parity.values()) < 1e-5
        (['image', 'text'], True)
    """
    library = _library()
    with new_folder(output) as folder, _quiet():
        source = read_source(model, processor=processor, tower=tower, dtype=torch.float32)
        dual = copy.deepcopy(source.dual).float().cpu().eval()
        routes: dict[str, list[Any]] = {}
        with tempfile.TemporaryDirectory() as parts:
            if source.has_texts:
                routes["text"] = _text_modules(dual.text, dual.text_projection, source, Path(parts, "text"))
            if source.has_images:
                routes["image"] = _image_modules(dual.vision, dual.vision_projection, source, Path(parts, "image"))
            normalize = _modules().Normalize()
            modules = [*next(iter(routes.values())), normalize]
            if len(routes) > 1:
                mappings: Any = {(None, name): name for name in routes}
                modules = [_modules().Router(routes, default_route="text", route_mappings=mappings), normalize]
            library.SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
        if source.has_texts:
            _keep_arguments(folder, _load_arguments(dual.text))
        parity = _parity(dual, source, folder)
        write_export_card(
            folder,
            sentence_transformers_card(source),
            title=user_path(output).resolve().name,
            source=source.name,
            rankings=source.rankings[:1],
            tags=["sentence-transformers"],
            library="sentence-transformers",
            pipeline="feature-extraction" if source.has_images else "sentence-similarity",
        )
    return SentenceTransformersExport(folder=user_path(output), parity=parity)


def _library() -> Any:
    try:
        return importlib.import_module("sentence_transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this export needs sentence-transformers: {INSTALL}", name=error.name) from error


def _modules() -> Any:
    return importlib.import_module("sentence_transformers.sentence_transformer.modules")


def _text_modules(backbone: TextBackbone, projection: nn.Module, source: Source, folder: Path) -> list[Any]:
    from transformers import MODEL_MAPPING

    kind = backbone.model.config.model_type
    if kind in ALWAYS_FULL or type(backbone.model.config) not in MODEL_MAPPING:
        raise _not_covered(source, "text", kind, "AutoModel of transformers does not load it")
    backbone.model.save_pretrained(folder)
    save_tokenizer(source, folder)
    arguments = _load_arguments(backbone)
    return _route("text", folder, backbone.pooling, backbone.width, projection, model_kwargs=arguments)


def _load_arguments(backbone: TextBackbone) -> dict[str, bool]:
    """The arguments that keep transformers from adding a randomly initialised pooler on loading, and from warning."""
    parameters = inspect.signature(type(backbone.model).__init__).parameters
    has_no_pooler = "add_pooling_layer" in parameters and getattr(backbone.model, "pooler", None) is None
    return {"add_pooling_layer": False} if has_no_pooler else {}


def _keep_arguments(folder: Path, arguments: dict[str, bool]) -> None:
    """Write the arguments to the file in which `Transformer` looks for them when it loads; it does not save them."""
    for path in folder.rglob("sentence_bert_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if arguments and "text" in config["modality_config"]:
            path.write_text(json.dumps({**config, "model_kwargs": arguments}, indent=4), encoding="utf-8")


def _image_modules(backbone: VisionBackbone, projection: nn.Module, source: Source, folder: Path) -> list[Any]:
    pooling, pooled_by_timm = backbone.pooling, dict[str, Any]()
    if pooling == "mean" and backbone.is_map and backbone.channels_last:
        pooling, pooled_by_timm = "backbone", {"global_pool": "avg"}
    elif pooling == "mean" and backbone.num_prefix_tokens:  # timm's own pooling leaves out the prefix tokens.
        pooling, pooled_by_timm = "backbone", {"global_pool": "avg", "fc_norm": False}
    _wrapped(backbone, source, pooled_by_timm).save_pretrained(folder)
    save_image_processor(source, folder)
    return _route("image", folder, pooling, backbone.pooled_width, projection)


def _wrapped(backbone: VisionBackbone, source: Source, pooled_by_timm: dict[str, Any]) -> Any:
    """The backbone in transformers' wrapper, which constructs it from its name and arguments."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    vision = source.model.config.vision
    given = {**vision["kwargs"], **pooled_by_timm}
    given.pop("norm_eps", None)  # It needs a class, which JSON cannot hold; `_parity` finds out if that matters.
    error: Exception | None = None
    for arguments in ({"img_size": vision["image_size"], **given}, given):  # A CNN takes images of any size.
        config = TimmWrapperConfig(architecture=vision["name"], model_args=arguments)
        config.num_features = backbone.pooled_width
        try:
            wrapped = TimmWrapperModel(config).eval()
            wrapped.timm_model.load_state_dict(backbone.model.state_dict())
        except (TypeError, RuntimeError) as failure:
            error = failure
            continue
        return wrapped
    reason = " ".join(str(error).split())[:200]
    raise _not_covered(source, "image", vision["name"], f"transformers' wrapper of timm does not take it: {reason}")


def _route(modality: str, folder: Path, pooling: str, width: int, projection: nn.Module, **arguments: Any) -> list[Any]:
    """The modules of one modality: `Transformer`, `Pooling` if the backbone does not pool, and the projection."""
    modules = _modules()
    pooled = pooling == "backbone"
    output, name = ("pooler_output", "sentence_embedding") if pooled else ("last_hidden_state", "token_embeddings")
    method: Any = {modality: {"method": "forward", "method_output_name": output}}
    route = [modules.Transformer(str(folder), modality_config=method, module_output_name=name, **arguments)]
    if not pooled:
        route.append(modules.Pooling(width, "cls" if pooling == "first" else "mean"))
    return [*route, *_projection(projection)]


def _projection(projection: nn.Module) -> list[Any]:
    if isinstance(projection, nn.Identity):
        return []
    if isinstance(projection, MLPProjection):
        norm = _modules().LayerNorm(projection.linear.in_features)
        norm.norm.load_state_dict(projection.norm.state_dict())
        return [norm, *_mlp(projection)]
    assert isinstance(projection, nn.Linear)
    return [_dense(projection.weight, projection.bias, None)]


def _mlp(projection: MLPProjection) -> list[Any]:
    """`output(GELU(hidden(x))) + linear(x)` as a sequence of two `Dense`, by GELU(y) - GELU(-y) = y."""
    linear, hidden, last = projection.linear, projection.hidden, projection.output
    weight = torch.cat([hidden.weight, linear.weight, -linear.weight])
    bias = torch.cat([hidden.bias, linear.bias, -linear.bias])
    same = torch.eye(linear.out_features)
    return [
        _dense(weight, bias, nn.GELU()),
        _dense(torch.cat([last.weight, same, -same], 1), last.bias, None),
    ]


def _dense(weight: Tensor, bias: Tensor | None, activation: nn.Module | None) -> Any:
    given = {"init_weight": weight.detach().clone(), "init_bias": None if bias is None else bias.detach().clone()}
    width_out, width_in = weight.shape
    return _modules().Dense(width_in, width_out, bias=bias is not None, activation_function=activation, **given)


@torch.inference_mode()
def _parity(dual: Any, source: Source, folder: Path) -> dict[str, float]:
    """Load the export, and compare its vectors with the model's.

    Raises:
        ValueError: they differ.
    """
    loaded = _library().SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    parity = {}
    if source.has_texts:
        inputs = source.processor(text=list(TEXTS))
        own = dual.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        parity["text"] = _difference(own, loaded, TEXTS)
    if source.has_images:
        pictures = _pictures(source.model.config.vision["image_size"])
        own = dual.get_image_features(source.processor(images=pictures)["pixel_values"])
        parity["image"] = _difference(own, loaded, pictures)
    for modality, difference in parity.items():
        if not difference <= TOLERANCE:
            config = source.model.config
            name = config.text["model_type"] if modality == "text" else config.vision["name"]
            raise _not_covered(source, modality, name, f"stock modules give vectors that differ by {difference:.1e}")
    return parity


def _difference(own: Tensor, loaded: Any, inputs: Sequence[Any]) -> float:
    theirs = loaded.encode(list(inputs), convert_to_tensor=True, show_progress_bar=False)
    return float((own - theirs).abs().max())


def _pictures(size: int) -> list[Image.Image]:
    """Smooth pictures of several modes, not square."""
    grid = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels = (grid * 255).byte().permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(pixels).resize((size + 9, size + 2))
    return [picture, *(picture.convert(mode) for mode in ("L", "P", "CMYK", "1"))]


def _not_covered(source: Source, kind: str, name: str, why: str) -> ValueError:
    return ValueError(f"{source.name}: the {kind} backbone {name!r} cannot be a SentenceTransformer: {why}")


@contextmanager
def _quiet() -> Iterator[None]:
    """A context without transformers' progress bars for each file that is written or read."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
