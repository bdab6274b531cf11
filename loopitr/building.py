"""Options -> a model with its processor: from a saved one, from pretrained backbones, or from scratch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from loopitr.backbones import vision_data
from loopitr.config import LoopITRConfig
from loopitr.fusion import BertParts
from loopitr.masking import TokenMasking
from loopitr.model import LoopITRModel
from loopitr.pretrained import hub_access, text_source, vision_weights
from loopitr.processing import LoopITRProcessor, image_processor, word_tokenizer
from loopitr.saved import load_saved, model_source

DESCRIBED = (  # written out although they may be the defaults of the config's class: the fusion head may copy them
    *("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size"),
    *("hidden_act", "layer_norm_eps"),
)


@dataclass
class VisionOptions:
    """The image backbone."""

    name: str = "tf_efficientnet_lite0"
    """Any timm model."""
    image_size: int = 224
    """Pixels per side."""
    pretrained: bool = True
    """Start from pretrained weights (a package of the extra `backbones`, else timm's hub)."""
    checkpoint: str | None = None
    """Local weights in timm's names (.safetensors or .pth) instead."""
    pooling: Literal["first", "mean", "backbone"] = "backbone"
    """What the dual head embeds."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """More arguments of timm.create_model."""


@dataclass
class TextOptions:
    """The text backbone."""

    name: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Any transformers encoder: a hub id, a local folder, or a name that a package of the extra `backbones` carries;
    `scenes`: a tokenizer of the built-in vocabulary (with `pretrained: false`)."""
    pretrained: bool = True
    """Start from its weights; otherwise only its architecture and tokenizer are used."""
    num_layers: int | None = None
    """Keep only so many of its lower layers."""
    pooling: Literal["first", "mean", "backbone"] = "mean"
    """What the dual head embeds."""
    max_length: int = 64
    """Captions are cut to so many tokens (cut ones are counted)."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Changes to its transformers config."""


@dataclass
class FusionOptions:
    """The fusion head."""

    style: Literal["late", "shared"] = "late"
    """Own layers on top of the text backbone (ALBEF), or its own layers run again with cross-attention (BLIP)."""
    num_layers: int = 3
    """Number of fusion layers."""
    num_heads: int | None = None
    """Attention heads; unset: width / 64, or the text backbone's where its layers are copied or shared."""
    intermediate_size: int | None = None
    """Feed-forward width; unset: 4 x width."""
    dropout: float = 0.1
    """Dropout after attention and feed-forward."""
    init: Literal["random", "text_upper_layers"] = "random"
    """`late`: start the fusion layers from the upper layers of the text backbone (those `text.num_layers` cuts off
    first)."""


@dataclass
class ModelOptions:
    """What is trained."""

    init: str | None = None
    """Continue from a saved model (folder or hub id); the options below are then ignored but for `freeze` and
    `image_size`."""
    image_size: int | None = None
    """With `init`: take images of another size (positional embeddings are interpolated)."""
    vision: VisionOptions = field(default_factory=VisionOptions)
    text: TextOptions = field(default_factory=TextOptions)
    fusion: FusionOptions = field(default_factory=FusionOptions)
    embed_dim: int = 256
    """E, width of the embeds."""
    temperature: float = 0.07
    """Initial softmax temperature of the dual head."""
    mlm_head: bool = False
    """Carry a masked-language-model head."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained: vision, text, dual_head, fusion."""


def build_model(options: ModelOptions, *, vocabulary: list[str] | None = None) -> tuple[LoopITRModel, LoopITRProcessor]:
    """The model and processor that the options describe.

    Args:
        vocabulary: words of the tokenizer for `text.name: scenes`.

    Raises:
        ValueError, OSError: an unknown name or option, or weights that cannot be found; one line says which.
    """
    if options.init is not None:
        model, processor = _from_saved(options.init)
        if options.image_size is not None and options.image_size != model.config.vision["image_size"]:
            model.resize_images(options.image_size)
            size = {"height": options.image_size, "width": options.image_size}
            processor.image_processor.size = processor.image_processor.crop_size = size
    else:
        model, processor = _from_backbones(options, vocabulary)
    model.freeze(options.freeze)
    return model, processor


def token_masking(processor: LoopITRProcessor) -> TokenMasking | None:
    """The MLM masking for a processor's tokenizer, None if it has no mask token."""
    tokenizer = processor.tokenizer
    if tokenizer.mask_token_id is None:
        return None
    return TokenMasking(
        mask_token_id=tokenizer.mask_token_id, vocab_size=len(tokenizer), special_ids=tuple(tokenizer.all_special_ids)
    )


def token_cache_key(model: LoopITRModel, processor: LoopITRProcessor) -> str:
    """Digest of all that image tokens depend on: the image backbone's weights and the transform."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([model.config.vision, processor.image_processor.to_dict()], sort_keys=True).encode())
    for name, tensor in sorted(model.dual.vision.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_saved(path: str) -> tuple[LoopITRModel, LoopITRProcessor]:
    source = model_source(path)
    with nullcontext() if Path(source).is_dir() else hub_access(source):
        saved = load_saved(source, dtype=torch.float32)
    if not isinstance(saved.model, LoopITRModel):
        raise ValueError(f"model.init {path} holds a dual encoder alone; training needs one with its fusion head")
    return saved.model, saved.processor


def _from_backbones(options: ModelOptions, vocabulary: list[str] | None) -> tuple[LoopITRModel, LoopITRProcessor]:
    vision, text = options.vision, options.text
    text_config, tokenizer, source = _text_parts(text, vocabulary)
    depth = text_config["num_hidden_layers"]
    kept = depth if text.num_layers is None else text.num_layers
    if not 1 <= kept <= depth:
        raise ValueError(f"model.text.num_layers is {kept}, but {text.name} has {depth} layers")
    text_config["num_hidden_layers"] = kept
    fusion = asdict(options.fusion)
    init = fusion.pop("init")
    if init == "text_upper_layers":
        if options.fusion.style != "late" or not text.pretrained or options.fusion.num_layers > depth:
            raise ValueError("fusion.init 'text_upper_layers' needs style 'late' and a pretrained text with the layers")
        fusion["num_heads"] = text_config["num_attention_heads"]
        for name in ("intermediate_size", "hidden_act", "layer_norm_eps"):
            if name in text_config:
                fusion[name] = text_config[name]
    config = LoopITRConfig(
        vision={"name": vision.name, "image_size": vision.image_size, "kwargs": vision.kwargs},
        text=text_config,
        vision_pooling=vision.pooling,
        text_pooling=text.pooling,
        embed_dim=options.embed_dim,
        initial_temperature=options.temperature,
        fusion=fusion,
        mlm_head=options.mlm_head,
        initializer_range=text_config.get("initializer_range", 0.02),  # new layers start as the text's own did
    )
    try:
        model = LoopITRModel(config)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"model.vision.kwargs do not fit {vision.name}: {error}") from error
    tokenizer.model_max_length = min(text.max_length, tokenizer.model_max_length, model.dual.text.max_length)
    if vision.pretrained or vision.checkpoint:
        _load_vision(model, vision)
    if text.pretrained:
        _load_text(model, source, kept, depth, init)
    data = vision_data(vision.name)
    images = image_processor(vision.image_size, mean=data.mean, std=data.std, interpolation=data.interpolation)
    return model, LoopITRProcessor(images, tokenizer)


def _text_parts(
    text: TextOptions, vocabulary: list[str] | None
) -> tuple[dict[str, Any], PreTrainedTokenizerBase, str]:
    """The text config as a dict, the tokenizer, and where the weights come from."""
    if text.name == "scenes":
        if vocabulary is None or text.pretrained:
            raise ValueError("model.text.name 'scenes' goes with the built-in data and model.text.pretrained false")
        tokenizer = word_tokenizer(vocabulary, max_length=text.max_length)
        config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), **text.kwargs)
        source = ""
    else:
        source = text_source(text.name)
        with hub_access(text.name):
            config = AutoConfig.from_pretrained(source, **text.kwargs)
            tokenizer = AutoTokenizer.from_pretrained(source)
        config = getattr(config, "text_config", config)
        if tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {text.name} has no padding token")
    unknown = [name for name in text.kwargs if not hasattr(type(config)(), name)]
    if unknown:  # transformers would keep it and go on
        raise ValueError(f"model.text.kwargs: a {config.model_type} config has no {unknown[0]!r}")
    described = {**config.to_diff_dict(), "model_type": config.model_type}
    for name in DESCRIBED:
        if hasattr(config, name):
            described[name] = getattr(config, name)
    for name in ("architectures", "transformers_version", "_name_or_path", "dtype"):
        described.pop(name, None)
    return described, tokenizer, source


def _load_vision(model: LoopITRModel, vision: VisionOptions) -> None:
    backbone = model.dual.vision.model
    weights = vision_weights(vision.name, vision.checkpoint)
    if weights is None:  # timm fetches them, and fits them to the image size
        arguments = {"num_classes": 0, **vision.kwargs}
        if not model.dual.vision.is_map:
            arguments["img_size"] = vision.image_size
        try:
            with hub_access(vision.name):
                weights = timm.create_model(vision.name, pretrained=True, **arguments).state_dict()
        except RuntimeError as error:  # of a model that nobody has trained, or whose shapes the kwargs change
            raise ValueError(f"no pretrained weights for {vision.name} as described: {error}") from error
    elif not model.dual.vision.is_map:
        from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

        if isinstance(backbone, VisionTransformer):
            weights = checkpoint_filter_fn(weights, backbone)  # resamples the positional embedding
    left_over = [name for name in weights if name not in backbone.state_dict()]
    if left_over:
        raise ValueError(f"weights of {vision.name} do not fit: left over {left_over[:3]} ({len(left_over)} in all)")
    _load(backbone, weights, vision.checkpoint or vision.name)


def _load(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Every tensor of `module` out of `weights`, which may hold more."""
    own = module.state_dict()
    known = {name: value for name, value in weights.items() if name in own}
    for name, value in known.items():
        if value.shape != own[name].shape:
            shapes = f"{list(value.shape)}, wanted {list(own[name].shape)}"
            raise ValueError(f"weights of {source} do not fit: {name} is {shapes}")
    missing = module.load_state_dict(known, strict=False).missing_keys  # old files lack batch counts, which is fine
    if missing:
        raise ValueError(f"weights of {source} do not fit: missing {missing[:3]} ({len(missing)} in all)")


def _load_text(model: LoopITRModel, source: str, kept: int, depth: int, init: str) -> None:
    with hub_access(source):
        full, info = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    full = getattr(full, "text_model", full)
    made_up = {name.removeprefix("text_model.") for name in info["missing_keys"]}  # transformers drew them at random
    weights = {name: value for name, value in full.state_dict().items() if name not in made_up}
    _load(model.dual.text.model, weights, source)
    if init != "text_upper_layers":
        return
    assert model.fusion.text is not None
    layers = getattr(getattr(full, "encoder", None), "layer", None)
    if layers is None or not hasattr(layers[0], "intermediate"):
        raise ValueError(f"fusion.init 'text_upper_layers' needs BERT-type layers; {type(full).__name__} has none")
    count = len(model.fusion.text)
    first = min(kept, depth - count)  # the layers cut off, or else the last ones
    for layer, upper in zip(model.fusion.text, layers[first : first + count], strict=True):
        theirs = BertParts.of(upper)
        for name in BertParts.__dataclass_fields__:
            part = getattr(layer, name)
            if name != "num_heads" and list(part.parameters()):
                part.load_state_dict(getattr(theirs, name).state_dict())
