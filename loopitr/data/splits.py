"""The records to evaluate on.

A table without a column "split" and an ALBEF list have no splits. Training holds out a part of such a file. Evaluation
uses the whole file, unless the model was trained on it; then it uses the part that was held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .hub_stream import HubStream
from .options import SOURCES, DataOptions, source_of
from .records import DataError, Record
from .report import LoadReport
from .sources import has_splits, held_out_fraction, load_records

HELD_OUT = "held-out part"  # the name of the validation split of a file without splits


@dataclass(frozen=True, kw_only=True)
class EvaluatedRecords:
    """Records to evaluate on, and a line that says which part of a file they are; None: all of it."""

    records: Sequence[Record]
    note: str | None


def load_evaluated(
    options: DataOptions, report: LoadReport | None = None, *, trained_on: DataOptions | None = None
) -> EvaluatedRecords:
    """The records of `options.split`, to be evaluated on.

    A file without splits is read whole, with two exceptions. With `options.val_fraction`, the records are those that
    training would hold out. If the evaluated run was trained on the file, they are those that the run held out, or, if
    `options.split` is the run's training split, those that it trained on.

    Args:
        report: counts what was read and what was skipped.
        trained_on: the data of the evaluated run (`trained_data`).

    Raises:
        DataError: the data cannot be read, or are a stream without `options.limit`.
    """
    report = LoadReport() if report is None else report
    source, note = _source(options, trained_on), None
    if source == "scenes" and not options.scenes:
        options, note = replace(options, scenes=True), "no data source is given: these are the scenes of the run"
    run = trained_on if trained_on is not None and _same_files(options, trained_on, source) else None
    training_split, val_split = (run.split, run.val_split) if run else ("train", options.val_split)
    fraction, limit, reason = options.val_fraction, options.limit, "data.val_fraction is given"
    if fraction is None and run is not None:
        fraction, limit = held_out_fraction(run, source), run.limit if limit is None else limit
        reason = "this run was trained on it"
    if has_splits(options) and (options.split != val_split or val_split == training_split):
        fraction = 0.0  # The file itself says what belongs to this split.
    if not fraction:
        # With the same name for both splits, nothing is held out.
        whole = replace(options, val_split=options.split, val_fraction=None)
        return EvaluatedRecords(records=_read(whole, options.split, report), note=note)
    training = options.split == training_split
    part = replace(options, split=training_split, val_split=HELD_OUT, val_fraction=fraction, limit=limit)
    records = _read(part, training_split if training else HELD_OUT, report)
    note = (
        f"{', '.join(_files(options, source))}: {reason}; these are the {len(records)} images that "
        f"{'a training uses' if training else 'a training holds out'} (data.val_fraction {fraction})"
    )
    return EvaluatedRecords(records=records, note=note)


def _read(options: DataOptions, split: str, report: LoadReport) -> Sequence[Record]:
    records = load_records(options, split, report)
    if not isinstance(records, HubStream):
        return records
    if options.limit is None:
        raise DataError("a stream is read into memory to be evaluated: give data.limit, or data.streaming false")
    return list(records)


def _source(options: DataOptions, trained_on: DataOptions | None) -> str:
    try:
        return source_of(options)
    except DataError:
        # The evaluation of a run on the built-in scenes uses them if no other source is named.
        if trained_on is None or any(getattr(options, name) is not None for name in SOURCES) or not trained_on.scenes:
            raise
        return source_of(trained_on)


def _same_files(options: DataOptions, other: DataOptions, source: str) -> bool:
    """Whether `other` has all files of `options`, or files of the same content."""
    try:
        if source != source_of(other):
            return False
    except DataError:  # That run named no source: a program passed its records.
        return False
    if source == "scenes":
        return True
    mine, theirs = _files(options, source), _files(other, source)
    if source == "hub" and not all(Path(name).exists() for name in mine + theirs):
        return mine == theirs and (options.hub_name, options.data_files) == (other.hub_name, other.data_files)
    return all(any(_same_file(Path(a), Path(b)) for b in theirs) for a in mine)


def _files(options: DataOptions, source: str) -> list[str]:
    value = source if source == "scenes" else getattr(options, source)
    return [value] if isinstance(value, str) else list(value)


def _same_file(a: Path, b: Path) -> bool:
    try:
        if a.samefile(b):
            return True
        return a.is_file() and b.is_file() and a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()
    except (OSError, ValueError):
        return False
