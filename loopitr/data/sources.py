"""`load_records`: the records of a split, from the source that the options name."""

from __future__ import annotations

from collections.abc import Sequence

from .hub import HubRecords, load_hub
from .hub_stream import HubStream
from .karpathy import join_lists, load_albef, load_karpathy
from .options import DataOptions, source_of
from .records import DataError, LazyRecords, Record, captions_of, identity_of, name_of, stable_hash
from .report import LoadReport
from .scenes import SPLITS, SceneRecords
from .subset import Subset
from .table import load_table, table_columns

DEFAULT_VAL_FRACTION = 0.05


def load_records(options: DataOptions, split: str, report: LoadReport | None = None) -> Sequence[Record] | HubStream:
    """Records of `split` from the source that `options` name.

    Args:
        split: usually `options.split` or `options.val_split`. ALBEF lists, and tables without a column "split", have no
            splits: the file itself is `options.split`, and `val_albef` or `val_table` is `options.val_split`.
        report: counts what was read and what was skipped.

    Raises:
        DataError: options contradict each other, the source cannot be read or has no such split, or more than
            `options.max_skipped_fraction` of it was skipped.

    Example:
        >>> from loopitr import load_records
        >>> from loopitr.data import DataOptions, LoadReport
        >>> len(load_records(DataOptions(scenes=True, limit=3), "train"))
        3
        >>> report = LoadReport()
        >>> records = load_records(DataOptions(scenes=True, scenes_val=8), "val", report)
        >>> report.summary()
        '8 images, 32 captions; nothing skipped'
    """
    report = LoadReport() if report is None else report
    source = source_of(options)
    if options.limit is not None and options.limit < 1:
        raise DataError(f"data.limit must be at least 1, got {options.limit}")
    if options.shuffle_buffer < 0:
        raise DataError(f"data.shuffle_buffer must be at least 0, got {options.shuffle_buffer}")
    fraction = held_out_fraction(options, source)
    if fraction and split in (options.split, options.val_split):
        return _load_part(options, source, fraction, report, held_out=split == options.val_split)
    records = _LOADERS[source](options, split, report)
    if isinstance(records, HubStream):
        return records if options.limit is None else records.take(options.limit)
    report.check(options.max_skipped_fraction)
    if options.limit is None or options.limit >= len(records):
        return records
    return records.take(options.limit) if isinstance(records, (HubRecords, SceneRecords)) else records[: options.limit]


def has_splits(options: DataOptions) -> bool:
    """Whether the data say which images belong to which split.

    Raises:
        DataError: a table cannot be read.
    """
    source = source_of(options)
    return source != "albef" and (source != "table" or "split" in table_columns(str(options.table)))


def held_out_fraction(options: DataOptions, source: str) -> float:
    """The fraction of the training images to hold out for validation; 0 if there are validation data."""
    if options.val_fraction is not None:
        if not 0 <= options.val_fraction < 1:
            raise DataError(f"data.val_fraction must be in [0, 1), got {options.val_fraction}")
        return options.val_fraction
    if options.split == options.val_split:  # This is an evaluation, which needs no validation data.
        return 0.0
    if source == "albef":
        return 0.0 if options.val_albef else DEFAULT_VAL_FRACTION
    if source == "table":
        own = options.val_table or "split" in table_columns(str(options.table))
        return 0.0 if own else DEFAULT_VAL_FRACTION
    return 0.0


def _load_part(
    options: DataOptions, source: str, fraction: float, report: LoadReport, *, held_out: bool
) -> Sequence[Record]:
    """The training records that are held out, or the others.

    Which are held out depends only on their names, and records of one identity stay together: where each caption of an
    image is a row of its own, an image would otherwise be trained on and held out.
    """
    if options.streaming:
        raise DataError("data.val_fraction needs data of known length: it cannot be used with data.streaming")
    whole = LoadReport()
    records = _LOADERS[source](options, options.split, whole)
    assert not isinstance(records, HubStream)
    whole.check(options.max_skipped_fraction)
    if not held_out:
        report.counts, report.names = whole.counts, whole.names
    names: list[str] = []
    first: dict[int, str] = {}  # the name of the first record with an identity
    for index in range(len(records)):
        names.append(first.setdefault(identity_of(records, index), name_of(records, index)))
    chosen = [i for i, name in enumerate(names) if (stable_hash(name) % 10_000 < fraction * 10_000) == held_out]
    if not chosen:
        what = "validation" if held_out else "training"
        raise DataError(
            f"data.val_fraction {fraction} of {len(records)} images leaves none for {what}; "
            "give validation data or another fraction"
        )
    chosen = chosen[: options.limit]
    lazy = isinstance(records, LazyRecords)
    part: Sequence[Record] = Subset(records, chosen) if lazy else [records[index] for index in chosen]
    for index in range(len(part)):
        report.add(len(captions_of(part, index)))
    return part


def _load_scenes(options: DataOptions, split: str, report: LoadReport) -> Sequence[Record]:
    if split not in SPLITS:
        raise DataError(f"scenes: no split {split!r}; it has {', '.join(SPLITS)}")
    try:
        records = SceneRecords(
            split,
            options.scenes_train if split == "train" else options.scenes_val,
            image_size=options.scenes_image_size,
        )
    except ValueError as error:
        raise DataError(str(error)) from error
    report.images += len(records)
    report.captions += sum(records.caption_count(index) for index in range(len(records)))
    return records


def _load_karpathy(options: DataOptions, split: str, report: LoadReport) -> Sequence[Record]:
    if options.images is None:
        raise DataError("data.karpathy needs data.images, the folder with the images")
    return load_karpathy(str(options.karpathy), options.images, split, report)


def _load_albef(options: DataOptions, split: str, report: LoadReport) -> Sequence[Record]:
    paths = [options.albef] if isinstance(options.albef, str) else list(options.albef or ())
    if split != options.split:
        paths = [_validation_path(options, split, "albef")]
    parts = [load_albef(path, options.images, report, split=split) for path in paths]
    return parts[0] if len(parts) == 1 else join_lists(parts)


def _load_table(options: DataOptions, split: str, report: LoadReport) -> Sequence[Record]:
    path, wanted = str(options.table), None
    if split == options.val_split != options.split and options.val_table is not None:
        path = options.val_table
    elif "split" in table_columns(path):
        wanted = split
    elif split != options.split:
        path = _validation_path(options, split, "table")
    return load_table(
        path,
        options.images,
        report,
        image_column=options.image_column or "image",
        caption_column=options.caption_column or "caption",
        split=wanted,
    )


def _validation_path(options: DataOptions, split: str, source: str) -> str:
    path = getattr(options, f"val_{source}")
    if split != options.val_split or path is None:
        column = ' (or a column "split")' if source == "table" else ""
        raise DataError(
            f"data.{source} {getattr(options, source)} has no split {split!r}: give "
            f"data.val_{source}{column} for data.val_split={options.val_split!r}"
        )
    return path


def _load_hub(options: DataOptions, split: str, report: LoadReport) -> Sequence[Record] | HubStream:
    return load_hub(
        str(options.hub),
        split,
        report,
        image_column=options.image_column,
        caption_column=options.caption_column,
        name=options.hub_name,
        data_files=options.data_files,
        streaming=options.streaming,
    )


_LOADERS = {
    "scenes": _load_scenes,
    "karpathy": _load_karpathy,
    "albef": _load_albef,
    "table": _load_table,
    "hub": _load_hub,
}
