"""Counts over all ranks of files that could not be read and captions that were cut."""

from __future__ import annotations

from collections import Counter

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from loopitr.data import LoadReport
from loopitr.data.loader import EpochLoader, SkipCounter
from loopitr.training.checkpoints import Progress


def lost_in_all(progress: Progress, skips: SkipCounter) -> tuple[dict[str, int], int]:
    """The number of skipped files by reason, and of cut captions, on all ranks since the start of the run."""
    # Checkpoints of older versions have counts without names.
    unnamed = Counter(progress.skipped) - Counter(progress.skipped_files.values())
    files, truncated = files_in_all(progress, skips), progress.truncated
    for cut in gather_object([skips.truncated]):
        truncated += cut
    return dict(unnamed + Counter(files.values())), truncated


def files_in_all(progress: Progress, skips: SkipCounter) -> dict[str, str]:
    """The reason for each file that a rank could not read, since the start of the run."""
    files = dict(progress.skipped_files)
    for part in gather_object([skips.files]):
        files = {**part, **files}
    return files


def check_skips(skips: SkipCounter, loader: EpochLoader, *, accumulation: int) -> None:
    """Check the number of skips after an epoch, for data with fewer examples than `SkipCounter` waits for.

    Raises:
        DataError: more than the limit were skipped.
    """
    sampler = loader.sampler
    if sampler is None or skips.batches < len(sampler) // accumulation * accumulation:
        return
    report, seen = LoadReport(), 0
    for part, count in gather_object([(skips.visits, skips.seen)]):
        report.merge_skips(part)
        seen += count
    report.check(skips.max_fraction, seen=seen)


def lost_so_far(progress: Progress, skips: SkipCounter, accelerator: Accelerator) -> dict[str, float]:
    """The logged numbers of skipped examples and cut captions of all ranks since the start of the run."""
    lost = torch.tensor([skips.report.skipped, skips.truncated], device=accelerator.device)
    skipped, truncated = accelerator.reduce(lost, "sum").tolist()
    return {
        "train/skipped": float(sum(progress.skipped.values()) + skipped),
        "train/truncated": float(progress.truncated + truncated),
    }
