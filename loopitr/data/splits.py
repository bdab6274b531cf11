"""The images that an evaluation is about, and what a run that trained on the same file held out of it.

A table without a column "split" and an ALBEF list have no splits. To train on one, a part of its images is held out;
to evaluate on one is to evaluate on all of it, unless it is the file that the evaluated run was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .hub_stream import HubStream
from .records import DataError, LoadReport, Record
from .sources import SOURCES, DataOptions, has_splits, held_out_fraction, load_records, source_of

HELD_OUT = "held-out part"  # stands for the validation split where a file has none


@dataclass(frozen=True, kw_only=True)
class EvaluatedRecords:
    """Records to evaluate on, and one line that says which part of a file they are; None for all that was named."""

    records: Sequence[Record]
    note: str | None


def load_evaluated(
    options: DataOptions, report: LoadReport | None = None, *, trained_on: DataOptions | None = None
) -> EvaluatedRecords:
    """The records of `options.split`, to be evaluated on.

    A file without splits is read whole, but for two cases. `options.val_fraction` names the part of it that a training
    would hold out. If it is a file that the evaluated run read (`trained_on`, see `trained_data`), the records are
    those that this run held out; `options.split` equal to the run's training split names those that it trained on.

    Raises:
        DataError: the data cannot be read, or it is a stream without a limit.
    """
    report = LoadReport() if report is None else report
    source, note = _source(options, trained_on), None
    if source == "scenes" and not options.scenes:
        options, note = replace(options, scenes=True), "no data source is given: these are the scenes of the run"
    own = trained_on if trained_on is not None and _same_files(options, trained_on, source) else None
    training_split, val_split = (own.split, own.val_split) if own else ("train", options.val_split)
    fraction, limit, whose = options.val_fraction, options.limit, "data.val_fraction is given"
    if fraction is None and own is not None:
        fraction, limit = held_out_fraction(own, source), own.limit if limit is None else limit
        whose = "this run was trained on it"
    if has_splits(options) and (options.split != val_split or val_split == training_split):
        fraction = 0.0  # The file itself says what belongs to this split.
    if not fraction:
        # Equal names of both splits mean that nothing is held out.
        whole = replace(options, val_split=options.split, val_fraction=None)
        return EvaluatedRecords(records=_read(whole, options.split, report), note=note)
    training = options.split == training_split
    asked = replace(options, split=training_split, val_split=HELD_OUT, val_fraction=fraction, limit=limit)
    records = _read(asked, training_split if training else HELD_OUT, report)
    note = (
        f"{', '.join(_files(options, source))}: {whose}; these are the {len(records)} images that "
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
        # A run on the built-in scenes has named them, so that its evaluation need not do so again.
        if trained_on is None or any(getattr(options, name) is not None for name in SOURCES) or not trained_on.scenes:
            raise
        return source_of(trained_on)


def _same_files(options: DataOptions, other: DataOptions, source: str) -> bool:
    """Whether what `options` read is among what `other` read: the same files, or ones of equal content."""
    try:
        if source != source_of(other):
            return False
    except DataError:  # The records of that run were objects of a program.
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
