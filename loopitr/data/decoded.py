"""A dataset of the images of records, for decoding them in DataLoader workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .images import UnreadableImage, decode_image
from .records import Record, stable_hash
from .transforms import seeded

ToTensor = Callable[[Image.Image], Tensor]


class DecodedImages(Dataset[tuple[int, Tensor | str]]):
    """Item `i` is `(i, transform(image of record i))`, or `(i, reason)` if the image is unreadable.

    `shortest` is passed to `decode_image`. With a `seed`, what `transform` draws from torch's generator depends only on
    the seed and on i.
    """

    def __init__(
        self, records: Sequence[Record], transform: ToTensor, *, shortest: int | None = None, seed: int | None = None
    ) -> None:
        self.records, self.transform, self.shortest, self.seed = records, transform, shortest, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        record = self.records[index]
        try:
            with nullcontext() if self.seed is None else seeded(stable_hash(f"{self.seed}/{index}")):
                return index, self.transform(decode_image(record.image, record.name, shortest=self.shortest))
        except UnreadableImage as error:
            return index, error.reason
