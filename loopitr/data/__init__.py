"""Sources of images and captions -> records -> examples -> batches. Imports nothing else of the package."""

from .cache_folder import names_digest
from .collate import Batch, Collator, caption_id, count_truncated
from .dataset import CaptionDataset, EpochSampler, StreamDataset
from .decoded import DecodedImages
from .hub import HubRecords, HubStream, load_hub
from .image_cache import ImageCache
from .images import UnreadableImage, decode_image
from .karpathy import load_albef, load_karpathy
from .records import DataError, LazyRecords, LoadReport, Record, captions_of, identity_of, name_of, stable_hash
from .scenes import Scene, SceneObject, SceneRecords, relevance, scene_captions, scene_vocabulary
from .sources import DataOptions, load_records
from .table import load_table
from .token_cache import TokenCache
from .transforms import TrainTransform

__all__ = [
    "Batch",
    "CaptionDataset",
    "Collator",
    "DataError",
    "DataOptions",
    "DecodedImages",
    "EpochSampler",
    "HubRecords",
    "HubStream",
    "ImageCache",
    "LazyRecords",
    "LoadReport",
    "Record",
    "Scene",
    "SceneObject",
    "SceneRecords",
    "StreamDataset",
    "TokenCache",
    "TrainTransform",
    "UnreadableImage",
    "caption_id",
    "captions_of",
    "count_truncated",
    "decode_image",
    "identity_of",
    "load_albef",
    "load_hub",
    "load_karpathy",
    "load_records",
    "load_table",
    "name_of",
    "names_digest",
    "relevance",
    "scene_captions",
    "scene_vocabulary",
    "stable_hash",
]
