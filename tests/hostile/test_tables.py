"""More than a thousand annotation files: each is read, bar counted skips, or refused in one line that names it."""

import os

import pytest
import torch
from helpers.hostile_images import picture
from helpers.hostile_tables import GOOD, hostile_tables
from helpers.tiny_gallery import tiny_processor

from loopitr.data import (
    CaptionDataset,
    Collator,
    DataError,
    DataOptions,
    LoadReport,
    TrainTransform,
    load_albef,
    load_records,
    load_table,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, name in enumerate([*GOOD, "bad.png"]):
        picture(number).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return list(hostile_tables(tmp_path_factory.mktemp("tables")))


def options_of(case, images):
    return DataOptions(
        **{case.kind: str(case.path)}, images=str(images), split="train", val_fraction=0.0, max_skipped_fraction=1.0
    )


@pytest.fixture(scope="module")
def outcomes(cases, images):
    """For each case its records and report, or the error; whatever else is raised fails."""
    outcomes = []
    for case in cases:
        report = LoadReport()
        try:
            outcomes.append((load_records(options_of(case, images), "train", report), report))
        except DataError as error:
            outcomes.append(error)
        except Exception as error:
            raise AssertionError(f"{case.name}: {error!r}") from error
    return outcomes


def test_each_is_read_or_refused_in_one_line(cases, outcomes):
    assert len(cases) > 1400
    wrong = []
    for case, outcome in zip(cases, outcomes, strict=True):
        if isinstance(outcome, DataError):
            line = str(outcome)
            names = any(name in line for name in (str(case.path), "bad.png", *GOOD)) or "caption must be" in line
            good = case.readable is not True and line.isprintable() and len(line) < 1000 and names
        else:
            good = case.readable is not False and outcome[1].summary().isprintable()
        if good and " without " in case.name and not case.name.endswith(("id", "more", "filepath")):
            good = isinstance(outcome, DataError) or outcome[1].skipped > 0  # It is not left out in silence.
        if not good:
            wrong.append((case, outcome))
    assert not wrong
    refused = sum(isinstance(outcome, DataError) for outcome in outcomes)
    assert refused > 300 and len(outcomes) - refused > 300


def test_no_row_changes_another(cases, outcomes):
    """What is said of a good image is what its own row says. A table that was cut may lack rows, a flipped byte or
    another encoding may change the row that it is in, and nothing else."""
    for case, outcome in zip(cases, outcomes, strict=True):
        if isinstance(outcome, DataError):
            continue
        records = {record.name: record for record in outcome[0]}
        good = {name: record.captions for name, record in records.items() if name in GOOD}
        changed = [name for name, captions in good.items() if captions != (GOOD[name],)]
        if " whose " in case.name or " without " in case.name or case.readable:
            assert not changed and len(good) == len(GOOD), case
        else:
            assert len(changed) <= 1, (case, changed)
        identities = [record.identity for record in records.values()]
        assert len(set(identities)) == len(identities), case


def test_what_is_read_can_be_batched(cases, outcomes):
    """With captions of 10,000 words, identities of 64 bits, names of files that are none."""
    collator = Collator(tiny_processor().tokenizer, max_length=8)
    transform = TrainTransform(8, (0.5,) * 3, (0.5,) * 3)
    seen = set()
    for outcome in outcomes:
        if isinstance(outcome, DataError) or len(seen) > 10_000:
            continue
        new = [record for record in outcome[0] if (record.image, record.captions, record.identity) not in seen]
        seen |= {(record.image, record.captions, record.identity) for record in new}
        if not new:
            continue
        dataset = CaptionDataset([*outcome[0]], transform=transform, captions="all")
        wanted = {id(record) for record in new}
        ends = [record for record in outcome[0] for _ in record.captions]
        chosen = [index for index, record in enumerate(ends) if id(record) in wanted]
        batch = collator([dataset[index] for index in chosen])
        assert torch.isfinite(batch.inputs["pixel_values"]).all()
        assert all(name and reason for name, reason in batch.skipped)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "a.json"])
def test_a_pipe_or_a_device_is_not_read(tmp_path, name):
    read = load_albef if name == "a.json" else load_table
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match="not a file$"):
        read(tmp_path / name, tmp_path, LoadReport())
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a file$"):
        read(tmp_path / name, tmp_path, LoadReport())
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match="Is a directory$"):
        read(tmp_path / name, tmp_path, LoadReport())
