"""A model of 0.1M parameters with random weights, so that the examples run anywhere in seconds.

In earnest: `loopitr.build_model(ModelOptions(pair="openai/clip-vit-base-patch16"))`, or `loopitr.load(FOLDER)`.
"""

from __future__ import annotations

from loopitr import LoopITRModel, LoopITRProcessor, build_model
from loopitr.building.options import FusionOptions, ModelOptions, TextOptions, VisionOptions
from loopitr.data import scene_vocabulary


def small_model() -> tuple[LoopITRModel, LoopITRProcessor]:
    """A model for 32 px images and captions in the words of the built-in scenes, with its processor."""
    vision = VisionOptions(
        name="resnet10t",
        image_size=32,
        pretrained=False,
        kwargs={"channels": [8, 16, 24, 32], "stem_width": 8, "output_stride": 8},
    )
    width = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = TextOptions(name="scenes", pretrained=False, max_length=32, kwargs={**width, "max_position_embeddings": 32})
    fusion = FusionOptions(num_layers=1, num_heads=2, intermediate_size=64)
    options = ModelOptions(vision=vision, text=text, fusion=fusion, embed_dim=32)
    return build_model(options, vocabulary=scene_vocabulary())
