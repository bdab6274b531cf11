"""loopitr: a dual encoder and a cross encoder in one network, trained in a loop.

Map: `config`, `backbones`, `fusion` (with `packing`, `heads`) and `model` are the network; `losses`, `mining` and
`objective` the training step; `data` the sources; `building` and `training` make a model and train it; `evaluation`
measures recall, dual and reranked.
"""

from loopitr.models import loop_model as _model
from loopitr.models import processing as _processing
from loopitr.models.config import DualEncoderConfig, LoopITRConfig
from loopitr.models.loop_model import DualEncoder, LoopITRModel
from loopitr.models.outputs import DualOutput, ImageState, PairScores, TextState
from loopitr.models.processing import LoopITRProcessor

__version__ = "0.1.0"
__all__ = [
    "DualEncoder",
    "DualEncoderConfig",
    "DualOutput",
    "ImageState",
    "LoopITRConfig",
    "LoopITRModel",
    "LoopITRProcessor",
    "PairScores",
    "TextState",
]

_model.register()
_processing.register()
