"""loopitr: a dual encoder and a cross encoder in one network, trained in a loop.

Public names are imported when they are first used, so that `import loopitr` is fast. It also registers the models of
this package with `AutoConfig`, `AutoModel` and `AutoProcessor` of transformers.

Example:
    >>> import loopitr
    >>> loopitr.LoopITRModel.config_class is loopitr.LoopITRConfig
    True
"""

# ruff: noqa: F401 (the imports under TYPE_CHECKING tell type checkers and editors what the names are)

from typing import TYPE_CHECKING

from loopitr.lazy import lazy_names
from loopitr.models import registration as _registration

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loopitr.building.build import build_model
    from loopitr.building.folders import load
    from loopitr.building.options import FusionOptions, ModelOptions, TextOptions, VisionOptions
    from loopitr.data.options import DataOptions
    from loopitr.data.records import Record
    from loopitr.data.report import LoadReport
    from loopitr.data.sources import load_records
    from loopitr.evaluation.options import EvaluationOptions
    from loopitr.evaluation.retrieval import evaluate_retrieval
    from loopitr.export.dual import export_dual
    from loopitr.export.onnx import export_onnx
    from loopitr.export.sentence_transformers import export_sentence_transformers
    from loopitr.export.towers import export_tower
    from loopitr.models.config import DualEncoderConfig, LoopITRConfig
    from loopitr.models.dual_encoder import DualEncoder
    from loopitr.models.loop_model import LoopITRModel
    from loopitr.models.outputs import DualOutput, ImageState, PairScores, TextState
    from loopitr.models.processing import LoopITRProcessor
    from loopitr.models.towers import ImageTower, TextTower
    from loopitr.objective.build import build_objective
    from loopitr.objective.contrastive_terms import Contrastive, SigmoidContrastive
    from loopitr.objective.loop_objective import LoopObjective
    from loopitr.objective.losses.distillation import PartialRanking
    from loopitr.objective.mining import Sample, Stratified, TopK
    from loopitr.objective.structure_terms import FrozenContrast, StructureTransfer
    from loopitr.objective.teachers import Frozen, Match, MatchPlusSimilarity, Momentum, Teacher
    from loopitr.objective.terms import (
        Agreement,
        Distillation,
        Matching,
        Ranking,
        Term,
        TermOutput,
        WordPrediction,
    )
    from loopitr.objective.word_masking import token_masking
    from loopitr.search.indexing import build_index
    from loopitr.search.retriever import Retriever
    from loopitr.search.searcher import Searcher
    from loopitr.training.options import TrainOptions
    from loopitr.training.trainer import Trainer

_MODULES = {
    "Agreement": "loopitr.objective.terms",
    "Contrastive": "loopitr.objective.contrastive_terms",
    "DataOptions": "loopitr.data.options",
    "Distillation": "loopitr.objective.terms",
    "DualEncoder": "loopitr.models.dual_encoder",
    "DualEncoderConfig": "loopitr.models.config",
    "DualOutput": "loopitr.models.outputs",
    "EvaluationOptions": "loopitr.evaluation.options",
    "Frozen": "loopitr.objective.teachers",
    "FrozenContrast": "loopitr.objective.structure_terms",
    "FusionOptions": "loopitr.building.options",
    "ImageState": "loopitr.models.outputs",
    "ImageTower": "loopitr.models.towers",
    "LoadReport": "loopitr.data.report",
    "LoopITRConfig": "loopitr.models.config",
    "LoopITRModel": "loopitr.models.loop_model",
    "LoopITRProcessor": "loopitr.models.processing",
    "LoopObjective": "loopitr.objective.loop_objective",
    "Match": "loopitr.objective.teachers",
    "MatchPlusSimilarity": "loopitr.objective.teachers",
    "Matching": "loopitr.objective.terms",
    "ModelOptions": "loopitr.building.options",
    "Momentum": "loopitr.objective.teachers",
    "PairScores": "loopitr.models.outputs",
    "PartialRanking": "loopitr.objective.losses.distillation",
    "Ranking": "loopitr.objective.terms",
    "Record": "loopitr.data.records",
    "Retriever": "loopitr.search.retriever",
    "Sample": "loopitr.objective.mining",
    "Searcher": "loopitr.search.searcher",
    "SigmoidContrastive": "loopitr.objective.contrastive_terms",
    "Stratified": "loopitr.objective.mining",
    "StructureTransfer": "loopitr.objective.structure_terms",
    "Teacher": "loopitr.objective.teachers",
    "Term": "loopitr.objective.terms",
    "TermOutput": "loopitr.objective.terms",
    "TextOptions": "loopitr.building.options",
    "TextState": "loopitr.models.outputs",
    "TextTower": "loopitr.models.towers",
    "TopK": "loopitr.objective.mining",
    "TrainOptions": "loopitr.training.options",
    "Trainer": "loopitr.training.trainer",
    "VisionOptions": "loopitr.building.options",
    "WordPrediction": "loopitr.objective.terms",
    "build_index": "loopitr.search.indexing",
    "build_model": "loopitr.building.build",
    "build_objective": "loopitr.objective.build",
    "evaluate_retrieval": "loopitr.evaluation.retrieval",
    "export_dual": "loopitr.export.dual",
    "export_onnx": "loopitr.export.onnx",
    "export_sentence_transformers": "loopitr.export.sentence_transformers",
    "export_tower": "loopitr.export.towers",
    "load": "loopitr.building.folders",
    "load_records": "loopitr.data.sources",
    "token_masking": "loopitr.objective.word_masking",
}
__all__ = [*_MODULES]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)

_registration.register_when_loaded()
