"""The options of `loopitr search` and its commands."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class Reading:
    """The options for reading images."""

    images: str | None = None
    """Folder that relative paths of a table start from; unset: the folder of the table."""
    image_column: str | None = None
    """Column with the image (a table: "image"; a `datasets` source: guessed if it has a usual name)."""
    split: str | None = None
    """Split of a `datasets` source; SOURCE is then a hub id, a folder, or a format (parquet) with data_files."""
    data_files: str | None = None
    """Files of a `datasets` source, as a pattern."""
    batch_size: int | None = None
    """Images encoded at a time; unset: 4 for each core of a CPU, 64 on a GPU."""
    num_workers: int | None = None
    """Processes that open images; unset: one for each core beside a GPU, none on a CPU, whose threads open them."""
    device: str | None = None
    """cpu, cuda, ...; unset: a GPU if there is one."""


@dataclass
class _Indexing:
    """The source, the model, and the index."""

    source: str = ""
    """Folder, table or `datasets` source."""
    model: str = ""
    """Run folder, exported dual encoder, or hub id."""
    output: str = ""
    """Folder of the index."""
    tokens: Literal["fp16", "bf16", "none"] | None = None
    """Type in which image tokens are stored, for reranking without opening images; none: images are opened again.
    Unset: fp16 in a new index."""
    store: str | None = None
    """Address of a Qdrant server for the vectors (http://host:6333); unset: LanceDB in the index."""
    collection: str | None = None
    """Name of the collection on that server; unset: that of the folder of the index."""
    contents: str | None = None
    """Place where image tokens are stored, such as s3://bucket/folder; unset: the index."""


@dataclass
class IndexOptions(Reading, _Indexing):
    """The source, the model and the index, and the options for reading images."""


@dataclass
class _Adding:
    """The index, and the source to add."""

    index: str = ""
    """Folder of the index."""
    source: str = ""
    """Folder, table or `datasets` source."""
    model: str | None = None
    """The model of the index, if it has been moved."""


@dataclass
class AddOptions(Reading, _Adding):
    """The index and the source to add, and the options for reading images."""


@dataclass
class QueryOptions:
    """The index, and the query."""

    index: str = ""
    """Folder of the index."""
    query: str = ""
    """A text, or the path of an image."""
    top: int = 10
    """Number of images to print."""
    rerank: int = 100
    """Candidates for a text that the fusion head scores; 0: rank by similarity alone."""
    where: str | None = None
    """Condition on the columns, as in SQL: "width > 800 AND caption LIKE '%dog%'"."""
    similarity_weight: float | None = None
    """Weight of the similarity in the reranking score; unset: the model's own."""
    json: bool = False
    """Print JSON."""
    open: bool = False
    """Write an HTML page of the results, and open it in a browser."""
    html: str | None = None
    """Path of that page; unset: with --open, a file in the system's temporary folder."""
    model: str | None = None
    """The model of the index, if it has been moved."""
    device: str | None = None
    """cpu, cuda, ...; unset: a GPU if there is one."""


@dataclass
class RemoveOptions:
    """The index, and the images to remove: those that meet all criteria, of which at least one is needed."""

    index: str = ""
    """Folder of the index."""
    paths: list[str] | None = None
    """Images, or folders, for all images in them."""
    where: str | None = None
    """Condition on the columns, as in SQL."""
    missing: bool = False
    """Images whose files no longer exist."""


@dataclass
class InfoOptions:
    """The index."""

    index: str = ""
    """Folder of the index."""
    json: bool = False
    """Print JSON."""
