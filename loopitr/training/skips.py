"""What a run could not read, counted over all ranks."""

from __future__ import annotations

from collections import Counter

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from loopitr.data import LoadReport
from loopitr.data.loader import EpochLoader, SkipCounter
from loopitr.training.checkpoints import Progress


def lost_in_all(progress: Progress, skips: SkipCounter) -> tuple[dict[str, int], int]:
    """How many files were skipped, by reason, and how many captions were cut, on all ranks since the run's start."""
    # A checkpoint of an older version has counts without names.
    unnamed = Counter(progress.skipped) - Counter(progress.skipped_files.values())
    files, truncated = files_in_all(progress, skips), progress.truncated
    for cut in gather_object([skips.truncated]):
        truncated += cut
    return dict(unnamed + Counter(files.values())), truncated


def files_in_all(progress: Progress, skips: SkipCounter) -> dict[str, str]:
    """The reason of every file that any rank could not read, once, since the very start of the run."""
    files = dict(progress.skipped_files)
    for part in gather_object([skips.files]):
        files = {**part, **files}
    return files


def check_skips(skips: SkipCounter, loader: EpochLoader, *, accumulation: int) -> None:
    """Judge data of fewer examples than `SkipCounter` waits for, once the ranks have read all of it.

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
    """What is logged of all ranks: examples left out and captions cut, earlier parts of the run included."""
    lost = torch.tensor([skips.report.skipped, skips.truncated], device=accelerator.device)
    skipped, truncated = accelerator.reduce(lost, "sum").tolist()
    return {
        "train/skipped": float(sum(progress.skipped.values()) + skipped),
        "train/truncated": float(progress.truncated + truncated),
    }
