"""Images and captions from their sources to records, examples and batches.

Names are imported when they are first used, so that options can be read without importing torch.
"""

# ruff: noqa: F401 (the imports under TYPE_CHECKING tell type checkers and editors what the names are)

from typing import TYPE_CHECKING

from loopitr.lazy import lazy_names

if TYPE_CHECKING:
    from .cache_folder import images_digest
    from .collate import Batch, Collator, caption_id, count_truncated
    from .dataset import CaptionDataset, EpochSampler, StreamDataset
    from .decoded import DecodedImages
    from .hub import HubRecords, load_hub
    from .hub_stream import HubStream
    from .image_cache import ImageCache
    from .images import UnreadableImage, decode_image
    from .karpathy import load_albef, load_karpathy
    from .options import DataOptions
    from .overlap import SharedImage, shared_images
    from .records import (
        DataError,
        LazyRecords,
        Record,
        captions_of,
        identity_of,
        image_key_of,
        name_of,
        relevance_of,
        stable_hash,
    )
    from .report import LoadReport
    from .scenes import Scene, SceneObject, SceneRecords, relevance, scene_captions, scene_vocabulary
    from .sources import load_records
    from .splits import EvaluatedRecords, load_evaluated
    from .table import load_table
    from .text_cache import TextTokenCache
    from .token_cache import TokenCache
    from .trained_on import TrainingOverlap, trained_data, training_overlap
    from .transforms import TrainTransform

_MODULES = {
    "Batch": ".collate",
    "CaptionDataset": ".dataset",
    "Collator": ".collate",
    "DataError": ".records",
    "DataOptions": ".options",
    "DecodedImages": ".decoded",
    "EpochSampler": ".dataset",
    "EvaluatedRecords": ".splits",
    "HubRecords": ".hub",
    "HubStream": ".hub_stream",
    "ImageCache": ".image_cache",
    "LazyRecords": ".records",
    "LoadReport": ".report",
    "Record": ".records",
    "Scene": ".scenes",
    "SceneObject": ".scenes",
    "SceneRecords": ".scenes",
    "SharedImage": ".overlap",
    "StreamDataset": ".dataset",
    "TextTokenCache": ".text_cache",
    "TokenCache": ".token_cache",
    "TrainTransform": ".transforms",
    "TrainingOverlap": ".trained_on",
    "UnreadableImage": ".images",
    "caption_id": ".collate",
    "captions_of": ".records",
    "count_truncated": ".collate",
    "decode_image": ".images",
    "identity_of": ".records",
    "image_key_of": ".records",
    "images_digest": ".cache_folder",
    "load_albef": ".karpathy",
    "load_evaluated": ".splits",
    "load_hub": ".hub",
    "load_karpathy": ".karpathy",
    "load_records": ".sources",
    "load_table": ".table",
    "name_of": ".records",
    "relevance": ".scenes",
    "relevance_of": ".records",
    "scene_captions": ".scenes",
    "scene_vocabulary": ".scenes",
    "shared_images": ".overlap",
    "stable_hash": ".records",
    "trained_data": ".trained_on",
    "training_overlap": ".trained_on",
}
__all__ = [*_MODULES]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
