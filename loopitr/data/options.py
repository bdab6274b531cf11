"""The options that choose the data and say how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .records import DataError

SOURCES = ("karpathy", "albef", "table", "hub")
OF_OTHER_SOURCES = ("images", "val_albef", "val_table", "hub_name", "data_files", "image_column", "caption_column")


@dataclass
class DataOptions:
    """Where images and captions come from (one of karpathy, albef, table, hub, scenes) and how they are read.

    Example:
        >>> from loopitr import DataOptions
        >>> DataOptions(karpathy="dataset_coco.json", images="coco/", split="restval").val_split
        'val'
    """

    scenes: bool = False
    """Use the built-in scenes, unless another source is named."""
    karpathy: str | None = None
    """Karpathy's JSON (COCO, Flickr30k, Flickr8k); needs `images`."""
    albef: str | list[str] | None = None
    """JSON list of {"image", "caption"}, or several of them; the format has no splits, see `val_albef`."""
    table: str | None = None
    """CSV, TSV or JSON-lines file of image paths and captions; a column "split" is used if there is one."""
    hub: str | None = None
    """Anything `datasets.load_dataset` takes: a hub id, a local folder, or a format (webdataset, parquet, ...)."""
    hub_name: str | None = None
    """Configuration name of the hub dataset."""
    data_files: str | list[str] | dict[str, str] | None = None
    """Files for `hub`, as a pattern, a list, or a pattern per split."""
    streaming: bool = False
    """Stream `hub` instead of preparing it on disk first."""
    shuffle_buffer: int = 1000
    """Streams: training rows that each of the `num_workers` holds, to draw from at random; 0 keeps the file order."""
    images: str | None = None
    """Folder that relative image paths start from. Unset, for albef and table: the folder of that file."""
    image_column: str | None = None
    """Column with the image (table: "image"; hub: guessed if it has a usual name)."""
    caption_column: str | None = None
    """Column with the captions, text or list; hub: may be dotted, as in json.captions."""
    split: str = "train"
    """Split to train on, or to evaluate in recipes/evaluate.py."""
    val_split: str = "val"
    """Split to validate on."""
    val_albef: str | None = None
    """Validation file for `albef`."""
    val_table: str | None = None
    """Validation file for `table`; not needed if `table` has a column "split"."""
    val_fraction: float | None = None
    """Hold out this fraction of the training images for validation, by a hash of their names (images of one identity
    together), instead of reading `val_split`. Unset: 0.05 for tables and ALBEF lists without validation data, otherwise
    0. In an evaluation, unset means the images that the run held out of its own data, and all images of other files."""
    scenes_train: int = 4000
    """Images in the built-in training split."""
    scenes_val: int = 500
    """Images in each built-in held-out split, val and test (at most 880)."""
    scenes_image_size: int = 64
    """Side in pixels of built-in images."""
    captions: Literal["one", "all"] = "one"
    """Training examples per image: one caption drawn per visit, or all of them."""
    group: int = 1
    """Number of consecutive training examples that stay together in a batch, so that near misses that are neighbours in
    the data become each other's hard negatives."""
    crop_scale_min: float = 0.5
    """Smallest area of a random training crop, as a fraction of the image; 1 keeps the whole image."""
    flip: bool = False
    """Mirror training images at random; wrong where captions say left or right."""
    randaugment: bool = False
    """Apply two random distortions to each training image, none of hue or saturation."""
    num_workers: int = 2
    """DataLoader processes per rank."""
    max_skipped_fraction: float = 0.05
    """Stop if more than this fraction of captions or images is skipped."""
    scaled_decode: bool = True
    """Decode large training JPEGs at 1/2, 1/4 or 1/8 of their size, as far as no random crop has to be enlarged."""
    cache_images: str | None = None
    """Folder for the training images, decoded and shrunk once to the size that random crops need. An image takes width
    x height x 3 bytes: 0.5 MB at 224 px and the default crops. As with `cache_tokens`, other images make another cache:
    those of another name or path, or whose file has another size in bytes."""
    cache_tokens: str | None = None
    """Folder for the image tokens of a frozen image backbone, computed once."""
    cached_views: int = 1
    """Views of each training image in `cache_tokens`: as in evaluation, then random crops; each visit draws one."""
    cache_text_tokens: str | None = None
    """Folder for the caption tokens of a frozen text backbone, computed once; it can be that of `cache_tokens`."""
    limit: int | None = None
    """Read only this many images of each split."""


def source_of(options: DataOptions) -> str:
    """The source that the options name.

    Raises:
        DataError: they name none, or several.
    """
    given = [name for name in SOURCES if getattr(options, name) is not None]
    if len(given) > 1:
        raise DataError(f"one data source is wanted, got {' and '.join(f'data.{name}' for name in given)}")
    if given and not getattr(options, given[0]):
        raise DataError(f"data.{given[0]} is empty")
    named = ", ".join(f"data.{name}" for name in SOURCES)
    unused = [name for name in OF_OTHER_SOURCES if getattr(options, name) is not None]
    if not given and unused:
        raise DataError(f"data.{unused[0]} is given, and none of {named} that it would belong to")
    if not given and not options.scenes:
        raise DataError(f"no data source is given: give one of {named}, or --data.scenes true for the built-in scenes")
    return given[0] if given else "scenes"
