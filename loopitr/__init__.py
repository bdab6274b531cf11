"""loopitr: a dual encoder and a cross encoder in one network, trained in a loop.

Map: `config`, `backbones`, `fusion` (with `packing`, `heads`) and `model` are the network; `losses`, `mining` and
`objective` the training step; `data` the sources; `training` the accelerate loop; `evaluation` recall, dual and reranked.
"""

from loopitr import model as _model
from loopitr import processing as _processing
from loopitr.config import DualEncoderConfig, LoopITRConfig
from loopitr.model import DualEncoder, ImageState, LoopITRModel, PairScores, TextState
from loopitr.processing import LoopITRProcessor

__version__ = "0.1.0"
__all__ = [
    "DualEncoder",
    "DualEncoderConfig",
    "ImageState",
    "LoopITRConfig",
    "LoopITRModel",
    "LoopITRProcessor",
    "PairScores",
    "TextState",
]

_model.register()
_processing.register()
