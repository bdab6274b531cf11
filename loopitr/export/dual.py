"""Exports the dual encoder to a folder that `DualEncoder.from_pretrained` and `AutoProcessor` load."""

from __future__ import annotations

from pathlib import Path

from loopitr.building.card import write_card
from loopitr.building.folders import check_output, load_saved
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.processing import LoopITRProcessor


def export_dual(
    model: LoopITRModel | str | Path, output: str | Path, *, processor: LoopITRProcessor | None = None
) -> DualEncoder:
    """Save the dual encoder of a model, run folder or hub id, with processor and model card; LoRA adapters are merged.

    Args:
        processor: needed if `model` is not a path.

    Raises:
        ValueError: `model` has no fusion head, the processor is missing, or `output` holds a model of another kind.
        OSError: there is no such model, or `output` cannot be written.

    Example:
        >>> import tempfile
        >>> from loopitr import DualEncoder, build_model, export_dual
        >>> from loopitr.building.options import ModelOptions, TextOptions, VisionOptions
        >>> options = ModelOptions(
        ...     vision=VisionOptions("test_vit", image_size=32, pretrained=False),
        ...     text=TextOptions("scenes", pretrained=False, kwargs={"hidden_size": 48, "num_hidden_layers": 2}),
        ... )
        >>> model, processor = build_model(options, vocabulary=["a", "dog"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     dual = export_dual(model, folder, processor=processor)
        ...     DualEncoder.from_pretrained(folder).config.model_type
        'loopitr_dual'
    """
    folder = check_output(output, DualEncoder.config_class.model_type)
    if isinstance(model, LoopITRModel):
        loop, source = model, None
    else:
        saved = load_saved(model)
        if not isinstance(saved.model, LoopITRModel):
            raise ValueError(f"{model} is a dual encoder already")
        loop, processor, source = saved.model, processor or saved.processor, saved.source
    if processor is None:
        raise ValueError(f"{source or 'the model'} needs its processor to be exported with it, got None")
    dual = loop.dual_encoder()
    if dual.config.lora:
        dual = dual.merge_lora()
    dual.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_card(folder, dual, source=source)
    return dual
