"""Annotation files of the retrieval literature: Karpathy's JSON (COCO, Flickr30k, Flickr8k) and ALBEF's JSON lists."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from .files import PROBED, Identities, Row, Spelling, check_images_exist, group_rows, image_folder, read_json
from .records import INT64, DataError, Record, printable
from .report import LoadReport, clean_captions


def load_karpathy(path: str | Path, images: str | Path, split: str, report: LoadReport) -> list[Record]:
    """The records of one split of a Karpathy file.

    The file has `images[].{filename, filepath?, split, imgid | cocoid, sentences[].raw}`. An image that is listed twice
    becomes one record with all captions.

    Args:
        images: the folder with the images, as `images/filepath/filename` or, if it is flat, `images/filename`.
        split: "train" includes "restval" if the file has it (COCO), as is usual; "restval" gives it alone.
        report: counts what was read and what was skipped.

    Raises:
        DataError: the file is not in this format, it has no such split, or the images are not in the folder.
    """
    content = read_json(path)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        hint = "; a JSON list of image-caption pairs is read by --data.albef" if isinstance(content, list) else ""
        raise DataError(f"{path}: not in Karpathy's format, it has no list 'images'{hint}")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not _has_text(entry, "filename") or not _has_text(entry, "split"):
            raise DataError(f"{path}: images[{position}] needs 'filename' and 'split'")
        if not isinstance(entry.get("filepath") or "", str):
            raise DataError(f"{path}: images[{position}]: 'filepath' must be text, got {entry['filepath']!r}")
    splits = sorted({str(entry["split"]) for entry in entries})
    wanted = {split, "restval"} if split == "train" else {split}
    if split not in splits:
        raise DataError(f"{path}: no split {split!r}; it has {printable(', '.join(splits)) or 'none'}")
    folder = image_folder(images)
    id_field = next((name for name in ("imgid", "cocoid") if _identifies(entries, name)), None)
    chosen = [(position, entry) for position, entry in enumerate(entries) if str(entry["split"]) in wanted]
    nested = _is_nested(folder, [entry for _, entry in chosen[:PROBED]], path)

    spelling, merged = Spelling(folder), dict[Path, Record]()
    for position, entry in chosen:
        name = relative_name(entry)
        captions = clean_captions(_sentences(entry, name), name, report)
        file = spelling.plain(name)
        if file in merged:
            merged[file] = replace(merged[file], captions=merged[file].captions + captions)
            continue
        merged[file] = Record(
            image=folder / (name if nested else entry["filename"]),
            captions=captions,
            identity=position if id_field is None else entry[id_field],
            name=name,
            split=split,
        )
    records = []
    for record in merged.values():
        if record.captions:
            report.add(len(record.captions))
            records.append(record)
        else:
            report.skip("no captions", record.name)
    if not records:
        raise DataError(f"{path}: no image with a caption in split {split!r} ({report.summary()})")
    return records


def load_albef(
    path: str | Path, images: str | Path | None, report: LoadReport, split: str | None = None
) -> list[Record]:
    """The records of ALBEF's list of {"image", "caption": str | list[str], "image_id"?}, grouped by image.

    The format has no splits; `split` is only stored in the records. Relative paths start at `images`, or at the folder
    of the file if it is None. Rows with the same `image_id` have the same identity.

    Raises:
        DataError: the file is not in this format, or its images are not found.
    """
    content = read_json(path)
    if not isinstance(content, list):
        hint = "; Karpathy's format is read by --data.karpathy" if isinstance(content, dict) else ""
        raise DataError(f"{path}: not in ALBEF's format, a list of {{'image', 'caption'}} is wanted{hint}")
    rows = []
    for position, entry in enumerate(content):
        if not isinstance(entry, dict) or not _has_text(entry, "image") or "caption" not in entry:
            raise DataError(f"{path}: item {position} needs 'image' and 'caption'")
        image_id = entry.get("image_id")
        has_id = image_id is not None and str(image_id).strip() not in ("", "nan")  # Tools write these for empty cells.
        identity = ("id", str(image_id)) if has_id else ("path", entry["image"])
        rows.append(Row(image=entry["image"], captions=entry["caption"], identity=identity))
    return group_rows(rows, source=path, images=images, split=split, report=report)


def join_lists(parts: list[list[Record]]) -> list[Record]:
    """The records of several lists; an image that is in two of them becomes one record with all captions."""
    spelling, joined = Spelling("."), dict[Path, Record]()
    identities = Identities()
    for part, records in enumerate(parts):
        for record in records:
            file = spelling.plain(str(record.image))
            first = joined.setdefault(file, record)
            if first is not record:
                joined[file] = replace(first, captions=first.captions + record.captions)
            identities.join(file, (part, record.identity))  # Each list has numbered its own.
    return [replace(record, identity=identities.number(file)) for file, record in joined.items()]


def _has_text(entry: dict[str, Any], name: str) -> bool:
    value = entry.get(name)
    return isinstance(value, str) and bool(value.strip())


def _identifies(entries: list[dict[str, Any]], name: str) -> bool:
    """Whether a field is a different 64-bit integer for every image file."""
    values = [entry.get(name) for entry in entries]
    if not all(isinstance(value, int) and value in INT64 for value in values):
        return False
    return len(set(values)) == len({relative_name(entry) for entry in entries})


def relative_name(entry: dict[str, Any]) -> str:
    """The name of an entry's record: its path relative to the image folder."""
    return (Path(entry.get("filepath") or "") / entry["filename"]).as_posix()


def _is_nested(folder: Path, entries: list[dict[str, Any]], path: str | Path) -> bool:
    nested = [folder / relative_name(entry) for entry in entries]
    flat = [folder / entry["filename"] for entry in entries]
    if not any(os.path.isfile(image) for image in nested) and any(os.path.isfile(image) for image in flat):
        return False
    check_images_exist(nested, path)
    return True


def _sentences(entry: dict[str, Any], name: str) -> list[str | None]:
    sentences = entry.get("sentences") or []
    if not isinstance(sentences, list):
        raise DataError(f"{printable(name)}: 'sentences' must be a list, got {type(sentences).__name__}")
    return [sentence.get("raw") if isinstance(sentence, dict) else sentence for sentence in sentences]
