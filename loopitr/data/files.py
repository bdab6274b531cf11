"""What the sources that are files share: they read JSON, resolve image folders and group rows by image."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .records import DataError, LoadReport, Record, clean_captions

PROBED = 8  # So many images are looked for at load; others that are missing are counted when they are read.


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of an annotation file: the path of an image as written, its captions, and a key for its identity."""

    image: str
    captions: Any
    identity: Hashable


def read_text(path: str | Path) -> str:
    """The content of a UTF-8 file, with or without a byte order mark.

    Raises:
        DataError: the file cannot be read or is in another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def read_json(path: str | Path) -> Any:
    """The parsed content of a JSON file.

    Raises:
        DataError: the file cannot be read or is no valid JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from error


def image_folder(images: str | Path) -> Path:
    """The folder as a `Path`.

    Raises:
        DataError: there is no such folder.
    """
    folder = Path(images)
    if not folder.is_dir():
        raise DataError(f"{folder}: {'is not a folder' if folder.exists() else 'no such image folder'}")
    return folder


def check_images_exist(paths: Sequence[Path], source: str | Path) -> None:
    """Look for the first few images, none of which exists where the folder is wrong; the decoder reports single gaps.

    Raises:
        DataError: none of them exists.
    """
    probe = paths[:PROBED]
    if probe and not any(path.is_file() for path in probe):
        raise DataError(f"{source}: none of its first {len(probe)} images exists; tried {probe[0]}")


def group_rows(
    rows: Iterable[Row], *, source: str | Path, images: str | Path | None, split: str | None, report: LoadReport
) -> list[Record]:
    """All rows of an image become one record, and all rows of one `identity` get the same integer.

    Relative image paths start at `images`, or at the folder of `source` where `images` is None.

    Raises:
        DataError: no image has a caption, or none of the first few images exists.
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
