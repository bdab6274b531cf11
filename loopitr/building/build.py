"""Builds a model with its processor from options: from a saved model, from pretrained backbones, or from scratch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from loopitr.building.clip import load_pair
from loopitr.building.folders import load_saved
from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
from loopitr.building.text import describe_text, load_text, load_text_config, load_tokenizer
from loopitr.building.weights import (
    Misfit,
    first_keys,
    hub_access,
    load_exactly,
    load_weights,
    text_source,
    vision_weights,
)
from loopitr.models.config import LoopITRConfig
from loopitr.models.fusion import BertParts
from loopitr.models.heads import MLMHead
from loopitr.models.image_backbone import create_timm, fit_weights, vision_data
from loopitr.models.loop_model import LoopITRModel
from loopitr.models.lora import add_lora
from loopitr.models.processing import LoopITRProcessor, image_processor, limit_length, set_image_size, word_tokenizer
from loopitr.models.text_backbone import bert_layers


def build_model(options: ModelOptions, *, vocabulary: list[str] | None = None) -> tuple[LoopITRModel, LoopITRProcessor]:
    """The model and processor that the options describe.

    Args:
        vocabulary: the words of the tokenizer for `text.name: scenes`.

    Raises:
        ValueError, OSError: a name or option is unknown, or weights cannot be found; one line says which.

    Example:
        >>> from loopitr import build_model
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> model, processor = build_model(options, vocabulary=["a", "dog"])
        >>> model.config.fusion["style"]
        'late'
    """
    if options.init is not None and options.pair is not None:
        raise ValueError(f"model.init {options.init} and model.pair {options.pair} exclude each other; give only one")
    if options.init is None and options.pair is None:
        model, processor = _from_backbones(options, vocabulary)
    else:
        model, processor = _from_saved(options.init) if options.init is not None else _from_pair(options)
        if options.image_size is not None and options.image_size != model.config.vision["image_size"]:
            model.resize_images(options.image_size)
            set_image_size(processor.image_processor, options.image_size)
    if options.fusion.agreement and model.agreement is None:
        warnings.warn(f"{options.init} has no token agreement: model.fusion.agreement is left off", stacklevel=2)
    if options.mlm_head:
        _prepare_word_prediction(model, processor)
    if options.init is None and model.agreement is not None and model.itm_head is not None:
        # Token agreement learns faster than a new ITM head, whose random logits would only add noise to it.
        nn.init.zeros_(model.itm_head.weight)
        nn.init.zeros_(model.itm_head.bias)
    hold = options.hold_batch_statistics
    if hold is None:
        vision = options.vision
        hold = bool(options.init or options.pair or vision.pretrained or vision.checkpoint)
    model.dual.vision.hold_statistics |= hold  # It is already set with LoRA adapters.
    model.freeze(options.freeze)  # This also applies `hold_statistics`, since it sets the mode of every module.
    if options.lora.vision_rank or options.lora.text_rank:
        add_lora(model, **asdict(options.lora))
    return model, processor


def _from_saved(path: str) -> tuple[LoopITRModel, LoopITRProcessor]:
    saved = load_saved(path, dtype=torch.float32)
    if not isinstance(saved.model, LoopITRModel):
        raise ValueError(f"model.init {path} holds a dual encoder alone; training needs one with its fusion head")
    return saved.model, saved.processor


def _prepare_word_prediction(model: LoopITRModel, processor: LoopITRProcessor) -> None:
    """Add a mask token to a tokenizer without one (CLIP's), and a prediction head to a model without one."""
    text, tokenizer = model.dual.text.model, processor.tokenizer
    if not model.config.fusion["num_layers"]:
        raise ValueError("model.mlm_head needs fused tokens, and this model has no fusion layers")
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": "[MASK]"})
        wanted = int(tokenizer.convert_tokens_to_ids("[MASK]")) + 1
        if wanted > text.get_input_embeddings().weight.shape[0]:
            text.resize_token_embeddings(wanted)
            for config in (model.config, model.dual.config):
                config.text["vocab_size"] = wanted
            model.mlm_head = None  # Its bias has the size of the old vocabulary.
    if model.mlm_head is None:
        head = MLMHead(text.get_input_embeddings(), text.config)
        nn.init.normal_(head.dense.weight, std=model.config.initializer_range)
        nn.init.zeros_(head.dense.bias)
        model.mlm_head, model.config.mlm_head = head.to(model.device), True


def _from_pair(options: ModelOptions) -> tuple[LoopITRModel, LoopITRProcessor]:
    assert options.pair is not None
    pair = load_pair(options.pair)
    fusion = {**asdict(options.fusion), "agreement": options.fusion.agreement_width}
    if fusion.pop("init") != "random":
        raise ValueError(f"fusion.init 'text_upper_layers' needs BERT-type layers; {options.pair} has none")
    initializer_range = pair.config_values["text"].get("initializer_range", 0.02)
    config = LoopITRConfig(
        **pair.config_values, fusion=fusion, mlm_head=options.mlm_head, initializer_range=initializer_range
    )
    model = LoopITRModel(config)
    load_exactly(model.dual, pair.weights, f"model.pair {options.pair}")
    limit_length(pair.tokenizer, min(pair.tokenizer.model_max_length, model.dual.text.max_length))
    return model, LoopITRProcessor(pair.image_processor, pair.tokenizer)


def _from_backbones(options: ModelOptions, vocabulary: list[str] | None) -> tuple[LoopITRModel, LoopITRProcessor]:
    vision, text = options.vision, options.text
    text_config, tokenizer, source = _text_parts(text, vocabulary)
    depth = text_config["num_hidden_layers"]
    num_layers = depth if text.num_layers is None else text.num_layers
    if not 1 <= num_layers <= depth:
        raise ValueError(f"model.text.num_layers is {num_layers}, but {text.name} has {depth} layers")
    text_config["num_hidden_layers"] = num_layers
    fusion = {**asdict(options.fusion), "agreement": options.fusion.agreement_width}
    init = fusion.pop("init")
    if init == "text_upper_layers":
        if not options.fusion.num_layers:
            raise ValueError("fusion.init 'text_upper_layers' initialises layers, but fusion.num_layers is 0")
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
        projection=options.projection,
        projection_dropout=options.projection_dropout,
        initial_temperature=options.temperature,
        initial_logit_bias=options.logit_bias,
        fusion=fusion,
        mlm_head=options.mlm_head,
        # New layers are initialised like those of the text backbone.
        initializer_range=text_config.get("initializer_range", 0.02),
    )
    try:
        model = LoopITRModel(config)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"model.vision.kwargs do not fit {vision.name}: {error}") from error
    limit_length(tokenizer, min(text.max_length, tokenizer.model_max_length, model.dual.text.max_length))
    if vision.pretrained or vision.checkpoint:
        _load_vision(model, vision)
    if text.pretrained:
        _load_text(model, source, num_layers, depth, init)
    data = vision_data(vision.name)
    images = image_processor(vision.image_size, mean=data.mean, std=data.std, interpolation=data.interpolation)
    return model, LoopITRProcessor(images, tokenizer)


def _text_parts(text: TextOptions, vocabulary: list[str] | None) -> tuple[dict[str, Any], PreTrainedTokenizerBase, str]:
    """The text config as a dict, the tokenizer, and the folder or hub id of the weights."""
    if text.name == "scenes":
        if vocabulary is None or text.pretrained:
            raise ValueError("model.text.name 'scenes' goes with the built-in data and model.text.pretrained false")
        if "vocab_size" in text.kwargs:
            raise ValueError("model.text.kwargs: 'scenes' has the vocabulary of the built-in data, so no vocab_size")
        tokenizer = word_tokenizer(vocabulary, max_length=text.max_length)
        config = AutoConfig.for_model("bert", vocab_size=len(tokenizer), **text.kwargs)
        source = ""
    else:
        source = text_source(text.name)
        with hub_access(text.name):
            config = load_text_config(source, **text.kwargs)
            tokenizer = load_tokenizer(source)
    unknown = [name for name in text.kwargs if not hasattr(type(config)(), name)]
    if unknown:  # transformers would silently ignore it.
        raise ValueError(f"model.text.kwargs: a {config.model_type} config has no {unknown[0]!r}")
    return describe_text(config, tokenizer), tokenizer, source


def _load_vision(model: LoopITRModel, vision: VisionOptions) -> None:
    backbone = model.dual.vision.model
    weights = vision_weights(vision.name, vision.checkpoint)
    if weights is None:  # timm downloads them and resamples them to the image size.
        try:
            with hub_access(vision.name):
                weights = create_timm(vision.name, vision.image_size, vision.kwargs, pretrained=True).state_dict()
        except RuntimeError as error:
            # timm has no weights for this model, or the kwargs change their shapes.
            raise ValueError(f"no pretrained weights for {vision.name} as described: {error}") from error
    else:
        weights = fit_weights(backbone, weights)
    _load(backbone, weights, vision.checkpoint or vision.name, extra_allowed=False)


def _load(module: nn.Module, weights: Mapping[str, Tensor], source: str, *, extra_allowed: bool) -> None:
    def error(misfit: Misfit) -> str:
        if misfit.left_over:
            fault = f"left over {first_keys(misfit.left_over)}"
        elif misfit.other_shape:
            name, (shape, wanted) = next(iter(misfit.other_shape.items()))
            fault = f"{name} is {shape}, wanted {wanted}"
        elif misfit.other_type:
            name, kind = next(iter(misfit.other_type.items()))
            fault = f"{name} is of type {kind}, wanted floating point"
        else:
            fault = f"missing {first_keys(misfit.missing)}"
        return f"weights of {source} do not fit: {fault}"

    load_weights(module, weights, extra_allowed=extra_allowed, error=error)


def _load_text(model: LoopITRModel, source: str, num_layers: int, depth: int, init: str) -> None:
    with hub_access(source):
        text = load_text(source)
    weights = {name: value for name, value in text.model.state_dict().items() if name not in text.random_names}
    _load(model.dual.text.model, weights, source, extra_allowed=True)  # Layers that are cut off are extra.
    if init != "text_upper_layers":
        return
    assert model.fusion.text is not None
    layers = bert_layers(text.model)
    if layers is None:
        kind = type(text.model).__name__
        raise ValueError(f"fusion.init 'text_upper_layers' needs BERT-type layers; {kind} has none")
    count = len(model.fusion.text)
    # The copied layers begin with the first that was cut off, or earlier if too few were cut off.
    first = min(num_layers, depth - count)
    for layer, upper in zip(model.fusion.text, layers[first : first + count], strict=True):
        upper_parts = BertParts.of(upper)
        for name in BertParts.__dataclass_fields__:
            part = getattr(layer, name)
            if name != "num_heads" and list(part.parameters()):
                part.load_state_dict(getattr(upper_parts, name).state_dict())
