"""What the file-based sources share: reading JSON, resolving image folders, grouping rows by image."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import DataError, LoadReport, Record, clean_captions

PROBED = 8  # images looked for at load; the rest are found missing, and counted, when they are read


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of an annotation file: an image (path as written), its captions, what tells images apart."""

    image: str
    captions: Any
    identity: Hashable


def read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def read_json(path: str | Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def image_folder(images: str | Path) -> Path:
    folder = Path(images)
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is not a folder' if folder.exists() else 'no such image folder'}")
    return folder


def check_images_exist(paths: Sequence[Path], source: str | Path) -> None:
    """A wrong folder shows on the first few images; single missing files are left to the decoder."""
    probe = paths[:PROBED]
    if probe and not any(path.is_file() for path in probe):
        raise DataError(f"{source}: none of its first {len(probe)} images exists; tried {probe[0]}")


def group_rows(
    rows: Iterable[Row], *, source: str | Path, images: str | Path | None, split: str | None, report: LoadReport
) -> list[Record]:
    """Rows of one image become one record; rows of one `identity` share its integer.

    Relative image paths are taken from `images`, or from the folder of `source` where that is None.
    """
    folder = Path(source).parent if images is None else image_folder(images)
    captions: dict[str, list[str]] = {}
    identities: dict[Hashable, int] = {}
    identity_of_image: dict[str, int] = {}
    for row in rows:
        identity_of_image.setdefault(row.image, identities.setdefault(row.identity, len(identities)))
        captions.setdefault(row.image, []).extend(clean_captions(row.captions, row.image, report))
    records = []
    for image, texts in captions.items():
        if not texts:
            report.skip("no captions", image)
            continue
        report.add(len(texts))
        records.append(
            Record(
                image=folder / image, captions=tuple(texts), identity=identity_of_image[image], name=image, split=split
            )
        )
    if not records:
        where = "" if split is None else f" in split {split!r}"
        raise DataError(f"{source}: no image with a caption{where} ({report.summary()})")
    check_images_exist([Path(str(record.image)) for record in records[:PROBED]], source)
    return records
