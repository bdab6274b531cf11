"""A dataset of the images of records, for decoding them in DataLoader workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .images import UnreadableImage, decode_image
from .records import Record

ToTensor = Callable[[Image.Image], Tensor]


class DecodedImages(Dataset[tuple[int, Tensor | str]]):
    """Item `i` is `(i, transform(image of record i))`, or `(i, reason)` if the image is unreadable.

    `shortest` is passed to `decode_image`.
    """

    def __init__(self, records: Sequence[Record], transform: ToTensor, *, shortest: int | None = None) -> None:
        self.records, self.transform, self.shortest = records, transform, shortest

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        record = self.records[index]
        try:
            return index, self.transform(decode_image(record.image, record.name, shortest=self.shortest))
        except UnreadableImage as error:
            return index, error.reason
