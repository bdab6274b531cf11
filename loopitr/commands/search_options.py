"""The options of `loopitr search` and its commands."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Reading:
    """How images are found and opened."""

    images: str | None = None
    """Folder that relative paths of a table start from; unset: the folder of the table."""
    image_column: str | None = None
    """Column with the image (a table: "image"; a `datasets` source: guessed if it has a usual name)."""
    split: str | None = None
    """SOURCE is a `datasets` source, whose split this is: a hub id, a folder, or a format (parquet) with data_files."""
    data_files: str | None = None
    """Files of a `datasets` source, as a pattern."""
    batch_size: int | None = None
    """Images encoded at a time; unset: 4 for each core of a CPU, 64 on a GPU."""
    num_workers: int | None = None
    """Processes that open images; unset: one for each core beside a GPU, none on a CPU, whose threads open them."""
    device: str | None = None
    """cpu, cuda, ...; unset: a GPU if there is one."""


@dataclass
class IndexOptions(Reading):
    """What is indexed, by which model."""

    source: str = ""
    """Folder, table or `datasets` source."""
    model: str = ""
    """Run folder, exported dual encoder, or hub id."""
    output: str = ""
    """Folder of the index."""
    tokens: Literal["fp16", "bf16", "none"] = "fp16"
    """What image tokens are kept in, for reranking without opening an image; none: images are opened again for it."""
    store: str | None = None
    """Address of a Qdrant server for the vectors (http://host:6333); unset: LanceDB in the index."""
    collection: str | None = None
    """Its collection there; unset: called as the folder of the index."""
    contents: str | None = None
    """Where image tokens are kept, such as s3://bucket/folder; unset: in the index."""


@dataclass
class AddOptions(Reading):
    """What is added to which index."""

    index: str = ""
    """Folder of the index."""
    source: str = ""
    """Folder, table or `datasets` source."""
    model: str | None = None
    """The index's model, where it has moved."""


@dataclass
class QueryOptions:
    """What is asked of which index."""

    index: str = ""
    """Folder of the index."""
    query: str = ""
    """A text, or the path of an image."""
    top: int = 10
    """Images that are printed."""
    rerank: int = 100
    """Candidates of a text that the fusion head scores; 0: similarity alone."""
    where: str | None = None
    """Condition on the columns, as in SQL: "width > 800 AND caption LIKE '%dog%'"."""
    similarity_weight: float | None = None
    """Weight of the similarity in the reranking score; unset: the model's own."""
    json: bool = False
    """Print JSON."""
    open: bool = False
    """Write an HTML page of the results, and open it in a browser."""
    html: str | None = None
    """Where that page is written; unset: in the system's temporary folder, if --open."""
    model: str | None = None
    """The index's model, where it has moved."""
    device: str | None = None
    """cpu, cuda, ...; unset: a GPU if there is one."""


@dataclass
class RemoveOptions:
    """What is removed from which index; one of the three."""

    index: str = ""
    """Folder of the index."""
    paths: list[str] | None = None
    """Images, or folders with all that is in them."""
    where: str | None = None
    """Condition on the columns, as in SQL."""
    missing: bool = False
    """Images whose files are gone."""


@dataclass
class InfoOptions:
    """Which index."""

    index: str = ""
    """Folder of the index."""
    json: bool = False
    """Print JSON."""
